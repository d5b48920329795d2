"""The windows of a threat as tensors: the sets of regions its patches can reach, for all shapes in one flat order."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.grid import RegionGrid, WindowBlock
from bagcert.scores import ScoreMap, kept, lowest_argmax, window_sums
from bagcert.threat import PatchThreatModel

CHUNK_ELEMENTS = 2**22  # of the largest temporary tensor; several of them fit into 256 MiB even in float64


@dataclass(frozen=True, eq=False)
class Windows:
    """The windows of all blocks of `RegionGrid.windows`, flattened in order.

    Every block is stored as a full product of row and column windows, so that sums over all windows are two matrix
    products. Products that are not windows are gaps: `keep` is False for them, and every maximum must exclude them.
    """

    grid: RegionGrid
    blocks: tuple[WindowBlock, ...]
    device: torch.device

    @classmethod
    def of(cls, score_map: ScoreMap, threat: PatchThreatModel) -> "Windows":
        """Compute the windows of a threat on the grid of a score map, on the device of its scores."""
        return cls(score_map.grid, score_map.grid.windows(threat), score_map.scores.device)

    def __len__(self) -> int:
        return sum(block.keep.size for block in self.blocks)

    @cached_property
    def starts(self) -> list[int]:
        """Offset of each block in the flat order."""
        starts = [0]
        for block in self.blocks:
            starts.append(starts[-1] + block.keep.size)
        return starts[:-1]

    @cached_property
    def keep(self) -> Bool[Tensor, " windows"]:
        """Which entries are windows rather than gaps."""
        return torch.cat([kept(block, self.device).flatten() for block in self.blocks])

    @cached_property
    def gaps(self) -> Bool[Tensor, " windows"] | None:
        """Which entries are gaps, or None if there are no gaps."""
        return None if bool(self.keep.all()) else ~self.keep

    @cached_property
    def sizes(self) -> Int[Tensor, " windows"]:
        """Number of regions in each window."""
        return torch.cat([torch.as_tensor(block.regions, device=self.device).flatten() for block in self.blocks])

    @cached_property
    def placements(self) -> Int[Tensor, "windows 4"]:
        """One admissible patch `[top, left, height, width]` in pixels whose reach is the window."""
        return torch.cat([torch.as_tensor(block.places, device=self.device).flatten(0, 1) for block in self.blocks])

    @cached_property
    def masks(self) -> Bool[Tensor, "windows rows cols"]:
        """The windows as boolean maps, True for the regions of a window."""
        parts = []
        for block in self.blocks:
            rows, cols = (torch.as_tensor(axis, device=self.device) for axis in (block.rows, block.cols))
            parts.append((rows[:, None, :, None] & cols[None, :, None, :]).flatten(0, 1))
        return torch.cat(parts)

    @cached_property
    def completed(self) -> Bool[Tensor, " windows"]:
        """Which windows cover all regions together with some other window."""
        return completed(self.masks.flatten(1), self.keep)

    def sums(self, maps: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch windows"]:
        """Sum maps over every window, including gaps. Exact under the conditions of `window_sums`."""
        parts = [window_sums(maps, block).flatten(-2) for block in self.blocks]
        if len(parts) == 1:
            return parts[0]
        if parts[0].stride(-1) == 1:
            return torch.cat(parts, -1)
        return torch.cat([part.mT for part in parts], -2).mT  # keeps the memory layout

    def without_gaps(self, values: Tensor, fill: float) -> Tensor:
        """Replace the values [..., windows] of gaps by `fill`."""
        return values if self.gaps is None else values.masked_fill(self.gaps, fill)


def completed(masks: Bool[Tensor, "masks regions"], keep: Bool[Tensor, " masks"]) -> Bool[Tensor, " masks"]:
    """Which masks cover all regions together with some mask; only masks marked by `keep` are considered."""
    result = torch.zeros_like(keep)
    sizes = masks.sum(1).masked_fill(~keep, 0)
    # Only masks large enough to cover the map together with the largest mask need a check; usually there are none.
    (candidates,) = ((sizes + sizes.max() >= masks.shape[1]) & keep).nonzero(as_tuple=True)
    inside = masks[candidates].float()
    for part in candidates.split(1024):
        missing = (~masks[part]).float()
        result[part] = (missing @ inside.T == missing.sum(1, keepdim=True)).any(1)
    return result


def chunks(count: int, elements_each: int) -> Iterator[slice]:
    """Split `count` items into slices whose temporary of `elements_each` per item has at most CHUNK_ELEMENTS."""
    step = max(1, CHUNK_ELEMENTS // max(1, elements_each))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))


def per_image(score_map: ScoreMap, windows: Windows) -> int:
    """Size of the largest temporary tensor of a rule per image: one value per class and region or window."""
    rows, cols = score_map.grid.map_size
    return score_map.classes * max(rows * cols, len(windows))


def majority(
    labels: Int[Tensor, "batch masks"], classes: int, otherwise: Int[Tensor, " batch"]
) -> Int[Tensor, " batch"]:
    """The most frequent label of each row; ties go to the lowest label.

    Args:
        labels: -1 stands for "no label" and is not counted.
        classes: number of classes.
        otherwise: result for rows without any label.
    """
    counts = torch.zeros(len(labels), classes + 1, dtype=torch.int64, device=labels.device)
    counts.scatter_add_(1, labels + 1, torch.ones_like(labels))
    return torch.where((labels >= 0).any(1), lowest_argmax(counts[:, 1:]), otherwise)


@dataclass
class Best:
    """The smallest margin found so far for each image, and the windows that attain it."""

    margin: Float[Tensor, " batch"]
    pair: Int[Tensor, "batch windows"]

    def improve(self, image: Tensor, margin: Tensor, pair: Tensor) -> Tensor:
        """Update margins with strictly smaller candidates; return the index of the candidate taken per image."""
        before = self.margin.clone()
        self.margin.scatter_reduce_(0, image, margin, "amin")
        (wins,) = ((margin == self.margin[image]) & (margin < before[image])).nonzero(as_tuple=True)
        taken = torch.full((len(before),), len(image), device=image.device)
        taken.scatter_reduce_(0, image[wins], wins, "amin")  # the first of equal candidates, on every device
        taken = taken[taken < len(image)]
        self.pair[image[taken]] = pair[taken]
        return taken
