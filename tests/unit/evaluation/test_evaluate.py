"""Evaluation: figures that follow from the records, and records in the order of the data."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.evaluation import evaluate as module
from bagcert.evaluation.evaluate import evaluate, labels_for, write_evaluation
from bagcert.records import wilson_interval
from tests import refused, tiny

RULES = ("vote", "levine-feizi", "double-masking", "detection")
PATCHES = ("1", "2x3", "2+1x4")


def _photos(photos: list[Photo], labels: list[int]) -> ImageSet:
    return ImageSet("photos", "test", np.array(labels), tiny.COLORS, lambda row: photos[row])


def _plain(label: int, size: tuple[int, int], orientation: int = 1) -> Photo:
    pixels = np.zeros((*size, 3), dtype=np.uint8)
    pixels[..., label] = 200
    return Photo(pixels, orientation)


@pytest.fixture(scope="module")
def images() -> ImageSet:
    found = tiny.image_set(60, tint=100)
    mislabeled = np.where(np.arange(60) % 9 == 0, (found.labels + 1) % 3, found.labels)
    return replace(found, labels=mislabeled)


@pytest.fixture(scope="module")
def evaluation(images: ImageSet) -> module.Evaluation:
    return evaluate(tiny.color_model(), images, patches=PATCHES, rules=RULES, batch_size=17)


def test_the_figures_follow_from_the_records(evaluation: module.Evaluation, images: ImageSet) -> None:
    records = evaluation.records
    assert [record.index for record in records] == list(range(60))
    assert [record.label for record in records] == images.labels.tolist()
    assert [(row.threat, row.rule) for row in evaluation.info.results] == [(p, r) for p in PATCHES for r in RULES]
    for column, row in enumerate(evaluation.info.results):
        results = [record.results[column] for record in records]
        assert {(result.rule, result.threat, tuple(result.patch or ())) for result in results} == {
            (row.rule, row.threat, tuple(row.patch or ()))
        }
        right = [result.prediction == record.label for result, record in zip(results, records, strict=True)]
        proved = [result.certified and good for result, good in zip(results, right, strict=True)]
        assert row.clean_accuracy == sum(right) / 60
        assert row.certified_accuracy == sum(proved) / 60 <= row.clean_accuracy
        assert row.certified_share == pytest.approx(sum(result.certified for result in results) / 60)
        assert row.interval95["clean_accuracy"] == wilson_interval(sum(right), 60)
        assert row.interval95["certified_accuracy"] == wilson_interval(sum(proved), 60)
        assert row.seconds >= 0
    # The data are neither trivial nor hopeless, so that the sums above mean something.
    assert any(0 < row.certified_accuracy < row.clean_accuracy < 1 for row in evaluation.info.results)


def test_predictions_keep_the_order(evaluation: module.Evaluation, images: ImageSet) -> None:
    expected = images.array().astype(int).sum((1, 2)).argmax(1)
    column = [row.rule for row in evaluation.info.results].index("vote")
    assert [record.results[column].prediction for record in evaluation.records] == expected.tolist()


def test_batches_change_nothing(evaluation: module.Evaluation, images: ImageSet) -> None:
    found = evaluate(tiny.color_model(), images, patches=PATCHES, rules=RULES, batch_size=60)
    assert found.records == evaluation.records


def test_the_run_is_described(evaluation: module.Evaluation) -> None:
    info = evaluation.info
    assert (info.data, info.split, info.images, info.limit) == ("colors", "test", 60, None)
    assert (info.device, info.backend, info.dtype) == ("cpu", "torch", "float32")
    assert info.threads >= 1
    assert {"python", "bagcert", "torch", "numpy"} <= info.versions.keys()
    assert info.seconds["total"] >= info.seconds["forward"] > 0


def test_the_models_own_rule_and_patch_are_the_defaults(images: ImageSet) -> None:
    info = evaluate(tiny.color_model("double-masking", "1x2"), images, limit=5).info
    assert [(row.rule, row.patch) for row in info.results] == [("double-masking", [1, 2])]


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (7, 7), (60, 60), (1000, 60)])
def test_limit_takes_the_first_images(limit: int, count: int, evaluation: module.Evaluation, images: ImageSet) -> None:
    found = evaluate(tiny.color_model(), images, patches=PATCHES, rules=RULES, limit=limit)
    assert found.records == evaluation.records[:count]
    assert (found.info.images, found.info.limit) == (count, limit)


@pytest.mark.parametrize(
    ("notation", "patch"),
    [("2", [2, 2]), ("2x5", [2, 5]), ("4%", [2, 2]), ("2+1x4", None), ("2*1", None), ("area:3", None), ("1+2", [2, 2])],
)
def test_only_a_single_patch_has_a_size(notation: str, patch: list[int] | None, images: ImageSet) -> None:
    (row,) = evaluate(tiny.color_model(), images, patches=[notation], limit=3).info.results
    assert (row.patch, row.threat) == (patch, notation)


def test_photos_keep_their_order() -> None:
    random = np.random.default_rng(0)
    labels = random.integers(0, 3, 40).tolist()
    sizes = [(8, 8), (8, 12), (12, 8), (31, 17)]
    photos = [_plain(label, sizes[random.integers(4)], int(random.integers(1, 9))) for label in labels]
    asked = {"patches": ["2", "10%"], "rules": ["vote", "double-masking"], "batch_size": 3}
    found = evaluate(tiny.color_model(), _photos(photos, labels), **asked)
    assert [row.patch for row in found.info.results] == [[2, 2], [2, 2], None, None]
    assert [row.clean_accuracy for row in found.info.results] == [1, 1, 1, 1]
    for record, label, photo in zip(found.records, labels, photos, strict=True):
        assert [result.prediction for result in record.results] == [label] * 4
        height, width = photo.stored_size
        for result in record.results:
            for top, left, patch_height, patch_width in np.reshape(result.worst_placement, (-1, 4)):
                assert 0 <= top <= height - patch_height
                assert 0 <= left <= width - patch_width


def test_center_crop_leaves_the_sides_out() -> None:
    pixels = np.zeros((8, 16, 3), dtype=np.uint8)
    pixels[:, :, 0] = 250  # red at the sides
    pixels[:, 4:12] = [0, 100, 0]  # and green in the middle
    predictions = {
        fit: evaluate(tiny.color_model(), _photos([Photo(pixels)], [1]), fit=fit).records[0].results[0].prediction
        for fit in ("squash", "center-crop")
    }
    assert predictions == {"squash": 0, "center-crop": 1}
    with pytest.raises(UsageError, match="squash or center-crop"):
        evaluate(tiny.color_model(), _photos([Photo(pixels)], [1]), fit="stretch")


def test_a_mask_restricts_the_placements(images: ImageSet, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:, 5:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    anywhere = evaluate(tiny.color_model(), images, patches=["2"])
    right = evaluate(tiny.color_model(), images, patches=["2"], placements=tmp_path / "mask.png")
    (row,) = right.info.results
    assert (row.patch, row.threat) == (None, "2 within the allowed placements")
    assert row.certified_accuracy >= anywhere.info.results[0].certified_accuracy
    assert {record.results[0].worst_placement[1] for record in right.records} <= {5, 6}
    digest = hashlib.sha256((tmp_path / "mask.png").read_bytes()).hexdigest()
    assert right.info.to_dict()["placements"] == {"file": "mask.png", "sha256": digest}
    assert "placements" not in anywhere.info.to_dict()


def test_repeats_give_medians(images: ImageSet, evaluation: module.Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    laps = iter([1.0, 10.0, 5.0, 30.0, 2.0, 20.0])  # forward and rule, three times
    monkeypatch.setattr("bagcert.evaluation.passes._elapsed", lambda clock, model: next(laps))
    calls: list[tuple[int, int]] = []
    asked = {"patches": ["1"], "rules": ["vote"], "repeat": 3}
    found = evaluate(tiny.color_model(), images, **asked, on_progress=lambda done, total: calls.append((done, total)))
    assert found.info.repeat == 3
    assert found.info.seconds["forward"] == 2
    assert found.info.results[0].seconds == 20
    assert [record.results for record in found.records] == [record.results[:1] for record in evaluation.records]
    assert calls == [(60, 180), (120, 180), (180, 180)]


NUMBERS = ("0", "1", "2")


@pytest.mark.parametrize(
    ("data", "model", "expected"),
    [
        (("red", "green", "blue"), ("red", "green", "blue"), [0, 1, 2]),
        (("red", "green", "blue"), ("blue", "red", "green"), [1, 2, 0]),
        (("green", "red"), ("blue", "red", "green"), [2, 1]),
        (NUMBERS, ("blue", "red", "green"), [0, 1, 2]),
        (NUMBERS, ("0", "1", "10", "2"), [0, 1, 3]),
    ],
)
def test_labels_by_name_or_number(data: tuple[str, ...], model: tuple[str, ...], expected: list[int]) -> None:
    photos = [_plain(0, (8, 8))] * len(data)
    images = ImageSet("data", "test", np.arange(len(data)), data, lambda row: photos[row])
    assert labels_for(tiny.color_model(names=model), images).tolist() == expected


@pytest.mark.parametrize(("data", "unknown"), [(("red", "pink"), "pink"), (("0", "1", "2", "3"), "0")])
def test_a_class_the_model_does_not_know_is_named(data: tuple[str, ...], unknown: str) -> None:
    images = ImageSet("data", "test", np.arange(len(data)), data, lambda row: _plain(0, (8, 8)))
    with pytest.raises(UsageError, match=f"data has the class '{unknown}', which Sequential does not know") as error:
        evaluate(tiny.color_model(), images)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patches": ["five"]}, None),
        ({"patches": ["0"]}, None),
        ({"patches": ["9"]}, "9x9 px does not fit into an image of 8x8 px"),
        ({"rules": ["votes"]}, None),
        ({"batch_size": 0}, None),
        ({"repeat": 0}, None),
        ({"limit": 0}, None),
        ({"limit": -3}, None),
    ],
)
def test_options_refused(options: dict, message: str | None, images: ImageSet) -> None:
    photos = _photos([_plain(0, (12, 12)), _plain(1, (8, 8))], [0, 1])
    for data in (images, photos):  # a patch must fit into every photo
        refused(UsageError, message, evaluate, tiny.color_model(), data, **options)


def test_unknown_data_name_the_nearest() -> None:
    refused(UsageError, "did you mean digits", evaluate, tiny.color_model(), "digit")


@pytest.mark.parametrize("batch_size", [7, 60])
def test_unreadable_image_left_out(batch_size: int, images: ImageSet, evaluation: module.Evaluation) -> None:
    bad = (0, 7, 8, 59)

    def source(row: int) -> Photo:
        if row in bad:
            raise UnreadableError(f"image {row} is cut short")
        return images.source(row)

    asked = {"patches": PATCHES, "rules": RULES, "batch_size": batch_size, "repeat": 2}
    found = evaluate(tiny.color_model(), replace(images, source=source), **asked)
    assert found.records == [record for record in evaluation.records if record.index not in bad]
    assert found.errors == [f"image {row} is cut short" for row in bad]
    assert (found.info.images, found.info.unreadable) == (56, 4)
    right = [record.results[0].prediction == record.label for record in found.records]
    assert found.info.results[0].clean_accuracy == sum(right) / 56
    assert (evaluation.info.unreadable, evaluation.errors) == (0, [])


def test_data_without_a_readable_image_are_an_error() -> None:
    def broken(row: int) -> Photo:
        raise UnreadableError(f"image {row} is cut short")

    with pytest.raises(UnreadableError, match="no image of broken can be read; the first: image 0 is cut short"):
        evaluate(tiny.color_model(), ImageSet("broken", "test", np.zeros(3, dtype=np.int64), tiny.COLORS, broken))


def test_the_files_hold_the_run_and_a_line_per_image(evaluation: module.Evaluation, tmp_path: Path) -> None:
    write_evaluation(evaluation, tmp_path / "new" / "r.json")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["r.csv", "r.json", "r.records.jsonl"]
    assert json.loads((tmp_path / "new" / "r.json").read_text()) == evaluation.info.to_dict()
    lines = [json.loads(line) for line in (tmp_path / "new" / "r.records.jsonl").read_text().splitlines()]
    assert len(lines) == 60
    assert list(lines[0]) == ["index", "label", "source", "results"]
    assert [line["source"] for line in lines] == [f"image {i}" for i in range(60)]
    assert [line["index"] for line in lines] == list(range(60))
    assert lines[7]["results"][0]["margin"] == evaluation.records[7].results[0].margin


def test_files_that_cannot_be_written(evaluation: module.Evaluation, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    refused(BagcertError, "cannot be written", write_evaluation, evaluation, tmp_path / "file" / "r.json")
