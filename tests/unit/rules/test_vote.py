import torch

from bagcert.grid import RegionGrid
from bagcert.rules.levine_feizi import levine_feizi
from bagcert.rules.vote import vote
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

GRID = RegionGrid.from_axis(1, 1, 0, (3, 4))  # one region per pixel


def score_map(*ones: int, high: int = 1) -> ScoreMap:
    """Class c has `ones[c]` regions at `high`, the first in reading order."""
    scores = torch.zeros(1, len(ones), 12, dtype=torch.int16)
    for c, count in enumerate(ones):
        scores[0, c, :count] = high
    return ScoreMap(scores.reshape(1, len(ones), 3, 4), 0, high, GRID)


def test_the_margin_by_hand():
    # 12 against 0: a 1x1 patch takes 2 of the lead (its own vote lost, the rival's won)
    found = vote(score_map(12, 0), PatchThreatModel.parse(1, (3, 4)))
    assert (found.prediction.item(), found.margin.item(), found.certified.item()) == (0, 10, True)
    assert found.worst_placement.tolist() == [[0, 0, 1, 1]]
    assert levine_feizi(score_map(12, 0), PatchThreatModel.parse(1, (3, 4))).margin.item() == 10
    assert vote(score_map(12, 0), PatchThreatModel.parse("2x3", (3, 4))).margin.item() == 0
    assert vote(score_map(0, 12), PatchThreatModel.parse("2x3", (3, 4))).margin.item() == -1  # class 0 wins the tie


def test_two_patches_cost_the_two_largest_damages():
    found = vote(score_map(12, 0), PatchThreatModel.parse("2*1", (3, 4)))
    assert found.margin.item() == 8
    assert found.worst_placement.tolist() == [[[0, 0, 1, 1], [0, 1, 1, 1]]]


def test_fewer_windows_than_patches():
    found = vote(score_map(12, 0), PatchThreatModel.parse("3*3x4", (3, 4)))
    assert found.margin.item() == -12
    assert found.worst_placement.tolist() == [[[0, 0, 3, 4]] * 3]


def test_ties_go_to_the_lowest_class():
    found = vote(score_map(3, 5, 5), PatchThreatModel.parse(1, (3, 4)))
    assert found.prediction.item() == 1
    assert found.margin.item() < 0


def test_an_empty_batch():
    empty = ScoreMap(torch.zeros(0, 3, 3, 4, dtype=torch.int16), 0, 1, GRID)
    for rule in (vote, levine_feizi):
        found = rule(empty, PatchThreatModel.parse(1, (3, 4)))
        assert len(found) == 0
        assert found.worst_placement.shape == (0, 4)


def test_a_fixed_point_map_of_the_largest_span():
    grid = RegionGrid.from_axis(1, 1, 0, (40, 40))  # 1,600 regions: sums beyond float32
    scores = torch.full((1, 2, 40, 40), -2047, dtype=torch.int16)
    scores[0, 1] = 2047
    scores[0, 1, 0, 0] = 2046
    found = vote(ScoreMap(scores, -2047, 2047, grid), PatchThreatModel.parse(1, (40, 40)))
    assert found.margin.item() == 1600 * 4094 - 1 - 2 * 4094 - 1
