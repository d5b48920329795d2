"""Placements and pasting, against plain loops; what left its threat is never taken for a success."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bagcert.attacks.patches import canvas_size, cut, every_placement, paste, random_placements, stays_inside
from bagcert.errors import UsageError
from bagcert.threat import PatchThreatModel
from tests import oracle


@st.composite
def threats(draw):
    size = draw(st.tuples(st.integers(3, 7), st.integers(3, 7)))
    shapes = draw(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3))
    allowed = None
    if draw(st.booleans()):
        cells = draw(st.lists(st.booleans(), min_size=size[0] * size[1], max_size=size[0] * size[1]))
        allowed = np.array(cells).reshape(size)
    patches = draw(st.integers(1, 2))
    try:
        return PatchThreatModel(size, tuple(shapes), patches, allowed)
    except UsageError:  # no room under the mask
        return PatchThreatModel(size, tuple(shapes), patches)


def pasted_by_hand(image, contents, placements):
    image = image.copy()
    for content, (top, left, height, width) in zip(contents, placements, strict=True):
        image[top : top + height, left : left + width] = content[:height, :width]
    return image


@settings(max_examples=60, deadline=None)
@given(threats(), st.integers(0, 2**31))
def test_pasting_changes_the_placement_alone(threat, seed):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, *threat.image_size, 3), generator=generator, dtype=torch.uint8)
    size = (4, threat.patches, *canvas_size(threat), 3)
    contents = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8)
    placements = random_placements(threat, 4, generator)
    patched = paste(images, contents, placements)
    for row in range(4):
        expected = pasted_by_hand(images[row].numpy(), contents[row].numpy(), placements[row].tolist())
        assert np.array_equal(patched[row].numpy(), expected)
        known = oracle.promised(threat.image_size, threat.shapes, threat.allowed)
        for top, left, height, width in placements[row].tolist():
            assert ((height, width), top, left) in known
    assert stays_inside(threat, images, patched, placements).all()
    assert torch.equal(paste(images, cut(images, placements, canvas_size(threat)), placements), images)


@settings(max_examples=60, deadline=None)
@given(threats())
def test_every_placement_is_that_of_the_definition(threat):
    known = oracle.maximal(oracle.promised(threat.image_size, threat.shapes, threat.allowed))
    found = [((h, w), top, left) for top, left, h, w in every_placement(threat).tolist()]
    assert sorted(found) == sorted(known)


def test_random_placements_reach_every_place():
    threat = PatchThreatModel.parse("2x3", (6, 7))
    drawn = random_placements(threat, 2000, torch.Generator().manual_seed(0))[:, 0]
    assert {tuple(place) for place in drawn.tolist()} == {(i, j, 2, 3) for i in range(5) for j in range(5)}


def test_a_single_pixel_outside_the_placement_is_seen():
    threat = PatchThreatModel.parse("2", (4, 4))
    images = torch.zeros(16, 4, 4, 3, dtype=torch.uint8)
    patched = images.clone()
    for row in range(16):
        patched[row, row // 4, row % 4, row % 3] = 1
    inside = stays_inside(threat, images, patched, torch.tensor([1, 1, 2, 2]).expand(16, 1, 4))
    assert inside.nonzero()[:, 0].tolist() == [5, 6, 9, 10]


@pytest.mark.parametrize(
    "placements",
    [[[0, 0, 2, 3]], [[-1, 0, 2, 2]], [[0, 3, 2, 2]], [[3, 0, 2, 2]], [[0, 0, 2, 2], [2, 2, 2, 2]], [[0, 0, 2, 2]]],
    ids=["shape", "above", "right", "below", "two", "forbidden"],
)
def test_placements_the_threat_does_not_have_are_seen(placements):
    allowed = np.ones((4, 4), dtype=bool)
    allowed[0, 0] = False
    threat = PatchThreatModel.parse("2", (4, 4), allowed)
    images = torch.zeros(1, 4, 4, 3, dtype=torch.uint8)
    assert not stays_inside(threat, images, images, torch.tensor([placements])).any()
    assert stays_inside(threat, images, images, torch.tensor([[[1, 1, 2, 2]]])).all()
