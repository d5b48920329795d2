"""The double-masking theorem (docs/method.md, "Double masking") in the abstract, proved by z3 for all tables of labels.

A table holds the label of every pair of masks, `table[i][j] = y(m_i, m_j)`, the first round on its diagonal; 0 ... 2
are labels and -1 is none (nothing is left). On a certified image the whole table is the answer. The attacker changes
everything but what the mask over the patch hides: the row and column of some m*. Nothing else about images, scores or
geometry is used, so that the proof holds for any masked predictor. The prediction procedure written here is tied to the
real code by running both on maps.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from bagcert.grid import RegionGrid
from bagcert.rules.double_masking import double_masking_prediction
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle

z3 = pytest.importorskip("z3")

MASKS, CLASSES, NO_LABEL = 5, 3, -1
LABELS = range(CLASSES)
Table = list[list]


def free_table(name: str, masks: int = MASKS, least: int = 0) -> tuple[Table, object]:
    """Symbols for a symmetric table, and their bounds."""
    symbol = {(i, j): z3.Int(f"{name}_{i}_{j}") for i in range(masks) for j in range(i, masks)}
    table = [[symbol[min(i, j), max(i, j)] for j in range(masks)] for i in range(masks)]
    return table, z3.And(*(z3.And(least <= s, s < CLASSES) for s in symbol.values()))


def majority(first: list):
    """The most frequent label, the lowest among equals."""
    counts = [z3.Sum([z3.If(label == c, 1, 0) for label in first]) for c in LABELS]
    best, most = z3.IntVal(0), counts[0]
    for c in LABELS[1:]:
        best, most = z3.If(counts[c] > most, c, best), z3.If(counts[c] > most, counts[c], most)
    return best


def keeps_its_label(table: Table, i: int):
    return z3.And(*(table[i][j] == table[i][i] for j in range(len(table))))


def prediction(table: Table, common=None, passes: Callable[[Table, int], object] = keeps_its_label):
    """The deployed answer, from the definition; `common` stands for the majority if given."""
    first = [table[i][i] for i in range(len(table))]
    common = majority(first) if common is None else common
    answer = common
    for i in reversed(range(len(table))):  # the first that passes is asked last, and so has the last word
        disagrees = z3.And(first[i] != common, first[i] != NO_LABEL)
        answer = z3.If(z3.And(disagrees, passes(table, i)), first[i], answer)
    return z3.If(z3.And(*(label == first[0] for label in first)), first[0], answer)


def hidden(clean: Table, attacked: Table, star: int):
    """The mask over the patch leaves of the attacked image what it leaves of the clean one."""
    return z3.And(*(attacked[star][j] == clean[star][j] for j in range(len(clean))))


def every_pair_says(table: Table, label):
    return z3.And(*(entry == label for row in table for entry in row))


def counterexample(*claims):
    """A model of the claims, or None where there is none."""
    solver = z3.Solver()
    solver.add(*claims)
    answer = solver.check()
    assert answer != z3.unknown
    return solver.model() if answer == z3.sat else None


# ---------------------------------------------------------------- the theorem


@pytest.mark.parametrize("masks", [1, 2, 3, 4, 5])
def test_no_attacked_table_changes_a_certified_answer(masks):
    label = z3.Int("label")
    clean, _ = free_table("clean", masks)
    attacked, bounds = free_table("attacked", masks)
    assumed = [every_pair_says(clean, label), label >= 0, label < CLASSES, bounds]
    for star in range(masks):
        assert counterexample(*assumed, hidden(clean, attacked, star), prediction(attacked) != label) is None


def test_the_proof_does_not_need_the_majority():
    """Whatever label of the first round counts as common: so a tie among them can break no certificate."""
    label, common = z3.Ints("label common")
    clean, _ = free_table("clean")
    attacked, bounds = free_table("attacked")
    some_first = z3.Or(*(common == attacked[i][i] for i in range(MASKS)))
    for star in range(MASKS):
        claims = [every_pair_says(clean, label), bounds, hidden(clean, attacked, star), some_first]
        assert counterexample(*claims, prediction(attacked, common) != label) is None


def test_at_most_one_label_passes():
    """Two masks with different labels cannot both pass: their pair has one label, attacked or not."""
    table, bounds = free_table("table")
    for i in range(MASKS):
        for j in range(i):
            both = z3.And(keeps_its_label(table, i), keeps_its_label(table, j))
            assert counterexample(bounds, both, table[i][i] != table[j][j]) is None


def test_three_cases_exhaust_the_attacks():
    attacked, bounds = free_table("attacked")
    first = [attacked[i][i] for i in range(MASKS)]
    star, label = 0, 1
    covered = z3.And(*(attacked[star][j] == label for j in range(MASKS)))
    agree = z3.And(*(f == first[0] for f in first))
    right = majority(first) == label
    cases = [agree, z3.And(z3.Not(agree), right), z3.And(z3.Not(agree), z3.Not(right))]
    assert counterexample(bounds, covered, z3.Not(z3.Or(*cases))) is None
    for case in cases:
        assert counterexample(bounds, covered, case) is not None


# ---------------------------------------------------------------- sloppy versions


def most_agree(table: Table, i: int):
    return 2 * z3.Sum([z3.If(entry == table[i][i], 1, 0) for entry in table[i]]) > len(table)


def later_masks_agree(table: Table, i: int):
    return z3.And(*(table[i][j] == table[i][i] for j in range(i, len(table))))


def all_but_the_last_agree(table: Table, i: int):
    return z3.And(*(table[i][j] == table[i][i] for j in range(len(table) - 1)))


def empty_counts_as_agreement(table: Table, i: int):
    return z3.And(*(z3.Or(entry == table[i][i], entry == NO_LABEL) for entry in table[i]))


@pytest.mark.parametrize(
    "passes",
    [
        lambda table, i: z3.BoolVal(True),
        lambda table, i: z3.BoolVal(False),
        most_agree,
        later_masks_agree,
        all_but_the_last_agree,
    ],
    ids=["no second round", "nobody passes", "most second masks", "later masks only", "missing last mask"],
)
def test_a_sloppy_second_round_is_refuted(passes):
    attacked, bounds = free_table("attacked")
    found = [
        counterexample(bounds, *(attacked[star][j] == 1 for j in range(MASKS)), prediction(attacked, None, passes) != 1)
        for star in range(MASKS)
    ]
    assert any(model is not None for model in found)


@pytest.mark.parametrize(
    "checked",
    [
        lambda i, j, star: i == j,
        lambda i, j, star: i != j,
        lambda i, j, star: star not in (i, j),
        lambda i, j, star: i == j or abs(i - j) > 1,
    ],
    ids=["the first round only", "pairs only", "a placement no mask covers", "disjoint masks only"],
)
def test_a_sloppy_certificate_is_refuted(checked):
    """Agreement of only a part of the clean table is not enough."""
    clean, clean_bounds = free_table("clean")
    attacked, bounds = free_table("attacked")
    star = MASKS - 1
    agree = [clean[i][j] == 1 for i in range(MASKS) for j in range(MASKS) if checked(i, j, star)]
    claims = [clean_bounds, bounds, *agree, prediction(clean) == 1, hidden(clean, attacked, star)]
    assert counterexample(*claims, prediction(attacked) != 1) is not None


@pytest.mark.parametrize("passes", [keeps_its_label, empty_counts_as_agreement], ids=["deployed", "lenient prediction"])
def test_an_empty_remainder_counted_as_agreement_is_refuted(passes):
    """A pair that leaves nothing has no label, clean or attacked alike, and must count as disagreement."""
    clean, clean_bounds = free_table("clean", least=NO_LABEL)
    attacked, bounds = free_table("attacked", least=NO_LABEL)
    cells = [(i, j) for i in range(MASKS) for j in range(i, MASKS)]
    lenient = [z3.Or(clean[i][j] == 1, z3.And(clean[i][j] == NO_LABEL, i != j)) for i, j in cells]
    same_geometry = [(clean[i][j] == NO_LABEL) == (attacked[i][j] == NO_LABEL) for i, j in cells]
    claims = [clean_bounds, bounds, *same_geometry, *lenient, hidden(clean, attacked, MASKS - 1)]
    answer = prediction(attacked, None, passes)
    assert counterexample(*claims, answer != 1) is not None
    assert counterexample(*claims, answer != 1, *(clean[i][j] != NO_LABEL for i, j in cells)) is None


def test_a_majority_tie_is_settled_by_the_lowest_label():
    """What breaks no proof still changes answers: with the tie settled the other way the procedure is another one."""
    attacked, bounds = free_table("attacked")
    first = [attacked[i][i] for i in range(MASKS)]
    counts = [z3.Sum([z3.If(label == c, 1, 0) for label in first]) for c in LABELS]
    highest = z3.If(counts[2] >= counts[1], z3.If(counts[2] >= counts[0], 2, 0), z3.If(counts[1] >= counts[0], 1, 0))
    tie = counterexample(bounds, prediction(attacked, highest) != prediction(attacked))
    assert tie is not None
    values = [tie.eval(label, model_completion=True).as_long() for label in first]
    assert sorted(map(values.count, set(values)))[-2:] == [2, 2]


# ---------------------------------------------------------------- the procedure proved is the procedure deployed


def test_the_proved_procedure_is_the_deployed_one():
    grid = RegionGrid.from_axis(1, 1, 0, (1, MASKS))
    masks = [mask[None] for mask in np.eye(MASKS, dtype=bool)]
    maps = np.random.default_rng(0).integers(0, 5, (150, CLASSES, 1, MASKS)).astype(np.int16)
    threat = PatchThreatModel.parse(1, grid.image_size)
    deployed = double_masking_prediction(ScoreMap(torch.as_tensor(maps), 0, 9, grid), threat).tolist()
    table, _ = free_table("table")
    answer = prediction(table)
    disagreements = 0
    for scores, label in zip(maps, deployed, strict=True):
        found = [[oracle.masked_prediction(scores, a | b) for b in masks] for a in masks]
        disagreements += len({found[i][i] for i in range(MASKS)}) > 1
        values = [(table[i][j], z3.IntVal(found[i][j])) for i in range(MASKS) for j in range(i, MASKS)]
        assert z3.simplify(z3.substitute(answer, *values)).as_long() == label
    assert disagreements > 50
