"""Rows over a data set, and the alarm: a broken certificate is saved with all that is needed to look into it."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from bagcert.attacks import Settings
from bagcert.attacks.evaluate import attack_dataset
from bagcert.errors import UnreadableError
from bagcert.rules import RULES, Rule, vote
from tests import refused, tiny

QUICK = Settings(steps=5, restarts=1, placements=4)
LABELS = np.arange(8) % 3


def batches(images, labels=LABELS, size=4):
    for start in range(0, len(images), size):
        yield list(range(start, start + size)), images[start : start + size], labels[start : start + size]


def certifies_everything(score_map, threat):
    found = vote.vote(score_map, threat)
    object.__setattr__(found, "certified", torch.ones_like(found.certified))
    return found


@pytest.fixture
def unsound(monkeypatch):
    """A vote rule that certifies every image."""
    fake = Rule("vote", certifies_everything, lambda scores, threat: scores.predict(), "recovery", "a lie")
    monkeypatch.setitem(RULES, "vote", fake)


def test_rows_are_those_of_the_records():
    seen = []
    images = tiny.pixels(LABELS, tint=150)
    asked = {"settings": QUICK, "on_progress": lambda done, broken: seen.append((done, broken))}
    found = attack_dataset(tiny.color_model(), batches(images), ["1", "3"], ["double-masking", "vote"], **asked)
    rows = [(row.threat, row.rule) for row in found.rows]
    assert rows == [("1", "double-masking"), ("1", "vote"), ("3", "double-masking"), ("3", "vote")]
    assert [record.index for record in found.records] == list(range(8))
    for column, row in enumerate(found.rows):
        results = [record.results[column] for record in found.records]
        right = [result.prediction == record.label for result, record in zip(results, found.records, strict=True)]
        kept = [good and not result.broken for good, result in zip(right, results, strict=True)]
        proved = [good and result.certified for good, result in zip(right, results, strict=True)]
        assert row.clean_accuracy == sum(right) / 8
        assert row.attacked_accuracy == sum(kept) / 8
        assert row.certified_accuracy == sum(proved) / 8
        assert row.certified_accuracy <= row.attacked_accuracy <= row.clean_accuracy
        assert row.attempts == sum(result.attempts for result in results)
        assert row.certified_attempts == sum(result.attempts for result in results if result.certified)
        assert (row.rule, row.threat) == (results[0].rule, results[0].threat)
    assert found.rows[0].certified_accuracy > found.rows[3].attacked_accuracy - 1
    assert (found.broken_certificates, found.alarm_folder) == (0, None)
    assert seen == sorted(seen)
    assert seen[-1][0] == 8 * 4


def test_successful_images_are_saved(tmp_path):
    images = tiny.pixels(LABELS, tint=60)
    found = attack_dataset(tiny.color_model(), batches(images), ["4"], ["vote"], settings=QUICK, save=tmp_path)
    broken = [record.index for record in found.records if record.results[0].broken]
    assert broken
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{index:06d}-vote-4.png" for index in broken]
    for index in broken:
        pixels = np.asarray(Image.open(tmp_path / f"{index:06d}-vote-4.png"))
        answer = tiny.color_model().predict(pixels[None], 4)
        assert int(answer) == found.records[index].results[0].patched_prediction != found.records[index].label


@pytest.mark.parametrize("named", [True, False])
def test_a_broken_certificate_is_an_alarm(unsound, tmp_path, monkeypatch, named):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bagcert-broken-1").mkdir()
    images = tiny.pixels(LABELS, tint=60)
    save = tmp_path / "saved" if named else None
    found = attack_dataset(
        tiny.color_model(), batches(images), ["4"], ["vote"], settings=QUICK, save=save, about={"model": "tiny"}
    )
    (row,) = found.rows
    assert row.certified_accuracy == row.clean_accuracy == 1
    assert row.attacked_accuracy < 1
    assert found.broken_certificates == row.broken_certificates == sum(r.results[0].broken for r in found.records) > 0
    assert found.alarm_folder.resolve() == (save or tmp_path / "bagcert-broken-2")
    index = next(record.index for record in found.records if record.results[0].broken)
    verdict = json.loads((found.alarm_folder / f"broken-{index:06d}-vote-4.json").read_text())
    clean, patched = (
        np.asarray(Image.open(found.alarm_folder / f"broken-{index:06d}-vote-4-{kind}.png"))
        for kind in ("clean", "patched")
    )
    assert np.array_equal(clean, images[index])
    ((top, left, height, width),) = verdict["placement"]
    assert (clean != patched).any(2).sum() == (clean != patched)[top : top + height, left : left + width].any(2).sum()
    assert verdict["certified"] is verdict["broken"] is True
    assert (verdict["model"], verdict["index"], verdict["label"]) == ("tiny", index, int(LABELS[index]))
    answers = tiny.color_model().predict(np.stack([clean, patched]), 4).tolist()
    assert answers == [verdict["prediction"], verdict["patched_prediction"]]


def test_no_image_is_an_error():
    refused(UnreadableError, "no image to attack", attack_dataset, tiny.color_model(), [], ["2"], ["vote"])
