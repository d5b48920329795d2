import numpy as np
import pytest

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.threat import PatchThreatModel
from tests import oracle, refused

GRIDS = {
    "padded": RegionGrid.from_axis(3, 1, -1, (6, 7)),
    "strided": RegionGrid.from_axis(2, 3, 0, (7, 9)),
    "arbitrary": RegionGrid(*(np.random.default_rng(s).random((4, 6 + s)) < 0.4 for s in (0, 1))),
    "cyclic": RegionGrid(np.ones((1, 5), bool), (np.arange(6)[None] - np.arange(6)[:, None]) % 6 < 2),
}


@pytest.fixture(params=list(GRIDS))
def grid(request) -> RegionGrid:
    return GRIDS[request.param]


def test_the_numbers_of_the_papers_network():
    """r = 9, stride 1, 5x5 patch, 32x32 px: 28x28 placements reduce to 20x20 windows of 13x13 regions."""
    grid = RegionGrid.from_axis(9, 1, -4, (32, 32))
    assert (grid.map_size, grid.image_size, grid.receptive_field) == ((32, 32), (32, 32), (9, 9))
    (block,) = grid.windows(PatchThreatModel.parse(5, (32, 32)))
    assert block.keep.shape == (20, 20)
    assert (block.regions == 13 * 13).all()


def test_touched_is_which_regions_see_a_pixel(grid):
    for side in (1, 2, 3):
        for touched, seen in ((grid.touched_rows(side), grid.rows_seen), (grid.touched_cols(side), grid.cols_seen)):
            assert [tuple(line) for line in touched.tolist()] == oracle.lines(seen, side)
    assert [tuple(line) for line in grid.touched_rows("2x3").tolist()] == oracle.lines(grid.rows_seen, 2)
    assert [tuple(line) for line in grid.touched_cols("2x3").tolist()] == oracle.lines(grid.cols_seen, 3)


@pytest.mark.parametrize("shapes", [((1, 1),), ((2, 3),), ((3, 2), (1, 4))])
@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("masks_per_axis", [None, 1, 2, 3])
def test_windows_are_those_of_the_definitions(grid, shapes, restricted, masks_per_axis):
    grid = grid.with_masks_per_axis(masks_per_axis)
    allowed = np.random.default_rng(7).random(grid.image_size) < 0.85 if restricted else None
    threat = PatchThreatModel(grid.image_size, shapes, 1, allowed)
    geometry = (grid.rows_seen, grid.cols_seen, threat.shapes, allowed)
    blocks = grid.windows(threat)
    found = [np.outer(b.rows[i], b.cols[j]) for b in blocks for i, j in np.argwhere(b.keep)]
    expected = oracle.mask_set(*geometry, masks_per_axis)
    assert len(found) == len(expected)
    assert all((a == b).all() for a, b in zip(found, expected, strict=True))
    for (_, _, _), reach in oracle.reaches(*geometry):
        assert any((reach <= mask).all() for mask in found)
    if masks_per_axis is not None:
        for block in blocks:
            assert max(block.keep.shape) <= masks_per_axis


def test_window_names_an_admissible_placement(grid):
    allowed = np.random.default_rng(8).random(grid.image_size) < 0.85
    for threat in (
        PatchThreatModel.parse(2, grid.image_size),
        PatchThreatModel(grid.image_size, ((2, 2), (1, 3)), 1, allowed),
    ):
        reaches = {
            (top, left, *shape): reach
            for (shape, top, left), reach in oracle.reaches(
                grid.rows_seen, grid.cols_seen, threat.shapes, threat.allowed
            )
        }
        for block in grid.windows(threat):
            for i, j in np.argwhere(block.keep):
                window = np.outer(block.rows[i], block.cols[j])
                assert (reaches[tuple(block.places[i, j].tolist())] == window).all()
                assert block.regions[i, j] == window.sum()


def test_masks_per_axis_names_a_placement_in_each_mask(grid):
    allowed = np.random.default_rng(8).random(grid.image_size) < 0.85
    limited = grid.with_masks_per_axis(2)
    for threat in (
        PatchThreatModel.parse(2, grid.image_size),
        PatchThreatModel(grid.image_size, ((2, 2),), 1, allowed),
    ):
        merged = oracle.merged_masks(grid.rows_seen, grid.cols_seen, threat.shapes, threat.allowed, 2)
        reaches = {
            (top, left, *shape): reach
            for (shape, top, left), reach in oracle.reaches(
                grid.rows_seen, grid.cols_seen, threat.shapes, threat.allowed
            )
        }
        (block,) = limited.windows(threat)
        for (i, j), (mask, members) in zip(np.argwhere(block.keep), merged, strict=True):
            assert (np.outer(block.rows[i], block.cols[j]) == mask).all()
            reach = reaches[tuple(block.places[i, j].tolist())]
            assert (reach == members[0]).all()


def test_masks_per_axis_of_derived_grids():
    grid = RegionGrid.from_axis(3, 1, -1, (6, 7)).with_masks_per_axis(2)
    assert grid.with_masks_per_axis(2) is grid
    assert grid.transposed().masks_per_axis == grid.through(np.eye(6), np.eye(7)).masks_per_axis == 2
    refused(UsageError, "the number of masks per axis must be at least 1, got 0", grid.with_masks_per_axis, 0)


def test_a_resize_widens_what_a_pixel_reaches():
    grid = RegionGrid.from_axis(2, 2, 0, (4, 4))
    half = np.kron(np.eye(4, dtype=bool), np.ones((1, 2), dtype=bool))  # each pixel from two source pixels
    seen = grid.through(half, half)
    assert seen.image_size == (8, 8)
    assert seen.receptive_field == (4, 4)
    assert not seen.covers(grid)
    assert seen.covers(RegionGrid.from_axis(4, 4, 0, (8, 8)))
    refused(UsageError, "rows_from", grid.through, half.T, half)


def test_transposed(grid):
    assert grid.transposed().map_size == grid.map_size[::-1]
    assert grid.transposed().image_size == grid.image_size[::-1]


def test_covers():
    small, large = RegionGrid.from_axis(3, 1, -1, (5, 5)), RegionGrid.from_axis(5, 1, -2, (5, 5))
    assert large.covers(small)
    assert large.covers(large)
    assert not small.covers(large)
    for mixed in (RegionGrid(large.rows_seen, small.cols_seen), RegionGrid(small.rows_seen, large.cols_seen)):
        assert large.covers(mixed)
        assert mixed.covers(small)
        assert not mixed.covers(large)
        assert not small.covers(mixed)


def test_errors():
    refused(UsageError, "rows_seen", RegionGrid, np.zeros((0, 3), bool), np.ones((1, 3), bool))
    refused(UsageError, "the grid for", GRIDS["padded"].windows, PatchThreatModel.parse(2, (9, 9)))
    refused(UsageError, "2 shapes", GRIDS["padded"].touched_rows, "2x3+3x2")
