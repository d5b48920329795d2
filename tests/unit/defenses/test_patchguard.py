"""PatchGuard and PatchGuard++ deployed: at the front door, with images."""

from fractions import Fraction

import numpy as np
import pytest
import torch

from bagcert.defenses.patchguard import PatchGuard
from bagcert.defenses.patchguard_pp import PatchGuardPlusPlus
from bagcert.errors import UsageError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import RULES
from tests import oracle, refused, tiny

SIZE = (6, 7)


def scorer() -> RegionScorer:
    """Evidence is how far a channel is above the middle."""
    model = tiny.color_model(size=SIZE).scorer
    model.net[0].bias = torch.nn.Parameter(torch.full((3,), -0.5))
    return model


def images(count: int = 9, tint: int = 90, seed: int = 0) -> np.ndarray:
    return tiny.pixels(np.arange(count) % 3, SIZE, tint, seed)


def masks(side: int) -> list[np.ndarray]:
    grid = scorer().grid()
    return oracle.mask_set(grid.rows_seen, grid.cols_seen, [(side, side)])


@pytest.mark.parametrize("threshold", [0, "1/10", Fraction(1, 3)])
def test_patchguard_is_robust_masking(threshold):
    defense = PatchGuard(scorer(), threshold, patch=2)
    found = defense.certify(images())
    assert torch.equal(defense.predict(images()), found.prediction)
    for index, scores in enumerate(defense.score_map(images()).scores.numpy()):
        expected = oracle.robust_masking(scores, masks(2), threshold)
        assert (int(found.prediction[index]), int(found.margin[index])) == expected
    assert found.certified.any()
    assert found.rule == ("robust-masking" if threshold == 0 else f"robust-masking:{Fraction(threshold)}")
    assert (defense.guarantee, defense.forward_passes()) == ("recovery", 1)


@pytest.mark.parametrize("threshold", [0, "1/10", "1/5"])
def test_patchguard_certificates_hold(threshold):
    defense = PatchGuard(scorer(), threshold, patch=2)
    clean = defense.certify(images(tint=75))
    answers = [defense.predict(tiny.attacked(image, 2)) for image in images(tint=75)]
    broken = torch.stack([(found != label).any() for found, label in zip(answers, clean.prediction, strict=True)])
    assert clean.certified.any()
    assert broken.any()
    assert not (clean.certified & broken).any()


def test_patchguard_by_other_rules_and_patches():
    defense = PatchGuard(scorer(), "1/10", patch=2)
    for name in RULES:
        found = defense.certify(images(), "1x3", rule=name)
        assert found.rule.split(":")[0] == name
        assert torch.equal(defense.predict(images(), "1x3", rule=name), found.prediction)
    refused(UsageError, "unknown rule", defense.predict, images(), rule="guess")


def test_patchguard_pp_without_a_threshold_is_detection():
    defense = PatchGuardPlusPlus(scorer(), patch=2)
    batch, plain = images(tint=40), tiny.color_model(size=SIZE).certify(images(tint=40), 2, rule="detection")
    found = defense.certify(batch)
    assert torch.equal(found.prediction, plain.prediction)
    assert torch.equal(found.certified, plain.certified)
    assert torch.equal(defense.predict(batch), plain.prediction)
    alert = defense.alert(batch)
    expected = [oracle.alert(scores, masks(2)) for scores in defense.score_map(batch).scores.numpy()]
    assert alert.tolist() == expected == (~found.certified).tolist()
    assert 0 < sum(expected) < len(expected)
    assert (defense.guarantee, defense.forward_passes(), found.rule) == ("detection", 1, "detection")


def test_patchguard_pp_threshold_is_a_trade():
    found, alerts = [], []
    for confidence in (0.0, 0.335, 0.35, 0.37):
        defense = PatchGuardPlusPlus(scorer(), confidence, patch=2)
        found.append(defense.certify(images(30, 40)).certified)
        alerts.append(defense.alert(images(30, 40)))
    assert not any(bool((a & c).any()) for a, c in zip(alerts, found, strict=True))
    for low, high in ((0, 1), (1, 2), (2, 3)):
        assert bool((found[low] | ~found[high]).all())
        assert bool((alerts[low] | ~alerts[high]).all())
    assert found[3].sum() < found[0].sum()
    assert alerts[3].sum() < alerts[0].sum()


@pytest.mark.parametrize("confidence", [0.0, 0.345])
def test_patchguard_pp_alerts_where_a_certified_answer_changes(confidence):
    defense = PatchGuardPlusPlus(scorer(), confidence, patch=2)
    batch = images(9, 50)
    clean = defense.certify(batch)
    caught = 0
    for index in clean.certified.nonzero()[:, 0].tolist():
        changed = tiny.attacked(batch[index], 2)
        wrong = defense.predict(changed) != clean.prediction[index]
        assert bool(defense.alert(changed)[wrong].all())
        caught += int(wrong.sum())
    assert clean.certified.any()
    assert confidence > 0 or caught > 0


def test_patchguard_pp_scale_does_not_matter():
    """Confidence is of real scores, whatever integers they were rounded to."""
    fine, coarse = scorer(), scorer()
    coarse.scale = fine.scale / 4
    alerts = [PatchGuardPlusPlus(one, 0.34, patch=2).alert(images(30, 40)) for one in (fine, coarse)]
    assert (alerts[0] == alerts[1]).float().mean() > 0.9


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (PatchGuard, "1", "an exact share"),
        (PatchGuard, "-1/2", "an exact share"),
        (PatchGuard, "half", "an exact share"),
        (PatchGuardPlusPlus, -0.1, "at least 0 and below 1"),
        (PatchGuardPlusPlus, 1.0, "at least 0 and below 1"),
    ],
)
def test_thresholds_refused(kind, value, message):
    refused(UsageError, message, kind, scorer(), value)
