"""The rules in basic tensor operations: sums, products, comparisons, maxima.

They say what `bagcert.rules` say, in float32 on whole numbers below 2^24, so that every sum is exact in any order.
`bagcert.exporting.attention` has those for attention pooling. The windows are constants. Nothing is sorted and no index
of a maximum is asked for, so ties fall as the package's one tie rule wants them on every runtime: the lowest class
index wins.
"""

from itertools import combinations_with_replacement
from math import comb

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.threat import PatchThreatModel

EXACT = 2**24  # float32 represents all integers below this exactly
MOST_MIB = 32  # limit on the largest tensor per image, and on the windows

Levels = Float[Tensor, "batch classes regions"]
Answer = tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]


def lowest_largest(values: Float[Tensor, "batch classes *more"]) -> Float[Tensor, "batch *more"]:
    """Returns the index of the largest value along dimension 1; the lowest index among ties."""
    index = torch.arange(values.shape[1], dtype=torch.float32).view(-1, *[1] * (values.ndim - 2))
    best = values == values.amax(1, keepdim=True)
    return torch.where(best, index, float(values.shape[1])).amin(1)


class RuleModule(nn.Module):
    """A rule in the graph: maps the output of a head to label and margin, both integers [batch].

    Args:
        classes: number of classes.

    Attributes:
        dtype: data type of its sums.
    """

    name: str
    index: Tensor
    dtype = torch.float32

    def __init__(self, classes: int) -> None:
        super().__init__()
        self.register_buffer("index", torch.arange(classes, dtype=torch.float32))

    def own(self, values: Tensor, label: Float[Tensor, " batch"]) -> Tensor:
        """Returns values[b, label[b]] with the class dimension kept, as a sum with one nonzero term."""
        chosen = (self.index == label[:, None]).float()
        return (values * chosen.view(*chosen.shape, *[1] * (values.ndim - 2))).sum(1, keepdim=True)

    def smallest(self, lead: Float[Tensor, "batch classes"], label: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Returns the smallest lead over another class, minus the correction of the tie rule."""
        lead = lead - (self.index < label[:, None]).float()
        return torch.where(self.index == label[:, None], float(EXACT), lead).amin(1)

    def computes(self, one: Float[Tensor, "batch 1 1"]) -> Bool[Tensor, " batch"]:
        """Returns whether this runtime computes the rule's other operations correctly; `one` is 1, not a constant."""
        return one[:, 0, 0] > 0


class SumModule(RuleModule):
    """A rule for class scores that are sums over regions.

    Args:
        inside: the regions of each window.
        classes: number of classes.
        span: levels lie within [0, span].
        patches: number of simultaneous patches.

    Raises:
        UsageError: its sums reach 2^24, or it needs more memory than `MOST_MIB`.
    """

    inside: Tensor

    def __init__(self, inside: Bool[np.ndarray, "windows regions"], classes: int, span: int, patches: int) -> None:
        super().__init__(classes)
        self.span, self.patches = span, patches
        self.require_exact(span * inside.shape[1])
        self.require_memory(classes, *inside.shape)
        self.register_buffer("inside", torch.from_numpy(inside.astype(np.float32)))

    def require_exact(self, most: int) -> None:
        """Refuses a rule whose sums can reach 2^24; `most` is the largest class sum."""
        largest = (1 + 2 * self.patches) * most + 1
        if largest >= EXACT:
            raise UsageError(
                f"sums of the {self.name} rule can reach {largest:,} here, and float32 is exact below {EXACT:,} only; "
                "a smaller map or a binary head would fit"
            )

    def require_memory(self, classes: int, windows: int, regions: int) -> None:
        """Refuses a rule that is too large for a graph."""
        each = max(classes, regions) * windows
        if each * 4 > MOST_MIB * 2**20:
            raise UsageError(
                f"the {self.name} rule with {windows:,} windows takes {each / 2**18:,.0f} MiB in the graph, more than "
                f"the limit of {MOST_MIB} MiB"
            )


class VoteModule(SumModule):
    """The vote certificate (docs/method.md, "Vote"); the same as `bagcert.rules.vote`."""

    name = "vote"

    def forward(self, levels: Levels) -> Answer:
        """Returns the label by class sums, and margin = min over c of T_c - (largest window damages) - 1[c < label]."""
        total = levels.sum(2)
        label = lowest_largest(total)
        sums = levels @ self.inside.T
        damage = self.own(sums, label) + self.span * self.inside.sum(1) - sums
        count = min(self.patches, self.inside.shape[0])
        taken = damage.amax(2) if count == 1 else damage.topk(count, dim=2).values.sum(2)
        return label, self.smallest(self.own(total, label) - total - taken, label)


class TwoRounds(nn.Module):
    """Computes the double-masking prediction from the labels of all single masks and of all pairs.

    Args:
        inside: the regions of each mask.
        classes: number of classes.

    Attributes:
        labeled: whether some mask leaves a region.
        completes: whether some pair of masks leaves no region.
    """

    index: Tensor
    has_label: Tensor
    may_pass: Tensor
    order: Tensor

    def __init__(self, inside: Bool[np.ndarray, "masks regions"], classes: int) -> None:
        super().__init__()
        outside = ~inside
        # Pairs are complete where no region is left; a mask with such a partner never passes a second round.
        complete = outside.astype(np.float32) @ outside.T.astype(np.float32) == 0
        self.labeled = bool(outside.any(1).any())
        self.completes = bool(complete.any())
        self.register_buffer("index", torch.arange(classes, dtype=torch.float32))
        self.register_buffer("has_label", torch.from_numpy(outside.any(1)))
        self.register_buffer("may_pass", torch.from_numpy(~complete.any(1)).float())
        self.register_buffer("order", torch.arange(len(inside), dtype=torch.float32))

    def forward(
        self, single: Float[Tensor, "batch masks"], pairs: Float[Tensor, "batch masks masks"]
    ) -> Float[Tensor, " batch"]:
        """Returns the label after both rounds, if some mask leaves a region."""
        first = torch.where(self.has_label, single, -1.0)
        votes = (first[:, None, :] == self.index[:, None]).float().sum(2)
        majority = lowest_largest(votes)
        holds = torch.eq(pairs, first[:, :, None]).float().amin(2)
        passes = holds * self.may_pass * (first != majority[:, None]).float() * (first >= 0).float()
        # The first mask that passes, or one beyond the last.
        at = torch.where(passes > 0, self.order, float(len(self.order))).amin(1)
        dissent = (first * torch.eq(self.order, at[:, None]).float()).sum(1)
        return torch.where(at < len(self.order), dissent, majority)

    def limit(self, margin: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Returns the margin, limited to -1 if some pair of masks leaves no region."""
        return margin.clamp(max=-1.0) if self.completes else margin


class DoubleMaskingModule(SumModule):
    """Double masking (docs/method.md, "Double masking"); the same as `bagcert.rules.double_masking`.

    Every pair of masks is tried for every class: windows x windows x classes values per image.
    """

    name = "double-masking"
    outside: Tensor

    def __init__(self, inside: Bool[np.ndarray, "windows regions"], classes: int, span: int, patches: int) -> None:
        super().__init__(inside, classes, span, patches)
        self.rounds = TwoRounds(inside, classes)
        self.register_buffer("outside", torch.from_numpy((~inside).astype(np.float32)))

    def require_exact(self, most: int) -> None:
        """Refuses sums that reach 2^24. The largest value is a difference of two class sums plus one."""
        if 2 * most + 1 >= EXACT:
            raise UsageError(
                f"sums of the {self.name} rule can reach {2 * most + 1:,} here, and float32 is exact below {EXACT:,} "
                "only; a smaller map or a binary head would fit"
            )

    def require_memory(self, classes: int, windows: int, regions: int) -> None:
        """Refuses a rule whose pairs of masks are too large for a graph."""
        mib = 4 * classes * windows * max(windows, regions) / 2**20
        if mib > MOST_MIB:
            raise UsageError(
                f"double masking with {windows:,} windows, {regions:,} regions and {classes} classes takes {mib:,.0f} "
                f"MiB per image in the graph, more than the limit of {MOST_MIB} MiB; the vote rule needs no pairs"
            )

    def forward(self, levels: Levels) -> Answer:
        """Returns the label after both rounds, and margin = the smallest lead of that label outside any two masks."""
        # What each pair of masks leaves of each class: [batch, classes, first mask, second mask]
        left = (levels[:, :, None, :] * self.outside) @ self.outside.T
        if self.rounds.labeled:
            label = self.rounds(lowest_largest(levels @ self.outside.T), lowest_largest(left))
        else:
            label = lowest_largest(levels.sum(2))
        lead = (self.own(left, label) - left).amin((2, 3))
        return label, self.rounds.limit(self.smallest(lead, label))


RULE_MODULES: dict[str, type[SumModule]] = {module.name: module for module in (VoteModule, DoubleMaskingModule)}
"""The rules that can be exported, by name."""


def rule_module(rule: str, grid: RegionGrid, threat: PatchThreatModel, classes: int, span: int) -> RuleModule:
    """Creates the rule for a threat, with its windows as constants.

    Raises:
        UsageError: a rule that cannot be exported, sums too large for float32, or too many windows.
    """
    if rule not in RULE_MODULES:
        raise UsageError(f"the rule {rule} cannot be exported; {' and '.join(RULE_MODULES)} can")
    inside = masks(grid, threat, classes) if rule == DoubleMaskingModule.name else _windows(grid, threat)
    return RULE_MODULES[rule](inside, classes, span, threat.patches)


def masks(grid: RegionGrid, threat: PatchThreatModel, numbers: int) -> Bool[np.ndarray, "masks regions"]:
    """Returns the masks of a threat: all windows, or for K patches all unions of K windows.

    Args:
        numbers: number of values that a graph holds for each pair of masks.

    Raises:
        UsageError: several patches give too many unions for a graph.
    """
    windows = _windows(grid, threat)
    return windows if threat.patches == 1 else _unions(windows, threat, numbers)


def _windows(grid: RegionGrid, threat: PatchThreatModel) -> Bool[np.ndarray, "windows regions"]:
    """Returns the windows in the order of `RegionGrid.windows`."""
    parts = [
        (block.rows[:, None, :, None] & block.cols[None, :, None, :])[block.keep] for block in grid.windows(threat)
    ]
    return np.concatenate([part.reshape(len(part), -1) for part in parts])


def _unions(
    windows: Bool[np.ndarray, "windows regions"], threat: PatchThreatModel, numbers: int
) -> Bool[np.ndarray, "unions regions"]:
    """Returns all unions of one window per patch, in the order of `bagcert.rules.union_masking`."""
    count = comb(len(windows) + threat.patches - 1, threat.patches)
    if 4 * numbers * count**2 > MOST_MIB * 2**20:
        raise UsageError(
            f"masking against {threat} needs {count:,} unions of {threat.patches} windows, too many for a graph (the "
            f"limit is {MOST_MIB} MiB per image for all their pairs); use fewer patches, or the vote rule if class "
            "scores are sums"
        )
    return np.stack(
        [windows[list(some)].any(0) for some in combinations_with_replacement(range(len(windows)), threat.patches)]
    )
