"""Which images a file answers for: those in [0, 1], as the package itself. A part of every exported graph.

The package refuses other images in a sentence. A graph cannot, so it certifies none of them: what a broken camera or a
forgotten normalization delivers must not look like a proof.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bagcert.errors import UnsoundError
from bagcert.exporting.rules import EXACT

IN_RANGE = "images_in_range"
ROUNDING = 1e-6  # what another program's division by 255 or resize may add to 1 or take from 0

WRONG = (torch.nan, torch.inf, -torch.inf, 1e38, -1e38, 255.0, -5.0, 1 + 1e-5, -1e-5)
"""Values that no image holds."""


class ImageRange(nn.Module):
    """Tells images in [0, 1] from others, and takes the certificates of the others away."""

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Bool[Tensor, " batch"]:
        """Are all values of an image in [0, 1] up to rounding? NaN is in no range."""
        fine = (images >= -ROUNDING) & (images <= 1 + ROUNDING)
        return fine.flatten(1).float().amin(1) > 0

    def refuse(self, margin: Int[Tensor, " batch"], in_range: Bool[Tensor, " batch"]) -> Int[Tensor, " batch"]:
        """The margin; -2^24 of images that are not in range."""
        return torch.where(in_range, margin, -EXACT)


def out_of_range(images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "more channels height width"]:
    """One of the images with each wrong value in its last pixel, and everywhere."""
    image = images[:1].repeat(2 * len(WRONG), 1, 1, 1)
    for number, value in enumerate(WRONG):
        image[2 * number, -1, -1, -1] = value
        image[2 * number + 1] = value
    return image


def require_refused(certified: np.ndarray, margin: np.ndarray) -> None:
    """What a file has answered to images that are out of range.

    Raises:
        UnsoundError: it certifies one.
    """
    if certified.any() or (margin != -EXACT).any():
        number = int(np.flatnonzero(certified | (margin != -EXACT))[0])
        raise UnsoundError(
            f"the exported file certifies an image with the value {WRONG[number // 2]:g}, which none has"
        )
