"""Every named architecture keeps to what the table says of it."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.errors import UsageError
from bagcert.nets import ARCHITECTURES, get_architecture
from bagcert.nets.receptive_field.derive import derive_grid
from bagcert.nets.receptive_field.probe import check_locality, probe_grid
from bagcert.nets.region_scorer import RegionScorer
from tests import refused

CLASSES = 3
WIDTH = 8  # the geometry does not depend on it
PADDED = [name for name in ARCHITECTURES if not name.startswith("bagnet")]


def seeded(name, width=WIDTH, depth=None, padded=True):
    """A net with weights and running statistics that are not the initial ones."""
    torch.manual_seed(0)
    architecture = ARCHITECTURES[name]
    net = architecture.build(CLASSES, width, depth or architecture.depth, padded)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.2, 0.2)
            module.running_var.uniform_(0.5, 1.5)
            nn.init.uniform_(module.weight, 0.5, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
    return net.eval()


@cache
def derived(name):
    """The grid of the seeded net on images of its own size."""
    return derive_grid(seeded(name), own_size(name))


def own_size(name):
    """The architecture's image size; of the large ones a part, of all enough to hold whole receptive fields."""
    receptive_field, stride = declared_geometry(name)
    return tuple(max(min(side, 64), receptive_field + 3 * stride) for side in ARCHITECTURES[name].image_size)


def declared_geometry(name):
    return ARCHITECTURES[name].receptive_field_px, ARCHITECTURES[name].stride_px


def geometry(seen):
    """(receptive field, stride) of the regions of an axis that do not touch its border."""
    whole = seen[~seen[:, 0] & ~seen[:, -1]]
    starts, pixels = whole.argmax(1), whole.sum(1)
    strides = set(np.diff(starts).tolist())
    assert len(set(pixels.tolist())) == 1
    assert len(strides) == 1
    return pixels[0], strides.pop()


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_measured_geometry_is_the_declared_one(name):
    net, size = seeded(name), own_size(name)
    measured = probe_grid(net, size, batch_size=32)
    assert geometry(measured.rows_seen) == declared_geometry(name)
    assert geometry(measured.cols_seen) == declared_geometry(name)
    assert derived(name).covers(measured)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_derived_grid_holds_on_images_that_are_not_square(name):
    net, (height, width) = seeded(name), own_size(name)
    size = (height + 3, width + 8)
    grid = derive_grid(net, size)
    assert grid.image_size == size
    assert grid.receptive_field == (ARCHITECTURES[name].receptive_field_px,) * 2
    report = check_locality(net, size, grid, batch_size=32)
    assert report.measured is None or grid.covers(report.measured)


@pytest.mark.parametrize("name", PADDED)
def test_without_padding_regions_see_whole_fields(name):
    net, size = seeded(name, padded=False), own_size(name)
    grid = derive_grid(net, size)
    receptive_field, stride = declared_geometry(name)
    assert (grid.rows_seen.sum(1) == receptive_field).all()
    assert (np.diff(grid.rows_seen.argmax(1)) == stride).all()
    assert grid.map_size[0] == (size[0] - receptive_field) // stride + 1
    measured = probe_grid(net, size, batch_size=32)
    np.testing.assert_array_equal(measured.rows_seen, grid.rows_seen)
    np.testing.assert_array_equal(measured.cols_seen, grid.cols_seen)
    assert derived(name).map_size >= grid.map_size  # padding only adds regions


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_folding_batch_norm_changes_nothing(name):
    size = own_size(name)
    scorer = RegionScorer(seeded(name), ["a", "b", "c"], size)
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(1))
    before, grid = scorer.real_scores(images), derived(name)
    scorer.fold_batch_norm()
    assert not any(isinstance(module, nn.BatchNorm2d) for module in scorer.modules())
    after = scorer.real_scores(images)
    assert before.abs().max() > 1e-3  # or the comparison would say nothing
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)
    folded = derive_grid(scorer.net, size)
    np.testing.assert_array_equal(folded.rows_seen, grid.rows_seen)
    np.testing.assert_array_equal(folded.cols_seen, grid.cols_seen)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_width_and_depth_are_free(name):
    architecture, size = ARCHITECTURES[name], own_size(name)
    plain, odd = seeded(name), seeded(name, width=11, depth=architecture.depth + 7)
    assert sum(p.numel() for p in odd.parameters()) > sum(p.numel() for p in plain.parameters())
    grid, expected = derive_grid(odd, size), derived(name)
    np.testing.assert_array_equal(grid.rows_seen, expected.rows_seen)
    with torch.no_grad():
        assert odd(torch.rand(1, 3, *size)).shape == (1, CLASSES, *grid.map_size)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("width", [1, 3])
def test_narrow_nets_run(name, width):
    assert derive_grid(seeded(name, width=width), own_size(name)).map_size


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_net_without_blocks_is_refused(name):
    refused(UsageError, "needs a depth of at least", ARCHITECTURES[name].build, CLASSES, WIDTH, 0, True)


@pytest.mark.parametrize(("name", "least"), [("resnet-rf9", 3), ("resnet-rf13", 5), ("resnet-rf14s2", 2)])
def test_depth_without_room_refused(name, least):
    ARCHITECTURES[name].build(CLASSES, WIDTH, least, True)
    with pytest.raises(UsageError, match=f"at least {least} blocks, got {least - 1}"):
        ARCHITECTURES[name].build(CLASSES, WIDTH, least - 1, True)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_images_too_small_refused(name):
    if name in PADDED:
        derive_grid(seeded(name), (4, 4))  # padding makes up for what is missing
        return
    scorer = RegionScorer(seeded(name), ["a", "b", "c"], own_size(name))
    refused(UsageError, "cannot be traced on an image of 3x7x7", scorer.score_map, torch.rand(1, 3, 7, 7))


def test_an_unknown_name_is_answered_with_the_nearest():
    assert get_architecture("bagnet17") is ARCHITECTURES["bagnet17"]
    refused(UsageError, "did you mean resnet-rf10s2", get_architecture, "resnet-rf10-s2")
    refused(UsageError, r"choose from .*bagnet33", get_architecture, "zzz")
