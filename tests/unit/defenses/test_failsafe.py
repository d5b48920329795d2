"""The runtime promise: under attack a certified verdict is the verdict on the clean scene."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import bagcert
from bagcert.defenses.failsafe import FailSafe
from bagcert.errors import UsageError
from bagcert.rules import RULES
from bagcert.threat import PatchThreatModel
from tests import refused, tiny

RECOVERY = sorted(name for name, rule in RULES.items() if rule.guarantee == "recovery")


@pytest.mark.parametrize("rule", RECOVERY)
@settings(max_examples=10, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**20), tint=st.integers(10, 120))
def test_certified_verdict_is_the_clean_one(rule: str, seed: int, tint: int) -> None:
    images = tiny.pixels(np.array([seed % 3]), (6, 7), tint, seed)
    fail_safe = FailSafe(tiny.color_model(rule, "2", (6, 7)), rule=rule)
    clean = fail_safe.model.predict(images, "2", rule=rule)[0].item()
    for verdict in fail_safe(tiny.attacked(images[0], 2)):
        assert verdict.label == clean if verdict.certified else verdict.label is None


def test_attacks_on_digits() -> None:
    model = bagcert.load("digits")
    fail_safe = FailSafe(model, "1")
    images, _ = _digits(8)
    contents = [np.uint8([value] * 3) for value in (0, 128, 255)]
    lost = kept = 0
    for image, clean in zip(images, fail_safe(images), strict=True):
        label = model.predict(image[None], "1")[0].item()
        for verdict in fail_safe(tiny.attacked(image, 1, contents)):
            if verdict.certified:
                assert verdict.label == label
                kept += 1
            else:
                lost += clean.certified
    assert kept > 0
    assert lost > 0, "the attack is too weak to show anything"


def _digits(count: int) -> tuple[np.ndarray, np.ndarray]:
    from bagcert.data import load_dataset

    images = load_dataset("digits", "test", limit=count)
    return images.array(), images.labels


def test_verdicts() -> None:
    images, _ = _digits(60)
    model = bagcert.load("digits")
    certificate = model.certify(images, "2")
    verdicts = FailSafe(model, "2")(images)
    assert [verdict.certified for verdict in verdicts] == certificate.certified.tolist()
    assert [verdict.margin for verdict in verdicts] == certificate.margin.tolist()
    assert 0 < sum(verdict.certified for verdict in verdicts) < 60
    for verdict, label in zip(verdicts, certificate.prediction.tolist(), strict=True):
        assert verdict.label == (label if verdict.certified else None)
        assert "patch of 2 px" in verdict.reason
        assert model.class_names[label] in verdict.reason
        assert ("no label" in verdict.reason) != verdict.certified


@pytest.mark.parametrize("as_tensor", [False, True])
def test_fallback_is_asked_in_doubt(as_tensor: bool) -> None:
    images, _ = _digits(40)
    model = bagcert.load("digits")
    doubtful = ~model.certify(images, "2").certified.numpy()
    given: list = []

    def fallback(asked):
        given.append(asked)
        return [9 if i % 2 else None for i in range(len(asked))]

    batch = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255 if as_tensor else images
    verdicts = FailSafe(model, "2", fallback=fallback)(batch)
    assert len(given) == 1
    np.testing.assert_array_equal(np.asarray(given[0]), np.asarray(batch)[doubtful])
    answers = [verdict.label for verdict in verdicts if not verdict.certified]
    assert answers == [9 if i % 2 else None for i in range(len(answers))]


@pytest.mark.parametrize("kind", ["bytes", "floats", "tensor"])
def test_fallback_of_one_image(kind: str) -> None:
    """Without the batch axis as well, where indexing would take a row or a channel of it."""
    pixels = _digits(1)[0][0]
    image = pixels if kind == "bytes" else pixels.transpose(2, 0, 1).astype(np.float32) / 255
    image = torch.from_numpy(image) if kind == "tensor" else image
    given: list = []
    fail_safe = FailSafe(bagcert.load("digits"), "2", fallback=lambda images: given.append(images) or [7] * len(images))
    (verdict,) = fail_safe(image)
    assert (verdict.certified, verdict.label) == (False, 7)
    assert verdict == fail_safe(image[None])[0]
    for asked in given:
        np.testing.assert_array_equal(np.asarray(asked), np.asarray(image)[None])


def test_without_doubt_the_fallback_is_not_asked() -> None:
    white = np.full((1, 8, 8, 3), 0, np.uint8)
    white[..., 0] = 255

    def fallback(asked):
        raise AssertionError("asked")

    assert FailSafe(tiny.color_model("vote", "1"), "1", fallback=fallback)(white)[0].label == 0


def test_detection_is_refused() -> None:
    refused(UsageError, "'detection' only detects", FailSafe, tiny.color_model(), "1", rule="detection")


@pytest.mark.parametrize(
    ("answers", "message"), [([], "returned 0 labels"), ([7], "labels must be 0 to 2"), ([-1], "labels must be 0 to 2")]
)
def test_a_fallback_must_answer_with_labels(answers: list, message: str) -> None:
    gray = np.full((1, 8, 8, 3), 100, np.uint8)
    refused(UsageError, message, FailSafe(tiny.color_model("vote", "2"), "2", fallback=lambda images: answers), gray)


@pytest.mark.parametrize("threat", ["0", "9", "huge", "2x"])
def test_a_threat_is_checked_at_once(threat: str) -> None:
    refused(UsageError, None, FailSafe, tiny.color_model(), threat)


def test_allowed_placements() -> None:
    allowed = np.zeros((8, 8), bool)
    allowed[:2] = True
    threat = PatchThreatModel.parse("2", (8, 8), allowed)
    model = tiny.color_model("vote")
    images = tiny.pixels(np.zeros(8, int), tint=120)
    assert [v.margin for v in FailSafe(model, threat)(images)] == model.certify(images, threat).margin.tolist()
