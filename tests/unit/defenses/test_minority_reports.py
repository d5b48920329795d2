"""Minority Reports: an attacked image keeps its answer or raises the alert, in the corners, too."""

from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.defenses.minority_reports import MinorityReports
from bagcert.errors import UsageError
from bagcert.threat import PatchThreatModel
from tests import refused
from tests.unit.defenses import masking


class Corner(nn.Module):
    """Class 1 if the last pixel of the image is white, class 0 otherwise."""

    def forward(self, x):
        last = x[:, 0, -1, -1]
        return torch.stack([torch.full_like(last, 0.75), last], 1)


def reporter(model, patch="2", stride=1, tolerance=0.0, **options):
    return MinorityReports(
        model, masking.NAMES, masking.SIZE, patch=patch, stride=stride, tolerance=tolerance, **options
    )


def masks_every(stride, shape, corners=True, size=masking.SIZE):
    """Rectangles at every `stride` pixels; with `corners` at the far border, too."""
    axes = []
    for image, patch in zip(size, shape, strict=True):
        step = min(stride, image - patch + 1)
        side = patch + step - 1
        starts = list(range(0, image - side + 1, step)) if corners else list(range(1, image - side, step))
        if corners and starts[-1] != image - side:
            starts.append(image - side)
        axes.append((starts, side))
    return masking.rectangles([axes])


def reference(model, image, masks):
    """The plain label, and whether all masked labels equal it."""
    label = masking.label_of(model, image, np.zeros(image.shape[1:], dtype=bool))
    return label, all(masking.label_of(model, image, mask) == label for mask in masks)


@pytest.mark.parametrize(
    ("patch", "stride", "batch_size"), [("2", 1, 256), ("2", 2, 3), ("1x3", 2, 40), ("2", 9, 5), ("6", 1, 5)]
)
def test_answer_and_alert_follow_the_definition(patch, stride, batch_size):
    shape = PatchThreatModel.parse(patch, masking.SIZE).shapes[0]
    masks = masking.mask_unions(masks_every(stride, shape), 1)
    outcomes = set()
    for seed, noise in ((1, 0.1), (2, 0.6)):
        model, images = masking.example(seed, 5, noise)
        defense = reporter(model, patch, stride, batch_size=batch_size)
        found = defense.certify(images)
        assert defense.predict(images).tolist() == found.prediction.tolist()
        assert (defense.alert(images) == ~found.certified).all()
        for i, image in enumerate(images):
            label, quiet = reference(model, image, masks)
            assert (found.prediction[i], found.certified[i]) == (label, quiet)
            assert found.margin[i] == (0 if quiet else -1)
            worst = masking.union_of(found.worst_placement[i].tolist())
            assert (masking.label_of(model, image, worst) == label) == quiet
            outcomes.add(quiet)
    if patch == "2" and stride < 9:
        assert outcomes == {True, False}
    if patch == "6":
        assert outcomes == {False}  # the only mask leaves no pixel


def test_several_patches_have_unions_of_masks():
    model, images = masking.example(1, 3)
    masks = masking.mask_unions(masks_every(2, (1, 1)), 2)
    found = reporter(model, "2*1", 2).certify(images)
    assert found.worst_placement.shape == (3, 2, 4)
    assert [reference(model, image, masks)[1] for image in images] == found.certified.tolist()


@pytest.mark.parametrize(("patch", "stride"), [("2", 1), ("2", 3), ("1x3+3x1", 2), ("2*1", 2)])
def test_no_content_gives_a_wrong_answer_without_an_alert(patch, stride):
    threat = PatchThreatModel.parse(patch, masking.SIZE)
    random = np.random.default_rng(0)
    content = masking.contents(random, 2)
    places = masking.placements(masking.SIZE, threat.shapes)
    model, images = masking.example(1, 4, noise=0.2)
    defense = reporter(model, patch, stride)
    found = defense.certify(images)
    unnoticed = wrong = 0
    for image, label, holds in zip(images, found.prediction, found.certified, strict=True):
        chosen = [[place] for place in places]
        if threat.patches == 2:
            chosen = [[places[i] for i in random.integers(0, len(places), 2)] for _ in range(12)]
            chosen.append([places[0], places[-1]])
        attacked = np.concatenate([masking.attacked(image, one, content) for one in chosen])
        changed = defense.predict(attacked) != label
        wrong += int(changed.sum())
        if holds:
            unnoticed += int((changed & ~defense.alert(attacked)).sum())
    assert bool(found.certified.any())
    assert wrong > 0  # there is something to notice
    assert unnoticed == 0


def test_grid_without_corners_certifies_falsely():
    """The published grid hides no pixel of the border; an attack in the corner then raises no alert."""
    clean, size = np.zeros((1, 3, 6, 6), dtype=np.float32), (6, 6)
    attacked = clean.copy()
    attacked[:, :, 4:, 4:] = 1  # one 2x2 patch
    for stride in (1, 2):
        without = masking.mask_unions(masks_every(stride, (2, 2), corners=False), 1)
        assert not any(mask[5, 5] for mask in without)
        assert reference(Corner(), clean[0], without) == (0, True)
        assert reference(Corner(), attacked[0], without) == (1, True)  # wrong, and no alert: a false certificate
        defense = MinorityReports(Corner(), ("dark", "white"), size, patch=2, stride=stride)
        assert defense.certify(clean).certified.item()
        assert defense.predict(attacked).item() == 1
        assert defense.alert(attacked).item()


def test_every_placement_is_under_a_mask_that_the_defense_uses():
    for patch, stride in product(("1", "2", "3x1", "2x5"), (1, 2, 3, 4, 7)):
        threat = PatchThreatModel.parse(patch, (6, 7))
        defense = MinorityReports(Corner(), ("dark", "white"), (6, 7), patch=patch, stride=stride)
        rectangles = defense.masks(threat).rectangles[:, 0].tolist()
        for top, left, h, w in masking.placements((6, 7), threat.shapes):
            assert any(
                y <= top and x <= left and top + h <= y + height and left + w <= x + width
                for y, x, height, width in rectangles
            )


def test_pass_counts():
    defense = reporter(masking.network(0), "2", 1)
    threat = PatchThreatModel.parse(2, masking.SIZE)
    assert defense.forward_passes(threat, certify=True) == 1 + 25
    assert defense.forward_passes(threat, certify=False) == 1
    assert reporter(masking.network(0), "2", 2).forward_passes(threat, certify=True) == 1 + 9


def test_masks_tried_up_to_the_first_disagreement():
    asked = []

    class Counting(Corner):
        def __init__(self, turned):
            super().__init__()
            self.turned = turned

        def forward(self, x):
            asked.append(len(x))
            return super().forward(x.flip(2, 3) if self.turned else x)

    white = np.ones((1, 3, 6, 6), dtype=np.float32)
    for turned, masks in ((False, 25), (True, 1)):  # only the last mask hides the last pixel, only the first the first
        asked.clear()
        defense = MinorityReports(Counting(turned), ("dark", "white"), (6, 6), patch=2, stride=1, batch_size=1)
        assert defense.alert(white).item()
        assert sum(asked) == 1 + masks


def test_a_lead_within_rounding_raises_the_alert():
    class Near(nn.Module):
        def forward(self, x):
            return torch.stack([x[:, 0].mean((1, 2)), x[:, 0].mean((1, 2)) - 1e-6], 1)

    gray = np.full((1, 3, 6, 6), 0.5, dtype=np.float32)
    for tolerance, alert in ((0.0, False), (1e-4, True)):
        defense = MinorityReports(Near(), ("a", "b"), (6, 6), patch=2, tolerance=tolerance)
        assert defense.alert(gray).item() is alert


def test_mistakes_are_named():
    model = masking.network(0)
    with pytest.raises(UsageError, match="no rule 'vote'; leave it out, or give 'minority-reports'"):
        reporter(model).predict(masking.images(0, 1), rule="vote")
    refused(UsageError, "stride of masks must be at least 1 px, got 0", reporter, model, stride=0)
    refused(UsageError, "does not fit", reporter, model, "7")
