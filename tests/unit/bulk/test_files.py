"""Certifying files: every readable one, in pixels of the file."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagcert.bulk.files import FileError, FileVerdict, certify_files, certify_photo, image_files
from bagcert.data.photo import Photo
from bagcert.data.preprocess import Preprocessing
from bagcert.errors import UnreadableError, UsageError
from bagcert.proofs.file import RecordFile
from bagcert.proofs.lines import from_line
from bagcert.proofs.verify import verify_record
from bagcert.rules import get_rule
from bagcert.threat import PatchThreatModel
from tests import refused, tiny


def _save(path: Path, label: int = 0, size: tuple[int, int] = (8, 8), orientation: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(tiny.pixels(np.array([label]), size, tint=150)[0])
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


def test_image_files(tmp_path: Path) -> None:
    names = ["b.png", "a.PNG", "deep/er/c.jpg", "deep/d.webp"]
    for name in (*names, ".hidden.png", ".folder/e.png", "deep/.f.png"):
        _save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    (tmp_path / "photos" / "empty").mkdir()
    named = tmp_path / "any name"
    found = image_files([named, str(tmp_path / "photos"), named])
    assert found[0] == found[-1] == named
    assert found[1:-1] == [tmp_path / "photos" / name for name in ("a.PNG", "b.png", "deep/d.webp", "deep/er/c.jpg")]


def test_a_folder_without_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    refused(UnreadableError, "holds no images", image_files, [tmp_path])


def test_one_bad_file_does_not_stop_the_others(tmp_path: Path) -> None:
    good = [_save(tmp_path / f"{label}.png", label) for label in range(3)]
    whole = good[0].read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    bad = [tmp_path / "cut.png", tmp_path / "empty.png", tmp_path / "missing.png", tmp_path]
    files = [good[0], bad[0], bad[1], good[1], bad[2], bad[3], good[2]]
    found = list(certify_files(tiny.color_model(), files))
    assert [each.source for each in found] == list(map(str, files))
    for each in found:
        if Path(each.source) in good:
            assert isinstance(each, FileVerdict)
            assert each.class_name == tiny.COLORS[int(Path(each.source).stem)] == tiny.COLORS[each.prediction]
        else:
            assert isinstance(each, FileError)
            assert each.source in each.error
            assert "\n" not in each.error


def test_the_verdict_on_a_large_photo_is_in_its_own_pixels(tmp_path: Path) -> None:
    file = _save(tmp_path / "large.png", 1, (40, 60))
    (verdict,) = certify_files(tiny.color_model(), [file], ["3", "10x30"], ["vote", "double-masking"])
    assert isinstance(verdict, FileVerdict)
    assert verdict.size_px == [40, 60]
    assert [(result.rule, result.patch) for result in verdict.results] == [
        ("vote", [3, 3]),
        ("vote", [10, 30]),
        ("double-masking", [3, 3]),
        ("double-masking", [10, 30]),
    ]
    for result in verdict.results:
        for top, left, height, width in np.reshape(result.worst_placement, (-1, 4)):
            assert [height, width] == result.patch
            assert 0 <= top <= 40 - height
            assert 0 <= left <= 60 - width
    lefts = {place[1] for result in verdict.results for place in np.reshape(result.worst_placement, (-1, 4)).tolist()}
    assert max(lefts) > 8, "placements beyond the network's 8 columns exist"


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_turned_photos_are_certified_as_stored(tmp_path: Path, orientation: int) -> None:
    file = _save(tmp_path / "turned.png", 2, (12, 30), orientation)
    (verdict,) = certify_files(tiny.color_model(), [file], ["12x5"])
    assert isinstance(verdict, FileVerdict)
    assert (verdict.size_px, verdict.exif_orientation, verdict.class_name) == ([12, 30], orientation, "blue")
    with pytest.raises(UsageError, match="13x5 px does not fit into an image of 12x30 px"):
        list(certify_files(tiny.color_model(), [file], ["13x5"]))


@pytest.mark.parametrize("patch", ["0", "five", "9", ""])
def test_patch_refused(tmp_path: Path, patch: str) -> None:
    refused(UsageError, None, list, certify_files(tiny.color_model(), [_save(tmp_path / "a.png")], [patch]))


@pytest.mark.parametrize(
    ("options", "message"), [({"patches": ["five"]}, "got 'five'"), ({"rules": ["votes"]}, "did you mean vote")]
)
def test_options_refused_before_any_file_is_read(tmp_path: Path, options: dict, message: str) -> None:
    refused(UsageError, message, next, certify_files(tiny.color_model(), [tmp_path / "missing.png"], **options))


@pytest.mark.parametrize("size", [(8, 8), (24, 20)])
@pytest.mark.parametrize("seed", range(4))
def test_the_largest_sides_are_those_that_certify(size: tuple[int, int], seed: int) -> None:
    model, preprocessing = tiny.color_model(), Preprocessing((8, 8))
    photo = Photo(tiny.pixels(np.array([seed % 3]), size, tint=60 + 30 * seed, seed=seed)[0])
    geometry = preprocessing.geometry(photo.stored_size)
    score_map = geometry.score_map(model.score_map(preprocessing.apply(photo)[None]))
    verdict = certify_photo(model, photo, preprocessing)

    def holds(rule: str, side: int) -> bool:
        found = get_rule(rule).certify(score_map, PatchThreatModel.parse(side, size))
        return bool(found.certified[0]) and int(found.prediction[0]) == verdict.prediction

    sides = range(1, min(size) + 1)
    assert verdict.largest_certified_px == max([side for side in sides if holds("vote", side)], default=0)
    assert verdict.largest_certifiable_px == max([side for side in sides if holds("double-masking", side)], default=0)


def test_a_masking_defence_certifies_what_its_masks_cover() -> None:
    photo = Photo(tiny.pixels(np.array([1]), tint=150)[0])
    verdicts = [
        certify_photo(tiny.color_model("double-masking"), photo, Preprocessing((8, 8)), [patch])
        for patch in ("2", "2x5")
    ]
    assert [verdict.results[0].certified for verdict in verdicts] == [True, True]
    assert [verdict.largest_certified_px for verdict in verdicts] == [2, 2]
    assert verdicts[0].largest_certifiable_px > 2


@pytest.mark.parametrize("rule", ["vote", "levine-feizi", "double-masking", "detection"])
def test_every_rule_takes_a_mask_of_placements(rule: str, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[2:6, 2:6] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    file = _save(tmp_path / "a.png")
    (anywhere,) = certify_files(tiny.color_model(), [file], ["2"], [rule])
    (inside,) = certify_files(tiny.color_model(), [file], ["2"], [rule], placements=tmp_path / "mask.png")
    assert isinstance(inside, FileVerdict)
    assert isinstance(anywhere, FileVerdict)
    assert inside.results[0].threat == "2 within the allowed placements"
    assert all(2 <= place[0] <= 4 for place in np.reshape(inside.results[0].worst_placement, (-1, 4)))
    if rule in ("vote", "levine-feizi"):
        assert inside.largest_certified_px == anywhere.largest_certified_px


def test_smaller_rectangles_within_a_mask_on_a_photo_count(tmp_path: Path) -> None:
    """Two strips in pixels of the photo; the larger patch fits into neither, smaller ones fit into both."""
    mask = np.zeros((24, 20), dtype=np.uint8)
    mask[1:4, 2:9] = mask[8:18, 14:16] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    file = _save(tmp_path / "a.png", size=(24, 20))
    for patch in ("6", "area:36"):
        (verdict,) = certify_files(tiny.color_model(), [file], [patch], ["vote"], placements=tmp_path / "mask.png")
        assert isinstance(verdict, FileVerdict)
        top, left, height, width = verdict.results[0].worst_placement
        assert mask[top : top + height, left : left + width].all()
        strips = {
            name: np.where(np.add.outer(rows, cols) > 1, mask, 0)
            for name, rows, cols in (
                ("upper", np.arange(24) < 6, np.ones(20)),
                ("lower", np.arange(24) >= 6, np.ones(20)),
            )
        }
        margins = []
        for name, strip in strips.items():
            Image.fromarray(strip).save(tmp_path / f"{name}.png")
            (alone,) = certify_files(tiny.color_model(), [file], [patch], ["vote"], placements=tmp_path / f"{name}.png")
            assert isinstance(alone, FileVerdict)
            margins.append(alone.results[0].margin)
        assert verdict.results[0].margin == min(margins)


def test_image_too_small_for_the_patch(tmp_path: Path) -> None:
    small, large = _save(tmp_path / "small.png", size=(6, 6)), _save(tmp_path / "large.png", size=(20, 20))
    first, second = certify_files(tiny.color_model(), [small, large], ["9"])
    assert isinstance(first, FileError)
    assert first.exit_code == 2
    assert "small.png: a patch of 9x9 px does not fit into an image of 6x6 px" in first.error
    assert isinstance(second, FileVerdict)


def _record_file(path: Path, resume: bool = False) -> RecordFile:
    environment = {"device": "cpu", "backend": "torch", "dtype": "float32", "threads": 1, "versions": {}}
    return RecordFile(path, tiny.color_model(), ["vote", "detection"], ["2"], environment, resume=resume)


def test_record_written_before_the_verdict(tmp_path: Path) -> None:
    files = [_save(tmp_path / f"{label}.png", label, (10 + label, 12)) for label in range(3)]
    (tmp_path / "cut.png").write_bytes(files[0].read_bytes()[:60])
    files.insert(1, tmp_path / "cut.png")
    path = tmp_path / "r.jsonl"

    def certify(record: RecordFile) -> list[FileVerdict | FileError]:
        found, before = [], record.kept * 2
        for verdict in certify_files(tiny.color_model(), files, ["2"], ["vote", "detection"], record=record):
            found.append(verdict)
            verdicts = [each for each in found if isinstance(each, FileVerdict)]
            records = list(map(from_line, path.read_bytes().splitlines(keepends=True)))[before:]
            assert [each["source"] for each in records[::2]] == [each.source for each in verdicts]
            for verdict, record_pair in zip(verdicts, zip(records[::2], records[1::2], strict=True), strict=True):
                for result, written in zip(verdict.results, record_pair, strict=True):
                    assert (result.rule, result.prediction) == (written["rule"], written["verdict"]["prediction"])
                    assert (result.certified, result.margin) == (
                        written["verdict"]["certified"],
                        written["verdict"]["margin"],
                    )
                    assert verify_record(written).ok
        return found

    with _record_file(path) as record:
        whole_run = certify(record)
    whole = path.read_bytes()
    assert [type(each) for each in whole_run] == [FileVerdict, FileError, FileVerdict, FileVerdict]
    path.write_bytes(whole[: whole.index(b"\n") + 1])  # killed between the two records of the first image
    with _record_file(path, resume=True) as record:
        assert certify(record) == whole_run
    assert path.read_bytes() == whole
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:4]) + lines[4][:70])
    with _record_file(path, resume=True) as record:
        assert certify(record) == [whole_run[1], whole_run[3]]  # what could not be read is tried again, and told again
    assert path.read_bytes() == whole
