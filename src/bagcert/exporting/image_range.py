"""Range check of input images, part of every exported graph: only images in [0, 1] can be certified.

The package raises an error for other images. A graph cannot, so it never certifies them: the output of a broken camera
or a wrong normalization must not be certified.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bagcert.errors import UnsoundError
from bagcert.exporting.rules import EXACT

IN_RANGE = "images_in_range"
ROUNDING = 1e-6  # rounding error of another program's division by 255 or resize

WRONG = (torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 255.0, -5.0, 1 + 1e-5, -1e-5)
"""Values that are invalid in an image."""


class ImageRange(nn.Module):
    """Detects images with values outside [0, 1] and removes their certificates."""

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Bool[Tensor, " batch"]:
        """Returns whether all values of each image are in [0, 1] up to rounding. False for NaN."""
        fine = (images >= -ROUNDING) & (images <= 1 + ROUNDING)
        return fine.flatten(1).float().amin(1) > 0

    def refuse(self, margin: Int[Tensor, " batch"], in_range: Bool[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """Returns the margin, replaced by -2^24 for images out of range."""
        return torch.where(in_range, margin, -EXACT)


def out_of_range(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "more channels height width"]:
    """Returns one of the images with each invalid value in its last pixel, and in all pixels."""
    image = images[:1].repeat(2 * len(WRONG), 1, 1, 1)
    for number, value in enumerate(WRONG):
        image[2 * number, -1, -1, -1] = value
        image[2 * number + 1] = value
    return image


def require_refused(certified: np.ndarray, margin: np.ndarray) -> None:
    """Checks that a file certified none of the images that are out of range.

    Raises:
        UnsoundError: an image is certified.
    """
    if certified.any() or (margin != -EXACT).any():
        number = int(np.flatnonzero(certified | (margin != -EXACT))[0])
        raise UnsoundError(
            f"the exported file certifies an image with the value {WRONG[number // 2]:g}, which none has"
        )
