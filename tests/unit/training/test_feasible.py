"""What can never be certified is known before training."""

import pytest

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.threat import PatchThreatModel
from bagcert.training.feasible import require_certifiable
from tests import refused, tiny


def _two_windows_cover(grid: RegionGrid, side: int) -> bool:
    """By going through all pairs of placements."""
    height, width = grid.image_size
    reaches = set()
    for top in range(height - side + 1):
        for left in range(width - side + 1):
            rows = grid.rows_seen[:, top : top + side].any(1)
            cols = grid.cols_seen[:, left : left + side].any(1)
            reaches.add((rows[:, None] & cols[None]).tobytes())
    full = b"\x01" * (grid.map_size[0] * grid.map_size[1])
    ints = [int.from_bytes(reach, "big") for reach in reaches]
    whole = int.from_bytes(full, "big")
    return any(a | b == whole for a in ints for b in ints)


@pytest.mark.parametrize(("field", "stride", "size"), [(3, 1, 8), (4, 2, 10), (5, 3, 12), (8, 4, 12), (3, 3, 6)])
def test_require_certifiable_refuses_what_two_masks_cover(field: int, stride: int, size: int) -> None:
    grid = RegionGrid.from_axis(field, stride, 0, (size, size))
    recipe = tiny.recipe(defense__rule="double-masking")
    allowed = []
    for side in range(1, size + 1):
        try:
            require_certifiable(recipe, grid, PatchThreatModel.parse(side, grid.image_size))
            allowed.append(side)
        except UsageError as error:
            text = str(error)
            assert (f"up to {max(allowed)}x{max(allowed)} px" if allowed else "no other patch") in text
        assert (side in allowed) != _two_windows_cover(grid, side)


def test_require_certifiable_leaves_other_defenses_alone() -> None:
    grid = RegionGrid.from_axis(8, 4, 0, (12, 12))
    threat = PatchThreatModel.parse(8, (12, 12))
    for name in ("cross-entropy", "interval-bounds"):
        require_certifiable(tiny.recipe(loss__name=name), grid, threat)
    refused(UsageError, "no image could ever", require_certifiable, tiny.recipe(), grid, threat)
