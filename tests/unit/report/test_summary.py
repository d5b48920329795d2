"""What a report reads, the figures it makes of it, and what it refuses."""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from bagcert.errors import UnreadableError, UsageError
from bagcert.evaluation.gallery import chosen, edges, turned
from bagcert.evaluation.gallery_file import gallery_bytes, gallery_path, read_gallery
from bagcert.report.summary import KINDS, confusion, margins, patch_curves, per_class, read_inputs, read_run
from tests import refused
from tests.unit.report import made


def test_the_figures_are_those_of_the_records(tmp_path: Path) -> None:
    run = read_run(made.write(tmp_path))
    assert per_class(run, 0) == [
        {"label": 0, "images": 2, "clean": 1, "certified": 1},
        {"label": 1, "images": 2, "clean": 2, "certified": 1},
    ]
    classes, counts = confusion(run, 0)
    assert (classes, counts.tolist()) == ([0, 1], [[1, 1], [0, 2]])
    bins, groups = margins(run, 0)
    assert 0.0 in bins
    zero = bins.index(0.0)
    assert [sum(groups[kind]) for kind in KINDS] == [2, 1, 1]
    assert sum(groups[KINDS[0]][zero:]) == 2  # certified exactly from 0 on
    assert sum(groups[KINDS[1]][:zero]) == 1
    assert patch_curves([run]) == (["2"], {"vote": {"2": (50.0, 15.0, 85.0)}})


def test_a_gallery_comes_back_as_it_was_written(tmp_path: Path) -> None:
    found, expected = read_run(made.write(tmp_path)).gallery, made.gallery()
    assert found is not None
    assert found.class_names == expected.class_names
    for one, other in zip(found.pictures, expected.pictures, strict=True):
        assert (one.pixels == other.pixels).all()
        assert (one.votes == other.votes).all()
        assert (one.index, one.prediction, one.worst_placements) == (other.index, other.prediction, [[0, 1, 2, 2]])


def test_training_curves_of_a_run_folder(tmp_path: Path) -> None:
    lines = [{"step": i, "seconds": 1.0, "epoch": i, "loss": 1 / i, "certified_accuracy": 0.1 * i} for i in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (training,) = read_inputs([tmp_path]).trainings
    assert training.curve("certified_accuracy", share=True) == [(1.0, 10.0), (2.0, 20.0)]
    assert training.name == tmp_path.name


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not the JSON of an evaluation"),
        ("[]", "not the JSON of an evaluation"),
        ('{"results": 3}', "not the JSON of an evaluation"),
        ("[" * 100_000, "not the JSON of an evaluation"),
        (json.dumps(made.info().to_dict()).replace("0.75", "7.5"), "shares outside 0 to 1"),
        (json.dumps(made.info().to_dict()).replace("0.75", "NaN"), "shares outside 0 to 1"),
        (json.dumps(made.info(results=[]).to_dict()), "holds no results"),
        (json.dumps(made.info(images=9).to_dict()), "does not belong"),
    ],
)
def test_hostile_results_give_one_sentence(text: str, words: str, tmp_path: Path) -> None:
    path = made.write(tmp_path)
    path.write_text(text)
    refused(UnreadableError, words, read_run, path)


@pytest.mark.parametrize("line", ["{", "[1]", '{"a": 1}\x00'])
def test_hostile_metrics_give_one_sentence(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    refused(UnreadableError, "line 1 of", read_inputs, [tmp_path])


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    refused(UsageError, "neither metrics", read_inputs, [tmp_path])
    refused(UnreadableError, "cannot be read", read_inputs, [tmp_path / "missing.json"])


def _replaced(path: Path, name: str, content: bytes) -> None:
    """The archive with one member replaced."""
    with zipfile.ZipFile(path) as parts:
        members = {part: parts.read(part) for part in parts.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as parts:
        for part, old in members.items():
            parts.writestr(part, content if part == name else old)


def _npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("image_0.npy", _npy(np.array([{}], dtype=object))),  # a pickle
        ("image_0.npy", _npy(np.zeros((4, 4, 3), dtype=np.float64))),
        ("image_0.npy", _npy(np.zeros((4, 5, 3), dtype=np.uint8))),
        ("image_0.npy", _npy(np.zeros((4, 4, 3), dtype=np.uint8))[:-1]),
        ("votes_1.npy", b""),
        ("about.npy", _npy(np.frombuffer(b'{"format": 2}', dtype=np.uint8))),
        ("about.npy", _npy(np.frombuffer(b"[" * 10_000, dtype=np.uint8))),
    ],
)
def test_hostile_galleries_give_one_sentence(name: str, content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "r.gallery.npz"
    path.write_bytes(gallery_bytes(made.gallery()))
    _replaced(path, name, content)
    refused(UnreadableError, "is not a gallery", read_gallery, path)


def test_a_gallery_that_inflates_is_refused_before_it_does(tmp_path: Path) -> None:
    path = tmp_path / "r.gallery.npz"
    path.write_bytes(gallery_bytes(made.gallery()))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as parts, parts.open("bomb.npy", "w") as member:
        for _ in range(129):
            member.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    refused(UnreadableError, "holds more than", read_gallery, path)


def test_the_choice_spreads_over_the_kinds_and_repeats() -> None:
    records = [made.record(i, 0, int(i % 10 == 0), i % 3 - 1) for i in range(300)]
    picked = chosen(records, 9)
    assert picked == chosen(records, 9) == sorted(set(picked))
    assert len(picked) == 9
    right = [i for i in picked if records[i].results[0].prediction == 0]
    assert len(right) == 6
    assert sum(records[i].results[0].certified for i in right) == 3
    assert len(chosen(records[1:5], 9)) == 4


def test_regions_and_boxes_turn_with_the_photo() -> None:
    assert edges(np.kron(np.eye(3, dtype=bool), np.ones((1, 4), dtype=bool))) == [0, 4, 8, 12]
    photo = np.zeros((10, 20))
    photo[2:5, 7:9] = 1
    from bagcert.data.photo import Photo

    for orientation in range(1, 9):
        pixels = np.repeat((photo * 255).astype(np.uint8)[:, :, None], 3, 2)
        rows, cols = np.nonzero(Photo(pixels, orientation).upright()[:, :, 0])
        box = (rows.min(), cols.min(), np.ptp(rows) + 1, np.ptp(cols) + 1)
        assert turned([2, 7, 3, 2], (10, 20), orientation) == box


def test_a_run_without_gallery_names_classes_by_number(tmp_path: Path) -> None:
    path = made.write(tmp_path)
    assert read_run(path).class_name(0) == "red"
    gallery_path(path).unlink()
    assert read_run(path).class_name(0) == "0"
