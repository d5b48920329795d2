"""Attacks through the front door: they break what can be broken, and nothing that is certified."""

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from bagcert import load
from bagcert.attacks import ATTACKS, Settings, attack
from bagcert.attacks.victim import Victim
from bagcert.data import load_dataset
from bagcert.defenses.bagcert import BagCert
from bagcert.defenses.undefended import Undefended
from bagcert.errors import BagcertError, UsageError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import RULES
from bagcert.threat import PatchThreatModel
from tests import refused, tiny

QUICK = Settings(steps=6, restarts=1, placements=4)
LABELS = np.arange(9) % 3
IMAGES = tiny.pixels(LABELS, tint=120)


@cache
def digits():
    return load("digits", "cpu")


def mean_color() -> Undefended:
    return Undefended(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), tiny.COLORS, (8, 8))


def binary_model() -> BagCert:
    layer = nn.Conv2d(3, 3, 1)
    layer.weight.data = (4 * torch.eye(3) - 2)[:, :, None, None].clone()
    layer.bias.data.fill_(-0.05)
    return BagCert(RegionScorer(nn.Sequential(layer), tiny.COLORS, (8, 8), "binary"), "vote", patch="3")


@pytest.mark.parametrize("name", list(ATTACKS))
def test_an_undefended_classifier_is_broken(name):
    library = [torch.tensor(color, dtype=torch.uint8).expand(1, 5, 5, 3) for color in np.eye(3, dtype=int) * 255]
    result = attack(mean_color(), IMAGES, LABELS, 5, attacks=[name], settings=QUICK, library=library)
    assert result.clean_accuracy == 1
    assert result.certified_accuracy == 0
    assert result.attacked_accuracy < 0.3
    for i, pixels in result.patched.items():
        record = result.records[i]
        ((top, left, height, width),) = record.placement
        differs = (pixels != IMAGES[i]).any(2)
        differs[top : top + height, left : left + width] = False
        assert (height, width) == (5, 5)
        assert not differs.any()
        assert mean_color().predict(pixels[None]).tolist() == [record.patched_prediction] != [record.prediction]
        assert record.attack == name


@pytest.mark.parametrize("name", list(ATTACKS))
@pytest.mark.parametrize("rule", list(RULES))
def test_nothing_certified_breaks(name, rule):
    model = tiny.color_model(rule)
    library = [torch.full((1, 2, 2, 3), 255, dtype=torch.uint8)]
    images = tiny.pixels(LABELS, tint=200)
    result = attack(model, images, LABELS, 2, rule=rule, attacks=[name], settings=QUICK, library=library)
    assert result.alarms == []
    assert result.certified_accuracy <= result.attacked_accuracy <= result.clean_accuracy
    assert all(record.attempts > 0 for record in result.records)


@pytest.mark.parametrize("patch", [1, 2])
def test_certified_digits_hold(patch):
    images = load_dataset("digits", limit=16)
    result = attack(digits(), images.array(), images.labels, patch, settings=QUICK)
    assert result.certified_accuracy > 0.4
    assert result.alarms == []
    assert all(record.attempts >= 16 for record in result.records if record.certified)
    if patch == 2:
        assert result.attacked_accuracy < result.clean_accuracy


def test_the_gradient_attack_is_stronger_than_random_contents():
    images = load_dataset("digits", limit=16)
    options = {"rule": "vote", "settings": Settings(steps=20, restarts=1, placements=6)}
    gradient, random = (
        attack(digits(), images.array(), images.labels, 2, attacks=[name], **options).broken.sum()
        for name in ("gradient", "random")
    )
    assert gradient > random


@pytest.mark.parametrize("rule", ["vote", "double-masking"])
def test_heads_without_slope_are_broken_all_the_same(rule):
    images = tiny.pixels(LABELS, tint=40)
    for name in ("gradient", "score-map"):
        result = attack(binary_model(), images, LABELS, "4", rule=rule, attacks=[name], settings=QUICK)
        assert result.broken.sum() >= 3
        assert result.alarms == []


@pytest.mark.parametrize("patch", ["1x4", "area:4", "1x3+3x1", "2*2"])
@pytest.mark.parametrize("rule", ["vote", "double-masking"])
def test_every_threat_is_attacked_within_its_placements(patch, rule):
    allowed = np.zeros((8, 8), dtype=bool)
    allowed[3:, 2:] = True
    threat = PatchThreatModel.parse(patch, (8, 8), allowed)
    images = tiny.pixels(LABELS, tint=8)
    result = attack(tiny.color_model(rule), images, LABELS, threat, rule=rule, settings=QUICK)
    assert result.broken.any()
    assert result.alarms == []
    for i, pixels in result.patched.items():
        assert not (pixels != images[i]).any(2)[~allowed].any()
        assert len(result.records[i].placement) == threat.patches
        assert {tuple(place[2:]) for place in result.records[i].placement} <= set(threat.shapes)


def test_every_placement_can_be_asked_for():
    model, image = tiny.color_model(), tiny.pixels(LABELS[:1], tint=200)
    few = attack(model, image, LABELS[:1], 1, attacks=["gradient"], settings=Settings(5, 1, 1))
    every = attack(model, image, LABELS[:1], 1, attacks=["gradient"], settings=Settings(5, 1, None))
    assert not every.broken.any()
    assert every.attempts == 64 * few.attempts  # of an 8x8 image


def test_a_seed_fixes_the_result():
    def run(seed):
        options = {"attacks": ["gradient", "transfer"], "seed": seed, "settings": QUICK}
        result = attack(tiny.color_model(), tiny.pixels(LABELS), LABELS, 4, rule=None, **options)
        return result.records, {i: pixels.tobytes() for i, pixels in result.patched.items()}

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_transfer_uses_what_was_found_elsewhere():
    library: list[torch.Tensor] = []
    attack(tiny.color_model(), IMAGES, LABELS, 4, attacks=["gradient"], settings=QUICK, library=library)
    assert library
    others = tiny.pixels(LABELS, tint=60, seed=1)
    result = attack(tiny.color_model(), others, LABELS, 4, attacks=["transfer"], settings=QUICK, library=library)
    assert result.broken.any()
    nothing = attack(tiny.color_model(), others, LABELS, 4, attacks=["transfer"], settings=QUICK)
    assert nothing.attempts == 0


def test_detection_is_not_broken_by_an_alert():
    model = tiny.color_model("detection")
    images = tiny.pixels(LABELS, tint=60)
    loud = attack(model, images, LABELS, 4, rule="vote", settings=QUICK)
    silent = attack(model, images, LABELS, 4, rule="detection", settings=QUICK)
    assert loud.broken.sum() > silent.broken.sum()
    for i, pixels in silent.patched.items():
        found = model.certify(pixels[None], 4)
        assert bool(found.certified)
        assert int(found.prediction) != silent.records[i].prediction


def test_a_patch_outside_the_threat_is_an_error_and_no_success():
    victim = Victim(mean_color(), IMAGES, PatchThreatModel.parse(2, (8, 8)), "none")
    contents = torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8)
    with pytest.raises(BagcertError, match="the tried attack left its threat 2 at the placement"):
        victim.submit("tried", torch.tensor([0]), contents, torch.tensor([[[7, 7, 2, 2]]]))
    assert not victim.broken.any()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"images": IMAGES / 255}, r"must be a uint8 array \[batch, height, width, channels\], got float64"),
        ({"images": IMAGES[0], "labels": LABELS[:8]}, r"got uint8 \[8, 8, 3\]"),
        ({"labels": LABELS[:3]}, "one label per image, got 9 images and labels"),
        ({"attacks": ["gradint"]}, "unknown attack 'gradint'; did you mean gradient?"),
        ({"rule": "votes"}, "unknown rule 'votes'"),
        ({"patch": 9}, "does not fit"),
    ],
)
def test_mistakes_are_named(changes, sentence):
    arguments = {"images": IMAGES, "labels": LABELS, "patch": 2, **changes}
    refused(UsageError, sentence, attack, tiny.color_model(), **arguments)


@pytest.mark.parametrize("name", ["steps", "restarts", "placements", "rows"])
def test_settings_are_checked(name):
    refused(UsageError, f"the attack's {name} must be at least 1, got 0", Settings, **{name: 0})
    refused(UsageError, "seed must be at least 0", Settings, seed=-1)
