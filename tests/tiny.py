"""Small data, models and recipes, so that whole runs take a fraction of a second."""

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from bagcert.aggregation import AttentionPooling
from bagcert.data.image_set import ArraySource, ImageSet
from bagcert.defenses.bagcert import BagCert
from bagcert.nets.attention_pooling import AttentionReadout
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.saved_model import ModelConfig
from bagcert.training.loop import Progress, train
from bagcert.training.recipe import Recipe, parse_recipe
from tests import oracle

COLORS = ("red", "green", "blue")


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


class Trap:
    """A pickle that leaves a file behind if it is run."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def pixels(labels: np.ndarray, size: tuple[int, int] = (8, 8), tint: int = 60, seed: int = 0) -> np.ndarray:
    """Noise with a tint: the channel of each image's label is a little brighter."""
    random = np.random.default_rng(seed)
    noise = random.integers(0, 256 - tint, (len(labels), *size, 3))
    strength = random.uniform(0.2, 1, len(labels))
    noise[np.arange(len(labels)), :, :, labels] += (tint * strength).astype(int)[:, None, None]
    return noise.astype(np.uint8)


def image_set(count: int = 60, size: tuple[int, int] = (8, 8), tint: int = 60, seed: int = 0) -> ImageSet:
    """Tinted images in three classes."""
    labels = np.random.default_rng(seed).integers(0, 3, count)
    return ImageSet("colors", "test", labels, COLORS, ArraySource(pixels(labels, size, tint, seed), "colors"))


def color_model(rule: str = "vote", patch: str = "2", size: tuple[int, int] = (8, 8), names=COLORS) -> BagCert:
    """Scores every pixel by its channels: a region scorer whose every answer can be worked out by hand."""
    layer = nn.Conv2d(3, 3, 1, bias=False)
    layer.weight.data = torch.eye(3)[:, :, None, None].clone()
    return BagCert(RegionScorer(nn.Sequential(layer), names, size, scale=2047.0), rule, patch=patch)


def attention_scorer(size: tuple[int, int] = (8, 8), names=COLORS) -> RegionScorer:
    """Scores every pixel by its channels, pooled by two heads: a plain mean, and one that looks at bright pixels."""
    random = torch.Generator().manual_seed(0)
    colors = torch.eye(3, 3)
    layer = nn.Conv2d(3, 8, 1)
    layer.weight.data = torch.cat([8 * colors, 8 * colors, torch.zeros(1, 3), torch.ones(1, 3)])[:, :, None, None]
    layer.bias.data = torch.tensor([-4.0] * 6 + [0.0, -1.5])
    readout = AttentionReadout(len(names), 6, 2, 4, size)
    readout.skip.weight.data = torch.cat([2 * torch.eye(len(names), 3), torch.eye(len(names), 3)], 1)
    for weight in (readout.first.weight, readout.first.bias, readout.second.weight, readout.skip.bias):
        weight.data = 0.2 * torch.randn(weight.shape, generator=random)
    return RegionScorer(nn.Sequential(layer), names, size, "attention-pooling", readout=readout).eval()


def attention_model(
    rule: str = "double-masking", patch: str = "2", size: tuple[int, int] = (8, 8), names=COLORS
) -> BagCert:
    """`attention_scorer`, deployed."""
    return BagCert(attention_scorer(size, names), rule, patch=patch)


def attention_recipe(**changes: object) -> Recipe:
    """`recipe` for a small model that pools regions by attention."""
    sizes = {"head": "attention-pooling", "values": 8, "attention_heads": 2, "hidden": 6}
    defaults = {"model__" + key: value for key, value in {"architecture": "pyramid-rf3s2", **sizes}.items()}
    return recipe(**{**defaults, "defense__rule": "double-masking", **changes})


def recipe(**changes: object) -> Recipe:
    """A recipe for a second of training; `section__key=value` changes it."""
    values: dict = {
        "name": "tiny",
        "model": {"architecture": "resnet-rf3", "width": 8, "depth": 1},
        "defense": {"rule": "vote", "patch": "2"},
        "optimizer": {"learning_rate": 0.01},
        "augment": {"crop": 1},
        "train": {"epochs": 2, "batch_size": 9, "ema": 0.9, "precision": "fp32", "checkpoint_every": 4},
    }
    for key, value in changes.items():
        section, _, last = key.partition("__")
        values.setdefault(section, {})[last] = value
    return parse_recipe(values)


def stopped_run(folder: Path, after: int, init: Path | None = None, **changes: object) -> Path:
    """A run of `recipe` that dies in the step after `after`, without a chance to save."""

    def die(at: Progress) -> None:
        if at.step == after:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        train(recipe(**changes), folder, image_set(), init=init, device="cpu", on_progress=die)
    return folder


EXTREMES = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [0, 0, 0], [255, 255, 255]], dtype=np.uint8)
"""Pure colors, black and white."""


def attacked(image: np.ndarray, side: int, contents: Iterable[np.ndarray] = EXTREMES) -> np.ndarray:
    """The image with each content at every placement of a square, the last row and column included."""
    found = []
    for top, left in np.ndindex(image.shape[0] - side + 1, image.shape[1] - side + 1):
        for content in contents:
            copy = image.copy()
            copy[top : top + side, left : left + side] = content
            found.append(copy)
    return np.stack(found)


def readout_scores(pooling: AttentionPooling, evidence: np.ndarray, mask: np.ndarray) -> list[int] | None:
    """Class scores of an integer map [channels, rows, cols] without the regions of a mask, by the definitions."""
    names = ("first", "first_bias", "second", "skip", "bias")
    weights = evidence[pooling.values :].astype(int)
    values = evidence[: pooling.values].astype(int) // np.repeat(weights, pooling.values // pooling.heads, 0)
    found = oracle.readout_scores(values, weights, {name: getattr(pooling, name).tolist() for name in names}, mask)
    return None if found is None else list(found)


def attention_config(**changes: object) -> ModelConfig:
    """Of a small network that pools regions by attention."""
    facts = {
        "name": "tiny",
        "architecture": "pyramid-rf3s2",
        "width": 8,
        "depth": 1,
        "head": "attention-pooling",
        "values": 8,
        "attention_heads": 2,
        "hidden": 6,
        "scale": 1.0,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "class_names": list(COLORS),
        "image_size": [8, 8],
        "rule": "double-masking",
        "patch": "2",
    }
    return ModelConfig.model_validate({**facts, **changes})
