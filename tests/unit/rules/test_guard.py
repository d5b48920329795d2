"""Certificates from scores that may be a little off, by hand."""

import pytest
import torch

from bagcert.grid import RegionGrid
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

GRID = RegionGrid.from_axis(1, 1, 0, (1, 5))
THREAT = PatchThreatModel.parse(1, GRID.image_size)


def row(own: list[int], rival: list[int], slack: list[int] | None) -> ScoreMap:
    """Two classes with the same slack."""
    loose = None if slack is None else torch.tensor([[[slack], [slack]]])
    return ScoreMap(torch.tensor([[[own], [rival]]]), 0, 9, GRID, loose)


def test_slack_lowers_the_label_and_raises_its_rivals():
    own, rival = [3, 3, 3, 3, 3], [0, 0, 0, 0, 0]
    exact = RULES["vote"].certify(row(own, rival, None), THREAT)
    assert (int(exact.margin[0]), exact.locality) == (15 - (9 + 3), "exact")
    found = RULES["vote"].certify(row(own, rival, [1, 0, 1, 0, 0]), THREAT)
    assert (int(found.margin[0]), found.locality) == (13 - 2 - (9 + 3), "measured")
    assert not bool(found.certified[0])
    found = RULES["double-masking"].certify(row(own, rival, [1, 0, 1, 0, 0]), THREAT)
    assert int(found.margin[0]) == 13 - 2 - (3 + 3)


@pytest.mark.parametrize("rule", RULES)
def test_a_label_that_slack_can_turn_is_kept_but_not_certified(rule):
    """On the worst map the other class is certified: that says nothing of this label."""
    found = RULES[rule].certify(row([9, 9, 9, 9, 9], [0, 0, 0, 0, 0], [9, 9, 9, 9, 9]), THREAT)
    assert (int(found.prediction[0]), bool(found.certified[0])) == (0, False)
    assert int(found.margin[0]) == -1
