"""Sample images for the page, as PNG files of the network's input size."""

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
    """One sample image."""

    name: str
    png: bytes


def sample_pictures(model: BagCert, data: str | None = None) -> list[Sample]:
    """Returns the first image of each class of a data set, at most eight; generated images without data.

    Args:
        data: as for `load_dataset`; by default the digits for a model trained on digits.
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
    """Returns the index of the first image of each class, at most eight. The choice does not depend on results."""
    _, first = np.unique(images.labels, return_index=True)
    return [int(i) for i in first[:MOST]]


def made_up(height: int, width: int) -> dict[str, UInt8[np.ndarray, "height width rgb"]]:
    """Generates images without data. They show the effect of a patch, not the quality of a model."""
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
