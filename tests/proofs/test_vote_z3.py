"""The vote certificate with its tie rule, proved by z3 for all counts at ten classes.

One placement l and its window R(l) of n regions is one sentence about integers. For every class c let
`outside[c]` be the sum over all regions outside the window, `inside[c]` the clean sum within it and `attacked[c]`
what the attacker makes of the latter: any integer between n * low and n * high, for each class on its own. With
u = high - low the certificate's margin (docs/method.md, "Vote") against c is

    T_c - sum over R(l) of (u + s_y - s_c) - 1[c < y]
        = (outside[y] + inside[y] - outside[c] - inside[c]) - (n * u + inside[y] - inside[c]) - 1[c < y]

The margin of an image is the least over placements and classes, so that a proof for one placement is one for all.
Wherever n, low and high are symbols, n * low and n * high are replaced by any two integers `least` <= `most`, which
include them. Sloppy versions must be refuted, by an image that breaks them on the real code too.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from bagcert.grid import RegionGrid
from bagcert.rules.vote import vote
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle

z3 = pytest.importorskip("z3")

CLASSES = 10
LABELS = range(CLASSES)


@dataclass(frozen=True)
class Window:
    """The symbols of one image and one placement; `label` is the prediction whose certificate is in question."""

    label: int
    least: object
    most: object
    outside: list
    inside: list

    @classmethod
    def of(cls, label: int) -> "Window":
        sums = [[z3.Int(f"{name}{c}") for c in LABELS] for name in ("outside", "inside")]
        return cls(label, z3.Int("least"), z3.Int("most"), *sums)

    @property
    def clean(self) -> list:
        return [outside + inside for outside, inside in zip(self.outside, self.inside, strict=True)]

    @property
    def rivals(self) -> list[int]:
        return [c for c in LABELS if c != self.label]

    @property
    def in_range(self):
        return z3.And(self.least <= self.most, *(z3.And(self.least <= s, s <= self.most) for s in self.inside))

    def attack(self) -> tuple[list, object]:
        """The sums an attack leads to, any at all, and what bounds them."""
        content = [z3.Int(f"attacked{c}") for c in LABELS]
        bounds = z3.And(*(z3.And(self.least <= a, a <= self.most) for a in content))
        return [outside + a for outside, a in zip(self.outside, content, strict=True)], bounds

    def worst_attack(self, rival: int) -> list:
        """The sums after everything under the patch speaks for one rival."""
        return [outside + (self.most if c == rival else self.least) for c, outside in enumerate(self.outside)]


def wins(sums: list, label: int):
    """The one tie rule: `label` is the lowest index of the largest sum."""
    return z3.And(*(sums[label] > sums[c] if c < label else sums[label] >= sums[c] for c in LABELS if c != label))


def lead(w: Window, c: int):
    return w.clean[w.label] - w.clean[c]


def damage(w: Window, c: int):
    """Sum over the window of u + s_y - s_c, where n * u = most - least."""
    return w.most - w.least + w.inside[w.label] - w.inside[c]


def margin(w: Window, c: int):
    return lead(w, c) - damage(w, c) - (1 if c < w.label else 0)


def certified(w: Window):
    return z3.And(*(margin(w, c) >= 0 for c in w.rivals))


def impossible(*claims) -> bool:
    """No integers at all satisfy the claims."""
    solver = z3.Solver()
    solver.add(*claims)
    answer = solver.check()
    assert answer != z3.unknown
    return answer == z3.unsat


# ---------------------------------------------------------------- the proof


@pytest.mark.parametrize("label", LABELS)
def test_no_attack_changes_a_certified_vote(label):
    w = Window.of(label)
    sums, bounds = w.attack()
    assert impossible(w.in_range, certified(w), bounds, z3.Not(wins(sums, label)))
    assert impossible(w.in_range, certified(w), z3.Not(wins(w.clean, label)))  # it is the prediction to begin with


@pytest.mark.parametrize("label", LABELS)
def test_worst_attack_changes_uncertified_votes(label):
    """Exactness: where the margin against a rival is negative, the content that shouts for it wins."""
    w = Window.of(label)
    for rival in w.rivals:
        assert impossible(w.in_range, margin(w, rival) < 0, wins(w.worst_attack(rival), label))
        content = [w.most if c == rival else w.least for c in LABELS]
        in_range = z3.And(*(z3.And(w.least <= a, a <= w.most) for a in content))
        assert impossible(w.in_range, z3.Not(in_range))  # and the attacker can write it


def test_certificates_and_attackable_votes_both_exist():
    """The sentences above are not true for want of an example."""
    w = Window.of(3)
    sums, bounds = w.attack()
    assert not impossible(w.in_range, certified(w), w.least < w.most)
    assert not impossible(w.in_range, wins(w.clean, 3), bounds, z3.Not(wins(sums, 3)))


def test_symbols_stand_for_every_range():
    """n regions within [low, high] sum to n * low ... n * high, and n * u is the difference of the two."""
    n, low, high = z3.Ints("n low high")
    assert impossible(n * (high - low) != n * high - n * low)
    for regions in range(1, 6):
        scores = [z3.Int(f"s{k}") for k in range(regions)]
        bounded = z3.And(*(z3.And(low <= s, s <= high) for s in scores))
        assert impossible(bounded, z3.Not(z3.And(regions * low <= sum(scores), sum(scores) <= regions * high)))


def test_a_larger_window_never_has_a_larger_margin():
    """Maximal windows suffice: what a window has more than another costs u + s_y - s_c >= 0 in each region."""
    low, high, own, other = z3.Ints("low high own other")
    assert impossible(low <= own, own <= high, low <= other, other <= high, high - low + own - other < 0)


def test_union_costs_at_most_the_sum_of_damages():
    """K patches: with damages per part that are never negative, counting an overlap twice only helps the attacker."""
    first_only, both, second_only, total = z3.Ints("first_only both second_only total")
    parts = z3.And(first_only >= 0, both >= 0, second_only >= 0)
    bound = total - ((first_only + both) + (both + second_only))
    assert impossible(parts, bound >= 0, total - (first_only + both + second_only) < 0)


# ---------------------------------------------------------------- sloppy versions


def runner_up(w: Window, c: int):
    """No other rival has a larger clean sum, nor as large a one and a lower index."""
    return z3.And(*(w.clean[c] > w.clean[o] if o < c else w.clean[c] >= w.clean[o] for o in w.rivals if o != c))


def every(claim: Callable[[Window, int], object]) -> Callable[[Window], object]:
    return lambda w: z3.And(*(claim(w, c) for c in w.rivals))


SLOPPY = {
    "a tie counts as a win": every(lambda w, c: lead(w, c) - damage(w, c) >= 0),
    "ties to the wrong side": every(lambda w, c: lead(w, c) - damage(w, c) - (1 if c > w.label else 0) >= 0),
    "one unit too generous": every(lambda w, c: margin(w, c) >= -1),
    "the runner-up only": every(lambda w, c: z3.Implies(runner_up(w, c), margin(w, c) >= 0)),
    "u halved": every(lambda w, c: 2 * margin(w, c) + (w.most - w.least) >= 0),
    "u forgotten": every(lambda w, c: margin(w, c) + (w.most - w.least) >= 0),
    "what the rival can still win forgotten": every(
        lambda w, c: lead(w, c) - (w.inside[w.label] - w.least) - (1 if c < w.label else 0) >= 0
    ),
    "what the label can still lose forgotten": every(
        lambda w, c: lead(w, c) - (w.most - w.inside[c]) - (1 if c < w.label else 0) >= 0
    ),
    "a count of regions, without the factor 2": every(
        lambda w, c: lead(w, c) - (w.most - w.least) - (1 if c < w.label else 0) >= 0
    ),
    "only the class after the label": lambda w: margin(w, (w.label + 1) % CLASSES) >= 0,
}

# No class is below 0, so that it wins all its ties: there the first version is right and the second only too careful.
HARMLESS_FOR_CLASS_0 = ("a tie counts as a win", "ties to the wrong side")


def counterexample(sloppy: Callable[[Window], object], label: int, low: int, high: int, size: tuple[int, int]):
    """Sums (outside, inside, attacked) of an image that a sloppy version certifies and an attack changes."""
    w = Window.of(label)
    sums, bounds = w.attack()
    n, rest = size
    solver = z3.Solver()
    solver.add(w.least == n * low, w.most == n * high, w.in_range, bounds)
    solver.add(*(z3.And(rest * low <= s, s <= rest * high) for s in w.outside))
    solver.add(wins(w.clean, label), sloppy(w), z3.Not(wins(sums, label)))
    if solver.check() != z3.sat:
        return None
    model = solver.model()
    value = lambda term: model.eval(term, model_completion=True).as_long()  # noqa: E731
    return tuple(
        [value(v) for v in values] for values in (w.outside, w.inside, [z3.Int(f"attacked{c}") for c in LABELS])
    )


def spread(total: int, regions: int, low: int, high: int) -> list[int]:
    """A sum as scores of single regions, each within the range."""
    scores, left = [], total - regions * low
    for _ in range(regions):
        step = min(left, high - low)
        scores.append(low + step)
        left -= step
    assert left == 0
    return scores


@pytest.mark.parametrize("label", [0, 4, 9])
@pytest.mark.parametrize("version", SLOPPY)
@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2047, 2047)], ids=["binary", "fixed-point"])
def test_a_sloppy_version_is_refuted_on_the_real_code(version, label, low, high):
    if label == 0 and version in HARMLESS_FOR_CLASS_0:
        assert counterexample(SLOPPY[version], label, low, high, (1, 6)) is None
        return
    window, rest = 2 if version == "u halved" else 1, 6  # half a unit makes no difference between integers
    outside, inside, attacked = counterexample(SLOPPY[version], label, low, high, (window, rest))
    grid = RegionGrid.from_axis(1, 1, 0, (1, window + rest))
    allowed = np.arange(window + rest)[None] < window  # the attacker has the first regions, and only them
    threat = PatchThreatModel(grid.image_size, ((1, window),), 1, allowed)
    around = [spread(total, rest, low, high) for total in outside]
    scores, changed = (
        np.array([[spread(s, window, low, high) + o] for s, o in zip(part, around, strict=True)], dtype=np.int16)
        for part in (inside, attacked)
    )
    certificate = vote(ScoreMap(torch.as_tensor(scores)[None], low, high, grid), threat)
    assert int(certificate.prediction[0]) == oracle.plain_prediction(scores) == label
    assert ScoreMap(torch.as_tensor(changed)[None], low, high, grid).predict().item() != label
    assert not bool(certificate.certified[0])
    reach = np.arange(window + rest)[None] < window
    assert oracle.vote(scores, [reach], low, high) == (label, int(certificate.margin[0]))
    contents = list(oracle.every_content(scores, reach, low, high)) or oracle.one_class_up(scores, reach, low, high)
    assert any(oracle.plain_prediction(content) != label for content in contents)


@pytest.mark.parametrize("version", SLOPPY)
def test_sloppy_versions_refuted(version):
    refuted = [label for label in LABELS if counterexample(SLOPPY[version], label, 0, 1, (3, 20)) is not None]
    assert refuted == [label for label in LABELS if label > 0 or version not in HARMLESS_FOR_CLASS_0]
