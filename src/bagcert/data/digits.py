"""The embedded data set: 1,797 handwritten digits of 8x8 pixels, in a file of the package.

Source and licence are in `digits.LICENSE.txt` beside it.
"""

from pathlib import Path

import numpy as np

from bagcert.data.image_set import ArraySource, ImageSet
from bagcert.errors import UsageError

FILE = Path(__file__).with_name("digits.npz")
TEST_IMAGES = 360


def load_digits(split: str = "test", seed: int = 0) -> ImageSet:
    """The digits in a fixed split: 1,437 images in `train`, 360 in `test`, every class in proportion.

    Values 0..16 become 0..255 in each of three equal channels.

    Raises:
        UsageError: another split.
    """
    if split not in ("train", "test"):
        raise UsageError(f"digits has no split {split!r}; it has train and test")
    with np.load(FILE) as file:
        values, labels = file["images"], file["labels"].astype(np.int64)
    gray = np.rint(values * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(gray[..., None], 3, axis=3)
    everything = ImageSet("digits", "train", labels, tuple("0123456789"), ArraySource(pixels, "digits"))
    train, test = everything.split_off(TEST_IMAGES / len(everything), seed)
    if split == "train":
        return train
    return ImageSet("digits", "test", test.labels, test.class_names, test.source, test.rows)
