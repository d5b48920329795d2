"""Exact search for the pair of windows that reduces a lead the most, without trying every pair for every class.

For one lead map D = s_y - s_c the maximum over pairs is max over m, m' of sum_{m or m'} D. Cheap bounds exclude nearly
every class of an image. The remaining classes are searched by pairs of row windows. Within such a pair the sum is
linear in three row sums of D, so all pairs of column windows are evaluated by one matrix product:

    sum over (R x C) or (R' x C') of D = sum_{C} D[R only] + sum_{C or C'} D[R and R'] + sum_{C'} D[R' only]

The search does not assume that windows are intervals. See docs/method.md, "Double masking".
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.rules.masks import CHUNK_ELEMENTS, Best, Windows, chunks
from bagcert.scores import tie_penalty

FEW = 0.5
"""If less than this share of all classes remains, copying their lead maps is faster than summing all lead maps."""


def worst_pairs(
    windows: Windows,
    levels: Float[Tensor, "batch classes rows cols"],
    total: Float[Tensor, "batch classes"],
    sums: Float[Tensor, "batch classes windows"],
    label: Int[Tensor, " batch"],
) -> tuple[Int[Tensor, " batch"], Int[Tensor, "batch 2"]]:
    """Compute the exact margin of `label` over all classes and window pairs, and a pair of windows that attains it.

    Args:
        windows: windows of the threat.
        levels: scores from 0 to span, in the exact float type.
        total: sums of `levels` over the whole map.
        sums: sums of `levels` over every window.
        label: the deployed prediction.

    Returns:
        The margin, int64, and the window indices of the pair: the greedy pair unless the search finds a smaller margin.
    """
    every = torch.arange(len(levels), device=levels.device)
    blocks = range(len(windows.blocks))
    classes = levels.shape[1]
    lead = levels[every, label][:, None] - levels
    base = total[every, label][:, None] - total - tie_penalty(label, classes)
    base[every, label] = torch.inf  # exclude the label itself
    own = sums[every, label]
    removed = windows.without_gaps(own[:, None] - sums, -torch.inf)
    single = removed.amax(2)

    left, rival = (base - single).min(1)
    best = Best(left, removed[every, rival].max(1).indices[:, None].repeat(1, 2))
    # The most likely class of each image first: its pair gives a bound that excludes most other classes.
    _greedy(windows, lead, base, removed, every, rival, best)
    # sum over (m or m') <= sum over m + positive part of m' <= sum over m + the label's own levels in m'
    near = base - single - windows.without_gaps(own, -torch.inf).amax(1)[:, None] < best.margin[:, None]
    if near.float().mean() < FEW:
        positive = windows.without_gaps(windows.sums(lead[near].clamp(min=0)), -torch.inf)
    else:
        positive = windows.without_gaps(windows.sums(lead.clamp(min=0)), -torch.inf)
        near = base - single - positive.amax(2) < best.margin[:, None]
        positive = positive[near]
    image, rival = near.nonzero(as_tuple=True)
    floor = (base - single)[near] - positive.amax(1)
    open_ = floor < best.margin[image]
    _greedy(windows, lead, base, removed, image[open_], rival[open_], best)

    open_ = floor < best.margin[image]
    image, rival, positive = image[open_], rival[open_], positive[open_]
    peaks = [(_peaks(windows, k, removed[image, rival]), _peaks(windows, k, positive)) for k in blocks]
    for first in blocks:
        for second in blocks[first:]:
            (real, bound), (real2, bound2) = peaks[first], peaks[second]
            most = torch.minimum(real.amax(1) + bound2.amax(1), bound.amax(1) + real2.amax(1))
            (open_,) = (base[image, rival] - most < best.margin[image]).nonzero(as_tuple=True)
            if not len(open_):
                continue
            table = _PairTable.of(windows, first, second, levels.dtype)
            for rows in chunks(len(open_), table.elements_each):
                some = open_[rows]
                i, j = table.first, table.second
                ceiling = torch.minimum(
                    real[some][:, i] + bound2[some][:, j],
                    bound[some][:, i] + real2[some][:, j],
                )
                _search(table, lead, base, image[some], rival[some], ceiling, best)
    return best.margin.long(), best.pair


def _greedy(
    windows: Windows,
    lead: Tensor,
    base: Tensor,
    removed: Tensor,
    image: Tensor,
    rival: Tensor,
    best: Best,
) -> None:
    """For each row (image, rival), take the strongest window, then the window that reduces the remaining lead most."""
    for rows in chunks(len(image), max(lead[0, 0].numel(), len(windows))):
        i, c = image[rows], rival[rows]
        single, first = removed[i, c].max(1)
        rest = lead[i, c] * ~windows.masks[first]
        more, second = windows.without_gaps(windows.sums(rest), -torch.inf).max(1)
        best.improve(i, base[i, c] - single - more, torch.stack([first, second], 1))


@dataclass(frozen=True, eq=False)
class _PairTable:
    """Pairs (i, j) of row windows and pairs of column windows of two blocks.

    Attributes:
        first, second: row windows i and j of each pair.
        rows: [3, pairs, map rows]: the rows in i only, in both, and in j only.
        cols: [3 * map columns, column pairs], stacked: columns of the first, of either, and of the second window.
        keep: for each row window of the first and of the second block, which column pairs are windows; None if all.
        starts: offsets of the two blocks in the flat order.
        widths: number of column windows of the two blocks.
    """

    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]
    rows: Float[Tensor, "3 pairs m"]
    cols: Float[Tensor, "n3 colpairs"]
    keep: tuple[Bool[Tensor, "rows colpairs"], Bool[Tensor, "rows2 colpairs"]] | None
    starts: tuple[int, int]
    widths: tuple[int, int]

    @classmethod
    def of(cls, windows: Windows, first: int, second: int, dtype: torch.dtype) -> "_PairTable":
        """Build the table for two blocks. Within one block i <= j suffices since column pairs come in both orders."""
        block, other, device = windows.blocks[first], windows.blocks[second], windows.device
        rows, cols, keep = (torch.as_tensor(t, device=device) for t in (block.rows, block.cols, block.keep))
        rows2, cols2, keep2 = (torch.as_tensor(t, device=device) for t in (other.rows, other.cols, other.keep))
        pairs = torch.ones(len(rows), len(rows2), dtype=torch.bool, device=device)
        i, j = (pairs.triu() if first == second else pairs).nonzero(as_tuple=True)
        of_rows = torch.stack([rows[i] & ~rows2[j], rows[i] & rows2[j], rows2[j] & ~rows[i]])
        a, b = torch.ones(len(cols), len(cols2), device=device).nonzero(as_tuple=True)
        of_cols = torch.cat([cols[a], cols[a] | cols2[b], cols2[b]], 1).T.contiguous()
        both = None if windows.gaps is None else (keep[:, a], keep2[:, b])
        starts, widths = (windows.starts[first], windows.starts[second]), (len(cols), len(cols2))
        return cls(i, j, of_rows.to(dtype), of_cols.to(dtype), both, starts, widths)

    @property
    def elements_each(self) -> int:
        """Size of the largest temporary tensor per lead map."""
        return len(self.first) * self.cols.shape[0]


def _peaks(windows: Windows, block: int, values: Float[Tensor, "rows windows"]) -> Float[Tensor, "rows row_windows"]:
    """The maximum over the column windows of each row window of a block."""
    height, width = windows.blocks[block].keep.shape
    start = windows.starts[block]
    return values[:, start : start + height * width].unflatten(1, (height, width)).amax(2)


def _search(
    table: _PairTable,
    lead: Float[Tensor, "batch classes m n"],
    base: Float[Tensor, "batch classes"],
    image: Int[Tensor, " rows"],
    rival: Int[Tensor, " rows"],
    ceiling: Float[Tensor, "rows pairs"],
    best: Best,
) -> None:
    """Evaluate every window pair of two blocks that could lead to a smaller margin than the best so far.

    `ceiling` is an upper bound on the reduction of the lead for each pair of row windows.
    """
    row, pair = (base[image, rival][:, None] - ceiling < best.margin[image][:, None]).nonzero(as_tuple=True)
    if not len(row):
        return
    # [rows, 3, pairs, n]: row sums of the three parts of every pair of row windows
    parts = (table.rows.flatten(0, 1) @ lead[image, rival]).unflatten(1, (3, len(table.first)))
    for some in torch.arange(len(row), device=row.device).split(max(1, CHUNK_ELEMENTS // table.cols.shape[1])):
        r, p = row[some], pair[some]
        taken = parts[r, :, p].flatten(1) @ table.cols
        if table.keep is not None:
            kept = table.keep[0][table.first[p]] & table.keep[1][table.second[p]]
            taken.masked_fill_(~kept, -torch.inf)
        most, column = taken.max(1)
        first = table.starts[0] + table.first[p] * table.widths[0] + column // table.widths[1]
        second = table.starts[1] + table.second[p] * table.widths[1] + column % table.widths[1]
        best.improve(image[r], base[image[r], rival[r]] - most, torch.stack([first, second], 1))
