"""The digits data set: 1,797 handwritten digits of 8x8 pixels, embedded in the package.

Source and license are in `digits.LICENSE.txt` next to the data file.
"""

from pathlib import Path

import numpy as np

from bagcert.data.image_set import ArraySource, ImageSet
from bagcert.errors import UsageError

FILE = Path(__file__).with_name("digits.npz")
TEST_IMAGES = 360


def load_digits(split: str = "test", seed: int = 0) -> ImageSet:
    """Loads digits in a fixed stratified split: 1,437 images in `train`, 360 in `test`.

    Values 0..16 are scaled to 0..255 and repeated in three channels.
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
