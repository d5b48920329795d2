"""What the patches of a threat can reach, laid out for tensor arithmetic: all windows of all shapes side by side."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.grid import RegionGrid, WindowBlock
from bagcert.scores import ScoreMap, kept, lowest_argmax, window_sums
from bagcert.threat import PatchThreatModel

CHUNK_ELEMENTS = 2**22  # of the largest temporary; a handful of them stays within 256 MiB even in float64


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of every block in the order of `RegionGrid.windows`, flattened; those not kept stay as gaps.

    Gaps keep every block a product of row and column windows, so that sums over all windows are two matrix
    products. They are marked in `keep`; every maximum must leave them out.
    """

    grid: RegionGrid
    blocks: tuple[WindowBlock, ...]
    device: torch.device

    @classmethod
    def of(cls, score_map: ScoreMap, threat: PatchThreatModel) -> "Windows":
        """The windows a threat leads to on the grid of a score map, on the device of its scores."""
        return cls(score_map.grid, score_map.grid.windows(threat), score_map.scores.device)

    def __len__(self) -> int:
        return sum(block.keep.size for block in self.blocks)

    @cached_property
    def starts(self) -> list[int]:
        """Where each block begins in the flat order."""
        starts = [0]
        for block in self.blocks:
            starts.append(starts[-1] + block.keep.size)
        return starts[:-1]

    @cached_property
    def keep(self) -> Bool[Tensor, " windows"]:
        """Which of them are windows, not gaps."""
        return torch.cat([kept(block, self.device).flatten() for block in self.blocks])

    @cached_property
    def gaps(self) -> Bool[Tensor, " windows"] | None:
        """Which of them are gaps; None if there are none."""
        return None if bool(self.keep.all()) else ~self.keep

    @cached_property
    def sizes(self) -> Int[Tensor, " windows"]:
        """How many regions each holds."""
        return torch.cat([torch.as_tensor(block.regions, device=self.device).flatten() for block in self.blocks])

    @cached_property
    def placements(self) -> Int[Tensor, "windows 4"]:
        """`[top, left, height, width]` in pixels of one admissible patch whose reach is the window."""
        return torch.cat([torch.as_tensor(block.places, device=self.device).flatten(0, 1) for block in self.blocks])

    @cached_property
    def masks(self) -> Bool[Tensor, "windows rows cols"]:
        """The windows as sets of regions."""
        parts = []
        for block in self.blocks:
            rows, cols = (torch.as_tensor(axis, device=self.device) for axis in (block.rows, block.cols))
            parts.append((rows[:, None, :, None] & cols[None, :, None, :]).flatten(0, 1))
        return torch.cat(parts)

    @cached_property
    def completed(self) -> Bool[Tensor, " windows"]:
        """Windows which, together with some window, leave no region."""
        return completed(self.masks.flatten(1), self.keep)

    def sums(self, maps: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch windows"]:
        """Sums over every window, gaps included; exact like `window_sums`."""
        parts = [window_sums(maps, block).flatten(-2) for block in self.blocks]
        if len(parts) == 1:
            return parts[0]
        if parts[0].stride(-1) == 1:
            return torch.cat(parts, -1)
        return torch.cat([part.mT for part in parts], -2).mT  # the layout stays as it is

    def without_gaps(self, values: Tensor, fill: float) -> Tensor:
        """The same values [..., windows] with `fill` in the gaps."""
        return values if self.gaps is None else values.masked_fill(self.gaps, fill)


def completed(masks: Bool[Tensor, "masks regions"], keep: Bool[Tensor, " masks"]) -> Bool[Tensor, " masks"]:
    """Masks which, together with some mask, leave no region; only those marked by `keep` count."""
    result = torch.zeros_like(keep)
    sizes = masks.sum(1).masked_fill(~keep, 0)
    # Only masks that can make up the whole map with the largest are looked at, usually none.
    (candidates,) = ((sizes + sizes.max() >= masks.shape[1]) & keep).nonzero(as_tuple=True)
    inside = masks[candidates].float()
    for part in candidates.split(1024):
        missing = (~masks[part]).float()
        result[part] = (missing @ inside.T == missing.sum(1, keepdim=True)).any(1)
    return result


def chunks(count: int, elements_each: int) -> Iterator[slice]:
    """Slices of `count` items so that one temporary of `elements_each` per item stays within CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def per_image(score_map: ScoreMap, windows: Windows) -> int:
    """Elements of the largest temporary a rule holds per image: a value per class and region or window."""
    rows, cols = score_map.grid.map_size
    return score_map.classes * max(rows * cols, len(windows))


def majority(
    labels: Int[Tensor, "batch masks"], classes: int, otherwise: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The most frequent label, the lowest among equals; -1 is no label, `otherwise` where there is none at all."""
    counts = torch.zeros(len(labels), classes + 1, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(1, labels + 1, torch.ones_like(labels))
    return torch.where((labels >= 0).any(1), lowest_argmax(counts[:, 1:]), otherwise)


@dataclass
class Best:
    """The smallest margin found so far per image, and the windows that leave it."""

    margin: Float[Tensor, " batch"]
    pair: Int[Tensor, "batch windows"]

    def improve(self, image: Tensor, margin: Tensor, pair: Tensor) -> Tensor:
        """Takes over what is strictly smaller; returns the one candidate taken per improved image."""
        before = self.margin.clone()
        self.margin.scatter_reduce_(0, image, margin, "amin")
        (wins,) = ((margin == self.margin[image]) & (margin < before[image])).nonzero(as_tuple=True)
        taken = torch.full((len(before),), len(image), device=image.device)
        taken.scatter_reduce_(0, image[wins], wins, "amin")  # the first of equal candidates, whatever the device
        taken = taken[taken < len(image)]
        self.pair[image[taken]] = pair[taken]
        return taken
