"""Model folders made to overflow or cancel are refused, or their scores keep still outside a patch's reach."""

import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch

import bagcert
from bagcert.defenses.bagcert import shipped_models
from bagcert.errors import UnreadableError, UnsoundError
from bagcert.nets.saved_model import CONFIG, WEIGHTS
from tests import refused
from tests.properties.hostile import count

GRAY = float(np.float32(128) / np.float32(255))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_hostile_folders_are_refused_or_local(dtype):
    totals = count(30, seed=1, dtype=dtype)
    assert totals["broken"] == 0
    assert min(totals["unreadable"], totals["unsound"], totals["accepted"]) > 0
    assert totals["unreadable"] + totals["unsound"] + totals["accepted"] == totals["cases"] == 30


@pytest.fixture
def hostile(tmp_path):
    """A folder whose network is NaN on all but gray images, which it takes for a 1, once std is nearly 0."""
    folder = shutil.copytree(shipped_models()["digits"], tmp_path / "model")
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    for name, value in tensors.items():
        if name.startswith("net.") and value.ndim == 4:
            value.zero_()
    tensors["net.0.weight"].fill_(1e-30)[::2] *= -1
    tensors["net.6.bias"].zero_()[1] = 10
    tensors["normalize.mean"].fill_(GRAY)

    def write(std, in_config):
        tensors["normalize.std"].fill_(std)
        safetensors.torch.save_file(tensors, folder / WEIGHTS)
        if in_config:
            facts = json.loads((folder / CONFIG).read_text())
            (folder / CONFIG).write_text(json.dumps({**facts, "mean": [GRAY] * 3, "std": [std] * 3}))
        return folder

    return write


@pytest.mark.parametrize(
    ("std", "in_config", "message"),
    [
        (1e-44, False, "'normalize.mean' .* is not the mean that config.json states"),
        (1e-44, True, "std must be positive and finite in float32"),
        (-1.0, True, "std.0: input should be greater than 0"),
        (1.0, False, "'normalize.mean' .* is not the mean that config.json states"),
    ],
)
def test_a_normalization_that_is_none_is_refused(hostile, std, in_config, message):
    refused(UnreadableError, message, bagcert.load, hostile(std, in_config), dtype="bfloat16")


def test_a_network_that_is_nan_on_clean_images_is_refused(hostile):
    """The same overflow from a std that float32 can divide by, and the weights."""
    folder = hostile(1.2e-38, True)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors["net.0.weight"].mul_(1e32)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    for dtype in ("float32", "bfloat16"):
        refused(UnsoundError, "scores that are NaN or infinite", bagcert.load, folder, dtype=dtype)


def test_weights_that_batch_norm_makes_infinite_are_refused(hostile):
    folder = hostile(1.0, True)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors["net.0.weight"].fill_(3e38)
    tensors["net.1.running_var"].zero_()
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    refused(UnreadableError, r"'net.0.weight' .* not finite with batch norm folded into it", bagcert.load, folder)


def test_a_negative_variance_is_refused(hostile):
    folder = hostile(1.0, True)
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors["net.1.running_var"][3] = -1e-6
    safetensors.torch.save_file(tensors, folder / WEIGHTS)
    refused(UnreadableError, r"'net.1.running_var' .* has a negative variance", bagcert.load, folder)


def test_what_is_left_of_the_attack_does_nothing(hostile):
    """The network by itself, with a deviation that is one, certifies a gray image; no patch moves it."""
    model = bagcert.load(hostile(1.0, True), dtype="bfloat16")
    image, allowed = np.full((1, 8, 8, 3), 128, np.uint8), np.zeros((8, 8), bool)
    allowed[:, 2:7] = True
    certificate = model.certify(image, patch="8x5", placements=allowed)
    attacked = image.copy()
    attacked[:, :, 2:7] = 255
    assert certificate.certified.tolist() == [True]
    assert torch.equal(model.predict(attacked, patch="8x5", placements=allowed), certificate.prediction)
