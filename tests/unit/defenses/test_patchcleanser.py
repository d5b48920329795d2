"""PatchCleanser against its definition, pair by pair, and against attacks."""

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.defenses.patchcleanser import PatchCleanser
from bagcert.errors import UsageError
from bagcert.threat import PatchThreatModel
from tests import refused
from tests.unit.defenses import masking


class Counting(nn.Module):
    """Counts the images it is asked about, and the largest batch."""

    def __init__(self, model):
        super().__init__()
        self.model, self.asked, self.largest = model, 0, 0

    def forward(self, x):
        self.asked, self.largest = self.asked + len(x), max(self.largest, len(x))
        return self.model(x)


class Pixels(nn.Module):
    """One logit per listed weight map [3, height, width], so that labels can be set up by hand."""

    def __init__(self, *maps):
        super().__init__()
        self.maps = torch.stack([torch.as_tensor(one, dtype=torch.float32) for one in maps])

    def forward(self, x):
        return torch.einsum("bchw,kchw->bk", x, self.maps)


def cleanser(model, patch="2", masks=3, tolerance=0.0, **options):
    options |= {"patch": patch, "masks_per_axis": masks, "tolerance": tolerance}
    return PatchCleanser(model, masking.NAMES, masking.SIZE, **options)


def by_hand(maps, masks):
    """On one row of six pixels, of which masks for a patch of one pixel hide strips."""
    options = {"patch": 1, "masks_per_axis": masks, "fill": 0.0, "tolerance": 0.0}
    return PatchCleanser(Pixels(*maps), masking.NAMES, (1, 6), **options)


def reference_masks(patch, k):
    threat = PatchThreatModel.parse(patch, masking.SIZE)
    axes = [[masking.axis_rule(6, side, k) for side in shape] for shape in threat.shapes]
    return masking.mask_unions(masking.rectangles(axes), threat.patches)


@pytest.mark.parametrize(
    ("patch", "masks", "batch_size"),
    [("2", 3, 256), ("2", 3, 1), ("1x3", 2, 10), ("1x3+2x1", 3, 50), ("5", 2, 7), ("6", 2, 7), ("2*1", 3, 100)],
)
def test_prediction_and_certificate_follow_the_definition(patch, masks, batch_size):
    """Every label of every pair by itself, and the rule word for word."""
    hidden = reference_masks(patch, masks)
    seen = {"certified": 0, "second round": 0, "refuted": 0}
    for seed, noise in ((1, 0.1), (2, 0.6)):
        model, images = masking.example(seed, 4 if patch != "2*1" else 3, noise)
        defense = cleanser(model, patch, masks, batch_size=batch_size)
        found = defense.certify(images)
        assert defense.predict(images).tolist() == found.prediction.tolist()
        for i, image in enumerate(images):
            table = masking.pair_table(model, image, hidden)
            plain = masking.label_of(model, image, np.zeros(masking.SIZE, dtype=bool))
            label, certified = masking.double_masking(table, plain)
            assert (found.prediction[i], found.certified[i]) == (label, certified)
            assert found.margin[i] == (0 if certified else -1)
            first = [table[m][m] for m in range(len(table))]
            seen["certified"] += certified
            seen["refuted"] += not certified
            seen["second round"] += len(set(first)) > 1
            hidden_by_worst = masking.union_of(found.worst_placement[i].tolist())
            # The worst pair is a disagreeing one wherever there is one.
            assert (masking.label_of(model, image, hidden_by_worst) == label) == certified
    if patch in ("2", "1x3+2x1"):
        assert min(seen.values()) > 0, seen


def test_the_first_disagreeing_pair_is_reported():
    hidden = reference_masks("2", 3)
    rectangles = masking.rectangles([[masking.axis_rule(6, 2, 3)] * 2])
    by_pairs = 0
    for seed in (0, 1, 2):
        model, images = masking.example(seed, 6)
        found = cleanser(model, batch_size=5).certify(images)
        for i in (~found.certified).nonzero()[:, 0].tolist():
            table, label = masking.pair_table(model, images[i], hidden), int(found.prediction[i])
            singles = [(m, m) for m in range(9) if table[m][m] != label]
            pairs = [(m, n) for m in range(9) for n in range(m + 1, 9) if table[m][n] != label]
            m, n = (singles + pairs)[0]
            assert [tuple(r) for r in found.worst_placement[i].tolist()] == [rectangles[m], rectangles[n]]
            by_pairs += not singles
    assert by_pairs > 0


def test_a_later_disagreer_decides_where_an_earlier_one_fails():
    """Four masks of 1x6 that are strips: labels by hand."""
    # k = 3 strips of two columns each on one row of pixels, patch 1 px: masks hide columns 0-1, 2-3, 4-5
    maps = np.zeros((3, 3, 1, 6))
    maps[0, 0, 0], maps[1, 0, 0], maps[2, 0, 0] = [1, 1, 0, 0, 0, 0], [0, 0, 1.1, 1.1, 0, 0], [0, 0, 0, 0, 1.2, 1.2]
    image = np.ones((1, 3, 1, 6), dtype=np.float32)
    # first round: 2, 2, 1. The majority is 2; mask three says 1, but 0 with mask two.
    assert by_hand(maps, 3).predict(image).tolist() == [2]
    # Raise class 1 a little everywhere but under mask three: its pairs all say 1 now.
    maps[1, 1, 0, :4] = 3
    maps[2, 1, 0, 4:] = 9
    defense = by_hand(maps, 3)
    assert defense.predict(image).tolist() == [1]
    assert not defense.certify(image).certified.item()


def test_majority_ties_go_to_the_lowest_class():
    # two masks: hiding the left half shows class 2, hiding the right half class 1; each fails with the other
    maps = np.zeros((3, 3, 1, 6))
    maps[2, 0, 0, 3:], maps[1, 0, 0, :3] = 1, 1
    defense = by_hand(maps, 2)
    assert len(defense.masks(PatchThreatModel.parse(1, (1, 6)))) == 2
    assert defense.predict(np.ones((1, 3, 1, 6), dtype=np.float32)).tolist() == [1]


def attacks(image, threat, content, random, count=None):
    """Attacked images at every placement, or at `count` drawn unions of several."""
    places = masking.placements(masking.SIZE, threat.shapes)
    if threat.patches == 1:
        chosen = [[place] for place in places]
    else:
        chosen = [[places[i] for i in random.integers(0, len(places), threat.patches)] for _ in range(count)]
        chosen.append([places[0], places[-1]])
    return np.concatenate([masking.attacked(image, one, content) for one in chosen])


@pytest.mark.parametrize("patch", ["2", "1x3+2x1", "2*1"])
def test_no_content_changes_a_certified_answer(patch):
    threat = PatchThreatModel.parse(patch, masking.SIZE)
    random = np.random.default_rng(0)
    model, images = masking.example(0, 4)
    defense = cleanser(model, patch)
    found = defense.certify(images)
    content = masking.contents(random, 2)
    changed = 0
    for image, label, holds in zip(images, found.prediction, found.certified, strict=True):
        answers = defense.predict(attacks(image, threat, content, random, 12))
        assert not holds or bool((answers == label).all())
        changed += bool((answers != label).any())
    assert bool(found.certified.any())
    assert changed > 0  # the attacks are strong enough to change what is not certified


def test_a_smaller_patch_than_deployed_is_covered():
    model, images = masking.example(1, 3)
    found = cleanser(model, "2").certify(images)
    assert bool(found.certified.any())
    content = masking.contents(np.random.default_rng(1), 2)
    small = PatchThreatModel.parse(1, masking.SIZE)
    for image, label in zip(images[found.certified.numpy()], found.prediction[found.certified], strict=True):
        answers = cleanser(model, "2").predict(attacks(image, small, content, None))
        assert bool((answers == label).all())


def test_pass_counts():
    threat = PatchThreatModel.parse(5, (32, 32))
    shallow = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = Counting(shallow)
    defense = PatchCleanser(model, masking.NAMES, (32, 32), patch=5)
    green = np.full((2, 32, 32, 3), (10, 200, 10), dtype=np.uint8)
    assert len(defense.masks(threat)) == 36
    assert defense.forward_passes(threat, certify=True) == 666
    assert defense.forward_passes(threat, certify=False) == 666 - 12 * 11 // 2
    assert defense.predict(green).tolist() == [1, 1]
    assert model.asked == 2 * 36  # unanimous: no second round
    model.asked = 0
    progress = []
    found = defense.certify(green, on_progress=lambda done, total: progress.append((done, total)))
    assert found.certified.all()
    assert (model.asked, model.largest) == (2 * 666, 256)
    assert progress == sorted(progress)
    assert progress[-1] == (2 * 666, 2 * 666)


def test_refuted_images_are_left_alone():
    network, images = masking.example(2, 8)
    model = Counting(network)
    one_by_one = cleanser(model, batch_size=1)
    threat = PatchThreatModel.parse(2, masking.SIZE)
    costs = []
    for image in images:
        model.asked = 0
        found = one_by_one.certify(image)
        costs.append((bool(found.certified), model.asked))
        assert model.asked <= one_by_one.forward_passes(threat, certify=True) == 45
        model.asked = 0
        one_by_one.predict(image)
        assert model.asked <= one_by_one.forward_passes(threat, certify=False)
    assert {asked for holds, asked in costs if holds} == {45}
    assert min(asked for holds, asked in costs if not holds) < 20


def test_a_lead_within_rounding_agrees_with_nothing():
    maps = np.zeros((3, 3, 6, 6))
    maps[1, 0], maps[2, 0] = 1e-6, 1e-6 - 1e-8
    image = np.ones((1, 3, 6, 6), dtype=np.float32)
    assert cleanser(Pixels(*maps)).certify(image).certified.item()
    found = cleanser(Pixels(*maps), tolerance=1e-4).certify(image)
    assert (found.prediction.item(), found.certified.item(), found.margin.item()) == (1, False, -1)
    assert not cleanser(Pixels(*maps * np.nan)).certify(image).certified.item()


def test_masks_take_the_fill_and_the_threat_its_size():
    seen = []

    class Looking(nn.Module):
        def forward(self, x):
            seen.append(x)
            return x.mean((2, 3))

    defense = PatchCleanser(Looking(), masking.NAMES, masking.SIZE, patch=2, masks_per_axis=2, fill=(0.1, 0.2, 0.3))
    defense.predict(np.ones((1, 3, 6, 6), dtype=np.float32))
    first = torch.cat(seen)[0]
    assert first[:, :4, :4].flatten(1).unique(dim=1).flatten().tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert bool((first[:, 4:] == 1).all())
    assert defense.certify(np.ones((1, 3, 8, 9), dtype=np.float32), patch=3).threat.image_size == (8, 9)


def test_mistakes_are_named():
    model = masking.network(0)
    images, threat = masking.images(0, 1), PatchThreatModel.parse(2, masking.SIZE)
    two = PatchCleanser(model, ("a", "b"), masking.SIZE, patch=2)
    for ask, message in (
        (lambda: cleanser(model).predict(images, rule="vote"), "no rule 'vote'; leave it out, or give 'patchcleanser'"),
        (lambda: cleanser(model, "7"), "does not fit"),
        (
            lambda: cleanser(model).certify(images, threat, placements=np.ones((6, 6), dtype=bool)),
            "cannot be combined with a PatchThreatModel",
        ),
        (lambda: two.predict(images), r"\[batch, 2\] logits"),
    ):
        refused(UsageError, message, ask)
