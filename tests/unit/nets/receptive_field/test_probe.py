"""The probes: they measure what is there, and find what was not declared."""

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.errors import UnsoundError, UsageError
from bagcert.grid import RegionGrid
from bagcert.nets.receptive_field.derive import derive_grid
from bagcert.nets.receptive_field.probe import check_locality, probe_grid
from tests import refused


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 2, (1, 2))
    )


class Leak(nn.Module):
    """Adds a little of the whole map to every region, if `hide` in a way that hides NaN."""

    def __init__(self, hide):
        super().__init__()
        self.body, self.hide = nn.Conv2d(3, 2, 3), hide

    def forward(self, x):
        x = self.body(x)
        everything = (x > 0.2).to(x.dtype) if self.hide else x
        return x + 0.01 * everything.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_measured_equals_derived(batch_size):
    net = small_net()
    measured, derived = probe_grid(net, (9, 14), batch_size=batch_size), derive_grid(net, (9, 14))
    np.testing.assert_array_equal(measured.rows_seen, derived.rows_seen)
    np.testing.assert_array_equal(measured.cols_seen, derived.cols_seen)


def test_zero_weights_hide_nothing():
    net = nn.Conv2d(3, 2, 3)
    nn.init.zeros_(net.weight)
    assert probe_grid(net, (6, 6)).receptive_field == (3, 3)


def test_integer_outputs_are_compared():
    class Binary(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            return (self.body(x) > 0).to(torch.int16)

    torch.manual_seed(0)
    net = Binary()
    measured = probe_grid(net, (6, 7))
    assert derive_grid(net, (6, 7)).covers(measured)
    assert measured.receptive_field == (3, 3)
    report = check_locality(net, (6, 7), derive_grid(net, (6, 7)))  # 4 + 5 region lines: the cheaper check
    assert report.measured is None
    refused(UnsoundError, "reaches beyond", check_locality, net, (6, 7), RegionGrid(np.eye(4, 6), np.eye(5, 7)))


def test_a_local_net_does_not_leak():
    net = small_net()
    report = check_locality(net, (16, 12), derive_grid(net, (16, 12)))
    assert report.nan_footprint_inside
    assert report.largest_leak == 0.0
    assert report.patches >= 3 * 5
    assert report.measured is None  # 8 + 5 region lines are fewer than 16 + 12 pixel lines


def test_measured_where_that_is_not_more_work():
    net = nn.Conv2d(3, 2, 3, padding=1)
    report = check_locality(net, (6, 7), derive_grid(net, (6, 7)))
    assert report.measured.map_size == (6, 7)
    assert report.measured.receptive_field == (3, 3)


def test_cheaper_check_takes_one_pass_per_region_line():
    net, images = nn.Conv2d(3, 2, 4, stride=4), []
    net.register_forward_pre_hook(lambda net, given: images.append(len(given[0])))
    declared = derive_grid(nn.Conv2d(3, 2, 4, stride=4), (32, 24))
    assert check_locality(net, (32, 24), declared, batch_size=3).largest_leak == 0.0
    assert sum(images) <= 1 + 8 + 6 + 2 * 3 * 8  # a plain image, the region lines, before and after each patch


@pytest.mark.parametrize("axis", ["row", "column"])
@pytest.mark.parametrize(
    ("net", "size", "pixel", "batch_size"),
    [(nn.Conv2d(3, 2, 3), (6, 7), 4, 64), *((nn.Conv2d(3, 2, 5, stride=4), (13, 17), 9, size) for size in (1, 2, 64))],
    ids=["measured", "cheaper, 1", "cheaper, 2", "cheaper, 64"],
)
def test_grid_that_declares_a_pixel_too_few_refused(net, size, pixel, batch_size, axis):
    honest = derive_grid(net, size)
    rows, cols = honest.rows_seen.copy(), honest.cols_seen.copy()
    (rows if axis == "row" else cols)[2, pixel] = False
    with pytest.raises(UnsoundError, match=f"region {axis} 2 depend on pixel {axis} {pixel}"):
        check_locality(net, size, RegionGrid(rows, cols), batch_size=batch_size)


def test_a_leak_is_named():
    net = Leak(hide=False)
    declared = derive_grid(net.body, (8, 8))
    refused(UnsoundError, "scores of region row 0 depend on pixel row 3", check_locality, net, (8, 8), declared)


def test_leak_that_hides_nan_measured():
    torch.manual_seed(0)
    net = Leak(hide=True)
    report = check_locality(net, (12, 12), derive_grid(net.body, (12, 12)), patch=(5, 5))
    assert 0 < report.largest_leak < 0.1


def test_declaring_more_is_allowed():
    net, size = nn.Conv2d(3, 2, 3, padding=1), (6, 7)
    declared = RegionGrid(np.ones((6, 6)), np.ones((7, 7)))
    assert check_locality(net, size, declared).nan_footprint_inside


def test_batch_norm_in_train_mode_leaks_only_as_is():
    net, size = small_net().train(), (8, 8)
    declared = derive_grid(net, size)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert check_locality(net, size, declared).largest_leak == 0.0
    refused(UnsoundError, "batch norm in train mode", check_locality, net, size, declared, as_is=True)
    assert net.training
    assert net[1].training
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_group_norm_leaks():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4))
    refused(UnsoundError, "reaches beyond", check_locality, net, (8, 8), derive_grid(net[:1], (8, 8)))


def test_grids_and_patches_of_another_size_refused():
    net = nn.Conv2d(3, 2, 3)
    refused(UnsoundError, r"map of \(6, 6\)", check_locality, net, (8, 8), derive_grid(nn.Conv2d(3, 2, 2), (8, 8)))
    refused(UsageError, "declared grid is for", check_locality, net, (8, 9), derive_grid(net, (8, 8)))
    refused(UsageError, "does not fit", check_locality, net, (8, 8), derive_grid(net, (8, 8)), patch=(9, 1))


def test_other_outputs_refused():
    refused(UsageError, "one map", probe_grid, nn.Flatten(), (8, 8))
    broken = nn.Conv2d(3, 2, 3)
    nn.init.constant_(broken.weight, float("nan"))
    refused(UsageError, "NaN", probe_grid, broken, (8, 8))


def test_map_size_that_depends_on_pixels_refused():
    class Shrinking(nn.Module):
        def forward(self, x):
            return x[..., 1:] if bool((x > 2).any()) else x

    grid = RegionGrid(np.eye(8, dtype=bool), np.eye(8, dtype=bool))
    refused(UnsoundError, "size depends on the pixels", check_locality, Shrinking(), (8, 8), grid)
