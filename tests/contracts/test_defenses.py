"""Every defense of the table keeps the promise of its interface, and its certificates hold under attack."""

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.defenses.base import Defense, Detector
from bagcert.defenses.table import DEFENSES, TRAININGS, Setting, get_entry
from bagcert.errors import UsageError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.threat import PatchThreatModel
from bagcert.training.recipe import load_recipe
from tests import refused, tiny

SIZE = (8, 8)
THREAT = PatchThreatModel.parse(2, SIZE)
LABELS = np.arange(9) % 3
NAMES = (*DEFENSES, "attention-pooling")
every_defense = pytest.mark.parametrize("name", NAMES)


def changes_of(name: str) -> tuple[str, ...]:
    """What the network's training changes in a recipe; a model that pools by attention has a recipe of its own."""
    return () if name == "attention-pooling" else TRAININGS[DEFENSES[name].training].changes


def deployed(name: str):
    """The defense around a network that sums each image's color channels: right, and hard to fool."""
    if name == "attention-pooling":
        return tiny.attention_model()
    changes = changes_of(name)
    channels = 6 if any(change.startswith("augment.ablation=") for change in changes) else 3
    head = "binary" if "model.head=binary" in changes else "fixed-point"
    layer = nn.Conv2d(channels, 3, 1)
    layer.weight.data = 20 * torch.eye(3, channels)[:, :, None, None]
    layer.bias.data.fill_(-8 if head == "binary" else 0)
    mean, std = [0.0] * channels, [1.0] * channels
    scorer = RegionScorer(nn.Sequential(layer), tiny.COLORS, SIZE, head, 100.0, mean, std).eval()
    return DEFENSES[name].deploy(Setting(scorer, "2", 2, 4))


def images() -> np.ndarray:
    """Some plainly tinted, some hardly."""
    return np.concatenate([tiny.pixels(LABELS[:6], tint=200), tiny.pixels(LABELS[6:], tint=20, seed=1)])


def attacked(pixels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Every image with a patch at a place of its own: all of one color, black, white, or noise."""
    patched = pixels.copy()
    for image in patched:
        top, left = random.integers(0, 7, 2)
        content = random.integers(0, 256, (2, 2, 3)) if random.random() < 0.3 else random.choice([0, 255], 3)
        image[top : top + 2, left : left + 2] = content
    return patched


@every_defense
def test_prediction_and_certificate_agree(name):
    defense, pixels = deployed(name), images()
    answers, certificate = defense.predict(pixels, THREAT), defense.certify(pixels, THREAT)
    assert torch.equal(answers, certificate.prediction)
    assert answers.dtype == torch.int64
    assert torch.equal(certificate.certified, certificate.margin >= 0)
    assert certificate.threat == THREAT
    windows = certificate.worst_placement.shape[1]
    assert certificate.worst_placement.shape == (len(pixels), windows, 4)
    assert (answers[:6].numpy() == LABELS[:6]).all()


@every_defense
def test_answers_do_not_depend_on_the_batch(name):
    defense, pixels = deployed(name), images()
    together = defense.certify(pixels, THREAT)
    for i in range(len(pixels)):
        alone = defense.certify(pixels[i : i + 1], THREAT)
        assert int(alone.prediction[0]) == int(together.prediction[i])
        assert bool(alone.certified[0]) == bool(together.certified[i])


@every_defense
def test_one_image_needs_no_batch_axis(name):
    defense, pixels = deployed(name), images()[:1]
    floats = pixels.transpose(0, 3, 1, 2).astype(np.float32) / 255
    for batch in (pixels, floats, torch.from_numpy(floats)):
        for patch in ("2", THREAT):
            whole, alone = defense.certify(batch, patch), defense.certify(batch[0], patch)
            assert alone.threat == whole.threat == THREAT
            for found in ("prediction", "certified", "margin", "worst_placement"):
                assert torch.equal(getattr(alone, found), getattr(whole, found)), found
            assert torch.equal(defense.predict(batch[0], patch), whole.prediction)


@every_defense
def test_what_is_certified_holds(name):
    defense, pixels = deployed(name), images()
    certificate = defense.certify(pixels, THREAT)
    certified, before = certificate.certified, certificate.prediction
    if defense.guarantee == "none":
        assert not certified.any()
        return
    assert certified.any(), "a test in which nothing is certified would say nothing"
    random = np.random.default_rng(0)
    for _ in range(40):
        patched = attacked(pixels, random)
        changed = certified & (defense.predict(patched, THREAT) != before)
        if defense.guarantee == "detection":
            changed &= ~defense.alert(patched, THREAT)
        assert not changed.any()


@every_defense
def test_interface(name):
    defense = deployed(name)
    assert isinstance(defense, Defense)
    if name != "attention-pooling":
        assert isinstance(defense, Detector) == (defense.guarantee == "detection")


@every_defense
def test_costs(name):
    defense = deployed(name)
    predict, certify = (defense.forward_passes(THREAT, certify=certify) for certify in (False, True))
    assert 1 <= predict <= certify
    assert defense.guarantee in ("recovery", "detection", "none")
    assert defense.name


@every_defense
def test_training_is_a_recipe(name):
    changes = [change.format(patch=2, column=2, block=4) for change in changes_of(name)]
    assert load_recipe("digits", changes).name == "digits"


def test_an_unknown_defense_is_answered_with_the_nearest():
    refused(UsageError, "did you mean patchcleanser", get_entry, "patchclenser")
