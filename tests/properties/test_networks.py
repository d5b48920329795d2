"""Networks at random: what is accepted keeps to its derived geometry."""

import pytest

from bagcert.errors import BagcertError
from bagcert.nets.region_scorer import RegionScorer
from tests import refused
from tests.properties.escapes import STATISTICS
from tests.properties.networks import CLASSES, SIZE, Program, count, leaks

pytestmark = pytest.mark.filterwarnings("ignore")


def test_no_accepted_network_leaks():
    totals = count(60, seed=1)
    assert totals["cases"] == totals["accepted"] + totals["refused"] == 60
    assert totals["accepted"] > 15
    assert totals["refused"] > 15
    assert (totals["leaks"], totals["crashed"], totals["changed"]) == (0, 0, 0)


def accepted():
    """A local network, and its scorer."""
    for seed in range(40):
        program = Program(seed)
        try:
            return program, RegionScorer.from_module(program, CLASSES, SIZE)
        except BagcertError:
            continue
    raise AssertionError("no network is accepted")


@pytest.mark.parametrize("name", ["as_subclass", "numpy", "thread", "large batch"])
def test_the_attack_finds_what_reaches_across_the_map(name):
    """As if a network had been accepted that is refused."""
    program, scorer = accepted()
    assert not any(leaks(scorer, program, seed) for seed in range(3))
    program.thresholds.append(0.5)
    program.statements.append(lambda maps: maps[-1] * (STATISTICS[name](maps[0]) > 0.5))
    assert any(leaks(scorer, program, seed) for seed in range(3))
    refused(BagcertError, None, RegionScorer.from_module, program, CLASSES, SIZE)
