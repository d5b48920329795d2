"""Detection by confident masks against plain loops, and at the very threshold."""

import math

import numpy as np
import pytest
import torch

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules.confident_detection import ROUNDING, alerts, confident_detection
from bagcert.rules.detection import detection
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle, refused
from tests.properties.cases import attacked, build, from_generator

SCALE = 3.0


def masked_confidence(scores: np.ndarray, mask: np.ndarray) -> tuple[int, float]:
    """(label, softmax of the mean real scores at it) of what a mask leaves."""
    means = [float(scores[c][~mask].sum()) / (SCALE * (~mask).sum()) for c in range(len(scores))]
    label = oracle.masked_prediction(scores, mask)
    return label, 1 / sum(math.exp(mean - means[label]) for mean in means)


def expected(scores: np.ndarray, masks: list[np.ndarray], confidence: float) -> tuple[bool, bool]:
    """(certified, alert) from the definitions."""
    plain = oracle.plain_prediction(scores)
    if any(mask.all() for mask in masks):
        return False, True
    found = [masked_confidence(scores, mask) for mask in masks]
    certified = all(label == plain and sure >= confidence for label, sure in found)
    return certified, any(label != plain and sure >= confidence for label, sure in found)


@pytest.mark.parametrize("confidence", [0.3, 0.55, 0.9])
def test_equals_the_definitions_under_attack(confidence):
    choose = from_generator(np.random.default_rng(int(100 * confidence)))
    seen = {"certified": 0, "alert": 0, "neither": 0, "caught": 0}
    for number in range(40):
        case = build(choose)
        found = confident_detection(case.score_map, case.threat, confidence=confidence, scale=SCALE)
        raised = alerts(case.score_map, case.threat, confidence=confidence, scale=SCALE)
        assert torch.equal(found.prediction, case.score_map.predict())
        assert torch.equal(found.certified, found.margin >= 0)
        for image, scores in enumerate(case.scores):
            certified, alert = expected(scores, case.masks, confidence)
            assert (bool(found.certified[image]), bool(raised[image])) == (certified, alert)
            seen["certified"] += certified
            seen["alert"] += alert
            seen["neither"] += not (certified or alert)
            if certified and number % 2:
                maps = case.with_scores(attacked(case, image, limit=64, most=600))
                changed = maps.predict() != found.prediction[image]
                assert bool(alerts(maps, case.threat, confidence=confidence, scale=SCALE)[changed].all())
                seen["caught"] += int(changed.sum())
    assert seen["certified"] > 3
    assert seen["alert"] > 3
    assert seen["neither"] > 0
    assert confidence > 0.5 or seen["caught"] > 0


def test_without_a_threshold_it_is_detection():
    choose = from_generator(np.random.default_rng(4))
    for _ in range(15):
        case = build(choose)
        found, plain = (rule(case.score_map, case.threat) for rule in (confident_detection, detection))
        assert torch.equal(found.margin, plain.margin)
        assert found.rule == plain.rule == "detection"
        raised = alerts(case.score_map, case.threat)
        assert raised.tolist() == [oracle.alert(scores, case.masks) for scores in case.scores]
        assert torch.equal(raised, ~plain.certified)


def test_threshold_itself_raises_an_alert():
    """Both comparisons give `ROUNDING` away, so that no rounding can let an attack pass between them."""
    grid = RegionGrid.from_axis(1, 1, 0, (1, 4))
    threat = PatchThreatModel((1, 4), ((1, 1),))
    own = ScoreMap(torch.tensor([[[[3, 3, 3, 3]], [[0, 0, 0, 0]]]]), 0, 9, grid)
    sure = 1 / (1 + math.exp(-3 / SCALE))
    assert confident_detection(own, threat, confidence=sure - 2 * ROUNDING, scale=SCALE).margin.item() == 9
    assert confident_detection(own, threat, confidence=sure, scale=SCALE).margin.item() == -1
    other = ScoreMap(torch.tensor([[[[9, 0, 0, 0]], [[2, 2, 2, 2]]]]), 0, 9, grid)
    sure = 1 / (1 + math.exp(-2 / SCALE))  # without the first region
    assert alerts(other, threat, confidence=sure, scale=SCALE).item()
    assert alerts(other, threat, confidence=sure + ROUNDING / 2, scale=SCALE).item()
    assert not alerts(other, threat, confidence=sure + 2 * ROUNDING, scale=SCALE).item()


def test_slack_counts_for_the_attacker():
    grid = RegionGrid.from_axis(1, 1, 0, (1, 4))
    threat = PatchThreatModel((1, 4), ((1, 1),))
    scores = torch.tensor([[[[3, 3, 3, 3]], [[0, 0, 0, 0]]]])
    sure = 1 / (1 + math.exp(-1 / SCALE))  # 2 against 1
    loose = ScoreMap(scores, 0, 9, grid, torch.ones_like(scores))
    found = confident_detection(loose, threat, confidence=sure - 1e-6, scale=SCALE)
    assert (found.margin.item(), found.locality) == (3, "measured")
    assert not confident_detection(loose, threat, confidence=sure + 1e-6, scale=SCALE).certified.item()


@pytest.mark.parametrize(
    ("confidence", "scale"), [(-0.1, 1.0), (1.0, 1.0), (math.nan, 1.0), (0.5, 0.0), (0.5, math.inf)]
)
def test_values_out_of_range_are_refused(confidence, scale):
    grid = RegionGrid.from_axis(1, 1, 0, (1, 4))
    scores = ScoreMap(torch.zeros(1, 2, 1, 4, dtype=torch.int16), 0, 1, grid)
    threat = PatchThreatModel((1, 4), ((1, 1),))
    for function in (confident_detection, alerts):
        refused(UsageError, "must be", function, scores, threat, confidence=confidence, scale=scale)
