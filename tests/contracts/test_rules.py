"""What every rule in the table keeps."""

import numpy as np
import pytest
import torch

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules import RULES, get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

GRID = RegionGrid.from_axis(3, 2, -1, (9, 11))
THREATS = ["1", "2x3", "2+1x4", "area:4", "3*4"]


def score_map(low: int = 0, high: int = 1, batch: int = 6) -> ScoreMap:
    generator = np.random.default_rng(0)
    scores = generator.integers(low, high + 1, (batch, 4, *GRID.map_size))
    scores[: batch // 2, 2] = high
    return ScoreMap(torch.as_tensor(scores.astype(np.int32)), low, high, GRID)


@pytest.fixture(params=list(RULES))
def rule(request):
    return RULES[request.param]


@pytest.mark.parametrize("patch", THREATS)
@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2047, 2047), (5, 9)])
def test_certificate_and_prediction_agree(rule, patch, low, high):
    scores = score_map(low, high)
    threat = PatchThreatModel.parse(patch, GRID.image_size)
    found = rule.certify(scores, threat)
    assert (found.rule, found.threat) == (rule.name, threat)
    assert found.prediction.dtype == found.margin.dtype == found.worst_placement.dtype == torch.int64
    assert torch.equal(found.prediction, rule.predict(scores, threat))
    assert torch.equal(found.certified, found.margin >= 0)
    assert found.worst_placement.ndim == 3
    assert found.worst_placement.shape[1] in (threat.patches, 2 * threat.patches)
    placement = found.worst_placement.reshape(-1, 4)
    assert bool((placement[:, :2] >= 0).all())
    assert bool((placement[:, :2] + placement[:, 2:] <= torch.tensor(GRID.image_size)).all())
    assert {tuple(shape) for shape in placement[:, 2:].tolist()} <= set(threat.shapes)


def test_something_is_certified(rule):
    assert rule.certify(score_map(), PatchThreatModel.parse("1", GRID.image_size)).certified[:3].all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
def test_every_integer_type(rule, dtype):
    threat = PatchThreatModel.parse("2", GRID.image_size)
    scores = score_map()
    other = ScoreMap(scores.scores.to(dtype), 0, 1, GRID)
    assert torch.equal(rule.certify(other, threat).margin, rule.certify(scores, threat).margin)


def test_inputs_are_left_alone_and_autocast_does_not_matter(rule):
    threat = PatchThreatModel.parse("2", GRID.image_size)
    scores = score_map(-2047, 2047)
    before = scores.scores.clone()
    plain = rule.certify(scores, threat)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = rule.certify(scores, threat)
    assert torch.equal(scores.scores, before)
    assert torch.equal(plain.margin, cast.margin)
    assert not plain.margin.requires_grad


def test_a_threat_for_another_image_size_is_refused(rule):
    with pytest.raises(UsageError, match="grid"):
        rule.certify(score_map(), PatchThreatModel.parse("2", (8, 8)))


def test_the_table(rule):
    assert get_rule(rule.name) is rule
    assert rule.guarantee in ("recovery", "detection")
    assert rule.summary
    assert "\n" not in rule.summary


def test_an_unknown_rule_names_the_nearest_or_all():
    with pytest.raises(UsageError, match="no rule 'double_maskin'; did you mean double-masking"):
        get_rule("double_maskin")
    with pytest.raises(UsageError, match="no rule 'zzz'; there are vote, levine-feizi, double-masking, detection"):
        get_rule("zzz")
