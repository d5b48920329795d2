import pytest
import torch

from bagcert.aggregation import PRODUCT_LIMIT, AttentionPooling
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import refused
from tests.properties import pooling


def test_rules_agree_with_plain_integers_and_hold_under_attack():
    totals = pooling.count(150, seed=11)
    assert totals["certified"] > 40
    assert totals["disagreements"] == totals["broken_certificates"] == 0


def test_small_blocks_of_pairs_change_nothing(monkeypatch):
    monkeypatch.setattr("bagcert.rules.attention_masking.ROWS_AT_ONCE", 5)
    totals = pooling.count(60, seed=12)
    assert totals["certified"] > 15
    assert totals["disagreements"] == totals["broken_certificates"] == 0


def small_map():
    readout = AttentionPooling(
        torch.eye(2).int(), torch.zeros(2).int(), torch.eye(2).int(), torch.eye(2).int(), torch.zeros(2).int(), heads=1
    )
    scores = torch.ones(1, 3, 4, 4, dtype=torch.int32)
    return ScoreMap(scores, -PRODUCT_LIMIT, PRODUCT_LIMIT, RegionGrid.from_axis(2, 2, 0, (8, 8)), readout=readout)


@pytest.mark.parametrize("rule", ["vote", "levine-feizi", "robust-masking"])
def test_linear_rule_refused(rule):
    for ask in (RULES[rule].certify, RULES[rule].predict):
        refused(UsageError, "attention", ask, small_map(), PatchThreatModel.parse(2, (8, 8)))


def test_weight_out_of_range_refused():
    score_map = small_map()
    scores = score_map.scores.clone()
    scores[0, 2, 0, 0] = 0
    with pytest.raises(UsageError, match=r"attention weights must lie in \[1, 255\]"):
        ScoreMap(scores, score_map.low, score_map.high, score_map.grid, readout=score_map.readout)


def test_slack_refused():
    score_map = small_map()
    with pytest.raises(UsageError, match="exact"):
        ScoreMap(
            score_map.scores,
            score_map.low,
            score_map.high,
            score_map.grid,
            slack=torch.zeros_like(score_map.scores),
            readout=score_map.readout,
        )


def test_readout_that_could_round_refused():
    with pytest.raises(UsageError, match="exact below 2"):
        AttentionPooling(
            torch.full((1, 2), 40_000), torch.zeros(1).int(), torch.ones(2, 1).int(), torch.ones(2, 2).int(),
            torch.zeros(2).int(), heads=1,
        )  # fmt: skip


@pytest.mark.parametrize("rule", ["double-masking", "detection"])
def test_threads_change_nothing(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagcert.rules.attention_masking.ROWS_AT_ONCE", 40)
    generator = torch.Generator().manual_seed(3)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, dtype=torch.int32)

    readout = AttentionPooling(
        draw(-90, 90, 5, 4), draw(-90, 90, 5), draw(-90, 90, 3, 5), draw(-90, 90, 3, 4), draw(-90, 90, 3), heads=2
    )
    scores = torch.cat([draw(-9000, 9000, 30, 4, 4, 4), draw(1, 200, 30, 2, 4, 4)], 1)
    grid = RegionGrid.from_axis(2, 2, 0, (8, 8))
    score_map = ScoreMap(scores, -PRODUCT_LIMIT, PRODUCT_LIMIT, grid, readout=readout)
    threat, before, results = PatchThreatModel.parse(2, (8, 8)), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            certificate = RULES[rule].certify(score_map, threat)
            predicted = RULES[rule].predict(score_map, threat)
            assert torch.get_num_threads() == threads
            results.append((certificate.prediction, certificate.margin, certificate.worst_placement, predicted))
    finally:
        torch.set_num_threads(before)
    assert 0 < int((results[0][1] >= 0).sum()) < 30
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
