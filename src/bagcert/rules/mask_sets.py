"""A common interface to the masks of a threat: all windows, or for K patches all unions of K windows."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.rules.masks import Windows
from bagcert.rules.union_masking import Unions
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel


@dataclass(frozen=True, eq=False)
class MaskSet:
    """All masks of a threat.

    For one patch, entries can be gaps, which every maximum must exclude; see `Windows`. Unions have no gaps.

    Attributes:
        windows: windows of the threat.
        unions: unions of windows for several patches; None for one patch.
    """

    windows: Windows
    unions: Unions | None

    @classmethod
    def of(cls, score_map: ScoreMap, threat: PatchThreatModel) -> "MaskSet":
        """Compute the masks of a threat on the grid of a score map.

        Raises:
            UsageError: several patches have too many unions.
        """
        if threat.patches == 1:
            return cls(Windows.of(score_map, threat), None)
        unions = Unions.of(score_map, threat)
        return cls(unions.windows, unions)

    def __len__(self) -> int:
        return len(self.windows) if self.unions is None else len(self.unions)

    @property
    def elements(self) -> int:
        """Size of the largest temporary tensor per map: one value per region or mask."""
        return max(self.regions, len(self))

    @property
    def regions(self) -> int:
        """Number of regions of a map."""
        rows, cols = self.windows.grid.map_size
        return rows * cols

    @property
    def keep(self) -> Bool[Tensor, " masks"]:
        """Which entries are masks rather than gaps."""
        return (
            self.windows.keep if self.unions is None else torch.ones_like(self.unions.members[:, 0], dtype=torch.bool)
        )

    @property
    def gaps(self) -> Bool[Tensor, " masks"] | None:
        """Which entries are gaps, or None if there are no gaps."""
        return self.windows.gaps if self.unions is None else None

    @cached_property
    def sizes(self) -> Int[Tensor, " masks"]:
        """Number of regions in each mask."""
        return self.windows.sizes if self.unions is None else self.unions.masks.sum(1)

    @property
    def whole(self) -> Bool[Tensor, " masks"]:
        """Which masks cover all regions."""
        return self.keep & (self.sizes == self.regions)

    @property
    def completed(self) -> Bool[Tensor, " masks"]:
        """Which masks cover all regions together with some other mask."""
        return self.windows.completed if self.unions is None else self.unions.completed

    @property
    def placements(self) -> Int[Tensor, "masks patches 4"]:
        """One admissible patch `[top, left, height, width]` in pixels for each window of a mask."""
        if self.unions is None:
            return self.windows.placements[:, None]
        return self.windows.placements[self.unions.members]

    def sums(self, maps: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch masks"]:
        """Sum maps over every mask, including gaps. Exact under the conditions of `window_sums`."""
        return self.windows.sums(maps) if self.unions is None else self.unions.sums(maps.flatten(-2))

    def without_gaps(self, values: Tensor, fill: float) -> Tensor:
        """Replace the values [..., masks] of gaps by `fill`."""
        return self.windows.without_gaps(values, fill) if self.unions is None else values

    def outside(self, mask: Int[Tensor, " rows"]) -> Bool[Tensor, "rows m n"]:
        """Regions outside each of the given masks."""
        if self.unions is None:
            return ~self.windows.masks[mask]
        return self.unions.outside[mask].unflatten(1, self.windows.grid.map_size)
