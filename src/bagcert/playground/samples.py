"""A few pictures to start with, as PNG files of the size of the network's input."""

import io
from dataclasses import dataclass

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from bagcert.data import ImageSet, load_dataset
from bagcert.data.preprocess import Preprocessing
from bagcert.defenses.bagcert import BagCert

MOST = 8
DIGITS = tuple(str(digit) for digit in range(10))


@dataclass(frozen=True)
class Sample:
    """One picture.

    Attributes:
        name: in plain words, for its button.
        png: the file.
    """

    name: str
    png: bytes


def sample_pictures(model: BagCert, data: str | None = None) -> list[Sample]:
    """The first picture of each of the first classes of a data set, at most eight; made-up ones without data.

    Args:
        model: gives the size.
        data: as for `load_dataset`; by default the digits, which come with a dependency, for a model of the digits.

    Raises:
        UsageError: no such data.
        UnreadableError: a picture that cannot be read.
    """
    if data is None and tuple(model.class_names) == DIGITS:
        data = "digits"
    if data is None:
        return [Sample(name, _png(pixels)) for name, pixels in made_up(*model.image_size).items()]
    found = load_dataset(data, "test")
    first = first_of_each_class(found)
    pictures = found.subset(first).array(Preprocessing(model.image_size).apply)
    names = [f"{found.class_names[found.labels[i]]} (image {i} of {found.name})" for i in first]
    return [Sample(name, _png(pixels)) for name, pixels in zip(names, pictures, strict=True)]


def first_of_each_class(images: ImageSet) -> list[int]:
    """Indices of the first image of each class, in the order of the classes, at most eight; no choice by result."""
    _, first = np.unique(images.labels, return_index=True)
    return [int(i) for i in first[:MOST]]


def made_up(height: int, width: int) -> dict[str, UInt8[np.ndarray, "height width rgb"]]:
    """Pictures that need no data: they show how a patch acts, not how good a model is."""
    row, col = np.mgrid[:height, :width] / max(height, width)
    side = np.minimum(height, width) / max(height, width)
    disc = (row - row.max() / 2) ** 2 + (col - col.max() / 2) ** 2 < (side / 3) ** 2
    stripes = (col * 8).astype(int) % 2 == 0
    return {
        "made-up picture: a disc": _two_colors(disc, (214, 92, 46), (206, 222, 236)),
        "made-up picture: stripes": _two_colors(stripes, (38, 84, 60), (232, 222, 190)),
        "made-up picture: a gradient": (255 * np.stack([row, col, 1 - row], 2).clip(0, 1)).astype(np.uint8),
    }


def _two_colors(mask: np.ndarray, inside: tuple[int, int, int], outside: tuple[int, int, int]) -> np.ndarray:
    return np.where(mask[..., None], inside, outside).astype(np.uint8)


def _png(pixels: UInt8[np.ndarray, "height width rgb"]) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
