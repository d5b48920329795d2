"""The masks of a threat: all windows, or for K patches all unions of K windows, behind one interface."""

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
    """All masks of a threat. Only windows have gaps, which every maximum must leave out; see `Windows`.

    Attributes:
        windows: the windows.
        unions: their unions for several patches; None for one patch.
    """

    windows: Windows
    unions: Unions | None

    @classmethod
    def of(cls, score_map: ScoreMap, threat: PatchThreatModel) -> "MaskSet":
        """The masks of a threat on the grid of a score map.

        Raises:
            UsageError: several patches lead to more unions than can be enumerated.
        """
        if threat.patches == 1:
            return cls(Windows.of(score_map, threat), None)
        unions = Unions.of(score_map, threat)
        return cls(unions.windows, unions)

    def __len__(self) -> int:
        return len(self.windows) if self.unions is None else len(self.unions)

    @property
    def elements(self) -> int:
        """Elements of the largest temporary per map: a value per region or mask."""
        return max(self.regions, len(self))

    @property
    def regions(self) -> int:
        """How many regions a map has."""
        rows, cols = self.windows.grid.map_size
        return rows * cols

    @property
    def keep(self) -> Bool[Tensor, " masks"]:
        """Which entries are masks, not gaps."""
        return (
            self.windows.keep if self.unions is None else torch.ones_like(self.unions.members[:, 0], dtype=torch.bool)
        )

    @property
    def gaps(self) -> Bool[Tensor, " masks"] | None:
        """Which entries are gaps; None if there are none."""
        return self.windows.gaps if self.unions is None else None

    @cached_property
    def sizes(self) -> Int[Tensor, " masks"]:
        """How many regions each mask holds."""
        return self.windows.sizes if self.unions is None else self.unions.masks.sum(1)

    @property
    def whole(self) -> Bool[Tensor, " masks"]:
        """Masks that leave no region."""
        return self.keep & (self.sizes == self.regions)

    @property
    def completed(self) -> Bool[Tensor, " masks"]:
        """Masks which, together with some mask, leave no region."""
        return self.windows.completed if self.unions is None else self.unions.completed

    @property
    def placements(self) -> Int[Tensor, "masks patches 4"]:
        """`[top, left, height, width]` in pixels of one admissible patch for each window of a mask."""
        if self.unions is None:
            return self.windows.placements[:, None]
        return self.windows.placements[self.unions.members]

    def sums(self, maps: Float[Tensor, "*batch rows cols"]) -> Float[Tensor, "*batch masks"]:
        """Sums over every mask, gaps included; exact like `window_sums`."""
        return self.windows.sums(maps) if self.unions is None else self.unions.sums(maps.flatten(-2))

    def without_gaps(self, values: Tensor, fill: float) -> Tensor:
        """The same values [..., masks] with `fill` in the gaps."""
        return self.windows.without_gaps(values, fill) if self.unions is None else values

    def outside(self, mask: Int[Tensor, " rows"]) -> Bool[Tensor, "rows m n"]:
        """The regions that each of these masks leaves."""
        if self.unions is None:
            return ~self.windows.masks[mask]
        return self.unions.outside[mask].unflatten(1, self.windows.grid.map_size)
