import numpy as np
import pytest
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
    assert found.worst_placement.tolist() == [[[0, 0, 1, 1]]]
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
        assert found.worst_placement.shape == (0, 1, 4)


def test_a_fixed_point_map_of_the_largest_span():
    grid = RegionGrid.from_axis(1, 1, 0, (40, 40))  # 1,600 regions: sums beyond float32
    scores = torch.full((1, 2, 40, 40), -2047, dtype=torch.int16)
    scores[0, 1] = 2047
    scores[0, 1, 0, 0] = 2046
    found = vote(ScoreMap(scores, -2047, 2047, grid), PatchThreatModel.parse(1, (40, 40)))
    assert found.margin.item() == 1600 * 4094 - 1 - 2 * 4094 - 1


def test_the_worst_placement_is_where_most_can_be_taken():
    """Class 1 holds every region but one, the last: elsewhere a patch takes 1 from the lead, there 2."""
    found = vote(score_map(12, 11), PatchThreatModel.parse(1, (3, 4)))
    assert (found.prediction.item(), found.margin.item()) == (0, -1)
    assert found.worst_placement.tolist() == [[[2, 3, 1, 1]]]


@pytest.mark.parametrize("label", [0, 1])
def test_sums_beyond_float32(label):
    """A lead of one unit in fifty million, which float32 cannot tell from a tie."""
    high = 2**22
    scores = torch.full((1, 2, 3, 4), high)
    scores[0, 1 - label, 0, 0] -= 1
    found = vote(ScoreMap(scores, 0, high, GRID), PatchThreatModel.parse(1, (3, 4)))
    assert (found.prediction.item(), found.margin.item()) == (label, 1 - (high + 1) - label)
    assert levine_feizi(ScoreMap(scores, 0, high, GRID), PatchThreatModel.parse(1, (3, 4))).prediction.item() == label


def test_the_most_dangerous_rival_need_not_be_the_runner_up():
    """Class 1 is nearer in sum, but holds something everywhere; class 2 has regions left to win."""
    scores = torch.tensor([[3] * 12, [2] * 12, [3] * 7 + [2] + [0] * 4]).reshape(1, 3, 3, 4)
    found = vote(ScoreMap(scores, 0, 3, GRID), PatchThreatModel.parse(1, (3, 4)))
    assert (found.prediction.item(), found.margin.item()) == (0, (36 - 23) - (3 + 3))  # 8 against the runner-up
    assert found.worst_placement.tolist() == [[[2, 0, 1, 1]]]


def test_placements_that_are_not_allowed_cost_nothing():
    """From the corner a patch reaches four regions of the padded map, elsewhere up to nine."""
    grid = RegionGrid.from_axis(3, 1, -1, (5, 5))
    allowed = np.zeros((5, 5), dtype=bool)
    allowed[0, 0] = True
    scores = torch.zeros(1, 2, 5, 5, dtype=torch.int16)
    scores[0, 0] = 1
    for rule in (vote, levine_feizi):
        found = rule(ScoreMap(scores, 0, 1, grid), PatchThreatModel((5, 5), ((1, 1),), 1, allowed))
        assert found.margin.item() == 25 - 2 * 4
        assert found.worst_placement.tolist() == [[[0, 0, 1, 1]]]


def test_counting_regions_by_hand():
    """The largest reach is in the middle of the padded map, and two patches count twice."""
    grid = RegionGrid.from_axis(3, 1, -1, (5, 5))
    scores = torch.zeros(1, 2, 5, 5, dtype=torch.int16)
    scores[0, 1] = 3
    score_map = ScoreMap(scores, 0, 3, grid)
    assert levine_feizi(score_map, PatchThreatModel.parse(1, (5, 5))).margin.item() == 75 - 1 - 2 * 3 * 9
    assert levine_feizi(score_map, PatchThreatModel.parse("2*1", (5, 5))).margin.item() == 75 - 1 - 2 * 3 * 2 * 9
