"""What every rule in the table keeps."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bagcert.data.preprocess import Preprocessing
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules import RULES, get_rule
from bagcert.rules.together import certify_together
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import refused

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
    refused(UsageError, "grid", rule.certify, score_map(), PatchThreatModel.parse("2", (8, 8)))


def test_the_table(rule):
    assert get_rule(rule.name) is rule
    assert rule.guarantee in ("recovery", "detection")
    assert rule.summary
    assert "\n" not in rule.summary


def test_an_unknown_rule_names_the_nearest_or_all():
    refused(UsageError, "unknown rule 'double_maskin'; did you mean double-masking", get_rule, "double_maskin")
    refused(
        UsageError, "unknown rule 'zzz'; choose from vote, levine-feizi, double-masking, detection", get_rule, "zzz"
    )


@pytest.mark.parametrize("patch", ["1", "2x3", "2+1x4", "9%", "2*2"])
def test_maps_of_many_sizes_together(rule, patch):
    """Photos of 24 sizes, some mirrored or turned, resized to one network input: one call per set of windows."""
    net = score_map(-5, 5, batch=60)
    random = np.random.default_rng(1)
    preprocessing = Preprocessing(GRID.image_size)
    shapes = [
        ((int(random.integers(9, 15)), int(random.integers(11, 15))), int(random.integers(1, 9))) for _ in net.scores
    ]
    divided = preprocessing.score_maps(net, shapes)
    assert sorted(i for _, members, _ in divided for i in members) == list(range(60))
    maps = [each for _, _, each in divided]
    threats = [PatchThreatModel.parse(patch, each.grid.image_size) for each in maps]
    calls = []
    certify = rule.certify

    def counted(scores, threat):
        calls.append(len(scores))
        return certify(scores, threat)

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(RULES, rule.name, replace(rule, certify=counted))
        found = certify_together(rule.name, maps, threats)
    assert sum(calls) == 60
    assert len(calls) < len(maps)
    for (shape, members, _), threat, together in zip(divided, threats, found, strict=True):
        for place, image in enumerate(members):
            alone = certify(preprocessing.geometry(*shape).score_map(net[image : image + 1]), threat)
            assert together.threat is threat
            assert (alone.rule, alone.locality) == (together.rule, together.locality)
            for name in ("prediction", "certified", "margin", "worst_placement"):
                assert torch.equal(getattr(alone, name)[0], getattr(together, name)[place]), name


def test_maps_with_a_slack_are_certified_together(rule):
    net = score_map(-5, 5)
    net = replace(net, slack=torch.ones_like(net.scores))
    divided = Preprocessing(GRID.image_size).score_maps(net, [((9 + i % 2, 11), 1) for i in range(len(net))])
    maps = [each for _, _, each in divided]
    threats = [PatchThreatModel.parse("1", each.grid.image_size) for each in maps]
    for each, threat, together in zip(maps, threats, certify_together(rule.name, maps, threats), strict=True):
        alone = rule.certify(each, threat)
        assert together.locality == "measured"
        assert torch.equal(alone.margin, together.margin)
        assert torch.equal(alone.worst_placement, together.worst_placement)


def test_no_map_is_no_certificate():
    assert certify_together("vote", [], []) == []
