"""An independent attacker: the Adversarial Robustness Toolbox against certified images.

Its attacks see the network as any other classifier. Whatever they return is rounded to a real uint8 image, checked to
differ only under the patch, and put to the defense.
"""

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("art")

from art.attacks.evasion import ProjectedGradientDescent, SquareAttack
from art.estimators.classification import PyTorchClassifier

from bagcert import load
from bagcert.data import load_dataset

COUNT = 10
PLACES = [(0, 0), (6, 6), (3, 2)]


class ClassSums(nn.Module):
    """The sums of real scores over the map, on the scale of logits."""

    def __init__(self, scorer: nn.Module) -> None:
        super().__init__()
        self.scorer = scorer

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.scorer(images).mean((2, 3))


class PatchContent(nn.Module):
    """The same for the contents of a 2x2 patch, pasted on one image: the upper left of contents of 3x3.

    The squares of SquareAttack never reach the last row and column of its images, hence one more of each.
    """

    def __init__(self, scorer: nn.Module, image: np.ndarray, place: tuple[int, int]) -> None:
        super().__init__()
        self.sums = ClassSums(scorer)
        self.image, self.place = torch.from_numpy(image), place

    def forward(self, contents: torch.Tensor) -> torch.Tensor:
        images = self.image.repeat(len(contents), 1, 1, 1)
        top, left = self.place
        images[:, :, top : top + 2, left : left + 2] = contents[:, :, :2, :2]
        return self.sums(images)


@pytest.fixture(scope="module")
def model():
    return load("digits", "cpu")


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return load_dataset("digits", limit=COUNT).array()


def as_floats(images: np.ndarray) -> np.ndarray:
    return images.transpose(0, 3, 1, 2).astype(np.float32) / 255


def as_pixels(images: np.ndarray) -> np.ndarray:
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8).transpose(0, 2, 3, 1)


def check_that_certificates_hold(model, images: np.ndarray, patched: np.ndarray, place: tuple[int, int], rule: str):
    top, left = place
    differs = (patched != images).any(3)
    differs[:, top : top + 2, left : left + 2] = False
    assert not differs.any(), "the attack left its patch"
    clean = model.certify(images, 2, rule=rule)
    changed = model.predict(patched, 2, rule=rule) != clean.prediction
    assert not (changed & clean.certified).any()
    return changed, clean.certified


def as_art_sees(net: nn.Module, side: int) -> PyTorchClassifier:
    options = {"clip_values": (0.0, 1.0), "device_type": "cpu"}
    return PyTorchClassifier(net, nn.CrossEntropyLoss(), (3, side, side), 10, **options)


def test_masked_pgd_breaks_no_certificate(model, images: np.ndarray) -> None:
    classifier = as_art_sees(ClassSums(model.scorer), 8)
    options = {"eps": 1.0, "eps_step": 0.15, "max_iter": 15, "batch_size": COUNT, "verbose": False}
    changed, certified = [], []
    for place in PLACES:
        mask = np.zeros((1, 1, 8, 8), dtype=np.float32)
        mask[:, :, place[0] : place[0] + 2, place[1] : place[1] + 2] = 1
        attack = ProjectedGradientDescent(classifier, **options)
        labels = model.predict(images, 2, rule="vote").numpy()
        patched = as_pixels(attack.generate(as_floats(images), labels, mask=np.repeat(mask, COUNT, 0)))
        assert (patched != images).any()
        for rule in ("vote", "double-masking"):
            found = check_that_certificates_hold(model, images, patched, place, rule)
            changed.append(found[0])
            certified.append(found[1])
    assert torch.cat(changed).any(), "an attack that breaks nothing tests nothing"
    assert torch.cat(certified).any()


def test_square_attack_breaks_no_certificate(model, images: np.ndarray) -> None:
    certified = model.certify(images, 2, rule="double-masking").certified
    assert certified.any()
    for i in range(4):
        place = PLACES[i % len(PLACES)]
        rows, cols = (slice(start, start + 2) for start in place)
        classifier = as_art_sees(PatchContent(model.scorer, as_floats(images[i : i + 1]), place), 3)
        attack = SquareAttack(classifier, norm=np.inf, eps=1.0, max_iter=40, nb_restarts=1, p_init=0.5, verbose=False)
        contents = attack.generate(np.full((1, 3, 3, 3), 0.5, dtype=np.float32))[:, :, :2, :2]
        patched = images[i : i + 1].copy()
        patched[:, rows, cols] = as_pixels(contents)
        for rule in ("vote", "double-masking"):
            check_that_certificates_hold(model, images[i : i + 1], patched, place, rule)
        assert (patched != images[i : i + 1]).any()
