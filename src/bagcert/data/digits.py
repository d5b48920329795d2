"""The embedded dataset: scikit-learn's 1,797 handwritten digits of 8x8 pixels, which needs no network."""

import numpy as np

from bagcert.data.image_set import ArraySource, ImageSet
from bagcert.errors import UsageError

TEST_IMAGES = 360


def load_digits(split: str = "test", seed: int = 0) -> ImageSet:
    """The digits in a fixed split: 1,437 images in `train`, 360 in `test`, every class in proportion.

    Values 0..16 become 0..255 in each of three equal channels.

    Raises:
        UsageError: another split.
    """
    if split not in ("train", "test"):
        raise UsageError(f"digits has no split {split!r}; it has train and test")
    from sklearn.datasets import load_digits as sklearn_digits

    digits = sklearn_digits()
    grey = np.rint(digits.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    names = tuple(str(name) for name in digits.target_names)
    everything = ImageSet("digits", "train", digits.target.astype(np.int64), names, ArraySource(pixels, "digits"))
    train, test = everything.split_off(TEST_IMAGES / len(everything), seed)
    if split == "train":
        return train
    return ImageSet("digits", "test", test.labels, names, test.source, test.rows)
