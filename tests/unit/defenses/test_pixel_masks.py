"""Mask sets hide every patch, of every size."""

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.defenses.pixel_masks import MaskedClassifier, PixelMasks, axis_masks, covered, stride_for
from bagcert.defenses.undefended import Undefended
from bagcert.errors import UsageError
from bagcert.threat import PatchThreatModel
from tests import oracle, refused
from tests.unit.defenses import masking


def hides(starts, side, start, patch):
    return any(mask <= start and start + patch <= mask + side for mask in starts)


def test_masks_of_one_axis_hide_every_placement():
    for image in range(1, 41):
        for patch in range(1, image):
            for masks in range(1, 9):
                starts, side = axis_masks(image, patch, stride_for(image, patch, masks))
                assert (starts, side) == masking.axis_rule(image, patch, masks)
                assert len(starts) <= masks
                assert starts[0] == 0
                assert starts[-1] + side == image
                assert all(hides(starts, side, start, patch) for start in range(image - patch + 1))


def test_strides_hide_every_placement():
    for image in range(1, 25):
        for patch in range(1, image + 1):
            for stride in range(1, 12):
                starts, side = axis_masks(image, patch, stride)
                assert all(hides(starts, side, start, patch) for start in range(image - patch + 1))
                assert side <= patch + stride - 1
                assert starts[-1] + side == image


def test_six_masks_per_axis():
    threat = PatchThreatModel.parse(5, (32, 32))
    masks = PixelMasks.per_axis(threat, 6)
    assert len(masks) == 36
    assert [tuple(mask) for mask in masks.rectangles[:, 0].tolist()] == masking.rectangles(
        [[masking.axis_rule(32, 5, 6)] * 2]
    )
    assert not masks.completed.any()
    # a 3 px side of an 8 px image has six placements, a 6 px side only three
    assert len(PixelMasks.per_axis(PatchThreatModel.parse(6, (8, 8)), 6)) == 9


@pytest.mark.parametrize("patch", ["2", "2x3", "1x4+3x1", "area:4", "2*2", "2*1x3+2x1"])
@pytest.mark.parametrize("build", [lambda t: PixelMasks.per_axis(t, 2), lambda t: PixelMasks.strided(t, 3)])
def test_every_attack_lies_under_one_mask(patch, build):
    threat = PatchThreatModel.parse(patch, (5, 7))
    masks = covered(build(threat).rectangles, (5, 7)).numpy()
    places = masking.placements((5, 7), threat.shapes)
    attacks = masking.mask_unions(places, threat.patches, (5, 7))
    assert all(((masks & attack) == attack).all((1, 2)).any() for attack in attacks)


def test_restricted_placements_are_hidden_too():
    allowed = np.zeros((6, 6), dtype=bool)
    allowed[1:4, 4:] = allowed[4:, :1] = True
    threat = PatchThreatModel((6, 6), ((2, 1), (3, 2)), allowed=allowed)
    masks = covered(PixelMasks.per_axis(threat, 3).rectangles, (6, 6)).numpy()
    places = [(*corner, *shape) for shape, *corner in oracle.promised((6, 6), threat.shapes, allowed)]
    assert len(places) == 18 + 3
    for attack in masking.mask_unions(places, 1):
        assert ((masks & attack) == attack).all((1, 2)).any()


def test_masks_that_leave_nothing():
    masks = PixelMasks.per_axis(PatchThreatModel.parse("1x3", (1, 5)), 3)
    assert masks.rectangles[:, 0].tolist() == [[0, 0, 1, 3], [0, 1, 1, 3], [0, 2, 1, 3]]
    assert masks.completing.tolist() == [[False, False, True], [False, False, False], [True, False, False]]
    assert masks.completed.tolist() == [True, False, True]
    assert not masks.whole.any()
    assert PixelMasks.per_axis(PatchThreatModel.parse("1x5", (1, 5)), 3).whole.tolist() == [True]


def test_too_many_and_senseless_masks_are_refused():
    threat = PatchThreatModel.parse("3*2", (32, 32))
    refused(UsageError, r"8,436 unions of 3 of 36, more than 3,000; use fewer per axis", PixelMasks.per_axis, threat, 6)
    refused(UsageError, "at least one mask per axis, got 0", PixelMasks.per_axis, threat, 0)
    refused(UsageError, "stride of masks must be at least 1 px, got 0", PixelMasks.strided, threat, 0)
    plain = Undefended(nn.Flatten(), ("a", "b"), (4, 4))
    for fill, batch_size, tolerance, said in [
        ((0.1, 0.2), 8, 0.0, "one value or three"),
        (1.5, 8, 0.0, "each in"),
        (0.5, 0, 0.0, "batch size must be at least 1"),
        (0.5, 8, -1.0, "at least 0; got -1.0"),
        (0.5, 8, float("nan"), "at least 0; got nan"),
    ]:
        refused(UsageError, said, MaskedClassifier, plain, fill, batch_size, tolerance)


def test_memory_is_bounded_by_the_batch_size():
    seen = []

    class Counting(nn.Module):
        def forward(self, x):
            seen.append(len(x))
            return x.mean((2, 3))

    masked = MaskedClassifier(Undefended(Counting(), masking.NAMES, (6, 6)), (0.1, 0.2, 0.3), 7, 0.0)
    masks = PixelMasks.per_axis(PatchThreatModel.parse(2, (6, 6)), 2)
    image = torch.arange(20) % 3
    found, _ = masked.labels(torch.rand(3, 3, 6, 6), masks, image, torch.arange(20) % 4, torch.arange(20) % 2)
    assert seen == [7, 7, 6]
    assert len(found) == 20
