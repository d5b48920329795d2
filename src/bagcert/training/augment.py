"""Batched augmentation on the device: every image gets its own crop, flip and cutout, without a loop.

Randomness comes from a `torch.Generator` on the same device, so that a resumed run draws the same numbers, or from
`ShardedGenerator` for a share of a larger batch. Each random function draws parameters and calls a deterministic
function that applies them.
"""

import math

import torch
from jaxtyping import Bool, Float, Int, Int64, UInt8
from torch import Tensor

from bagcert.errors import UsageError
from bagcert.training.random import Source, draw, draw_uniform

Batch = UInt8[Tensor, "batch channels height width"]


def random_crop(images: Batch, padding: int, generator: Source, mode: str = "reflect") -> Batch:
    """Pads each image by `padding` px on all sides and crops it to its original size at a random offset.

    Args:
        padding: in px; 0 returns the images unchanged.
        generator: on the device of the images.
        mode: "reflect" (mirrored without repeating the border pixel) or "zero".

    Raises:
        UsageError: another mode, or a padding that is negative or, for reflect, not smaller than the image.
    """
    if padding == 0:
        return images
    _check_crop(images, padding, mode)
    offsets = draw(2 * padding + 1, len(images), generator, 2)
    return crop(images, offsets, padding, mode)


def crop(images: Batch, offsets: Int64[Tensor, "batch 2"], padding: int, mode: str = "reflect") -> Batch:
    """Pads image b and crops it at row `offsets[b, 0]` and column `offsets[b, 1]` of the padded image."""
    _check_crop(images, padding, mode)
    batch, channels, height, width = images.shape
    rows, rows_inside = _source_pixels(offsets[:, 0], padding, height)
    cols, cols_inside = _source_pixels(offsets[:, 1], padding, width)
    # Whole rows first, then pixels: two gathers along an axis each.
    rows = rows[:, None, :, None].expand(batch, channels, height, width)
    cols = cols[:, None, None, :].expand(batch, channels, height, width)
    cropped = images.gather(2, rows).gather(3, cols)
    if mode == "zero":
        cropped = cropped * (rows_inside[:, None, :, None] & cols_inside[:, None, None, :])
    return cropped


def random_resized_crop(
    images: Batch, size: tuple[int, int], least_share: float, generator: Source
) -> UInt8[Tensor, "batch channels out_height out_width"]:
    """Crops a box of random area, aspect ratio and position from each image and resizes it to `size`.

    The box covers a fraction of the image area, uniform in [least_share, 1]. The logarithm of its aspect ratio (width
    / height) is uniform between those of 3/4 and 4/3. A side longer than the image is clipped to it.

    Args:
        size: (height_px, width_px) of the result.
        least_share: smallest fraction of the area, above 0 and at most 1.
        generator: on the device of the images.

    Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6.
    """
    if not 0 < least_share <= 1:
        raise UsageError(f"a random resized crop keeps a share of the area above 0 and at most 1, got {least_share}")
    height, width = images.shape[2:]
    area, aspect, top, left = draw_uniform(4, len(images), generator)
    area = (least_share + (1 - least_share) * area) * height * width
    aspect = ((2 * aspect - 1) * math.log(4 / 3)).exp()
    tall, wide = (area / aspect).sqrt().clamp(1, height), (area * aspect).sqrt().clamp(1, width)
    boxes = torch.stack([top * (height - tall), left * (width - wide), tall, wide], 1)
    return resized_crop(images, boxes, size)


def resized_crop(
    images: Batch, boxes: Float[Tensor, "batch 4"], size: tuple[int, int]
) -> UInt8[Tensor, "batch channels out_height out_width"]:
    """Crops the box [top, left, height, width] of `boxes[b]`, in fractional px, from image b and resizes it to `size`.

    Uses the antialiased filter of Pillow's bilinear `resize(box=...)`.
    """
    if min(size) < 1:
        raise UsageError(f"a crop is resized to at least 1x1 px, got {size[0]}x{size[1]}")
    rows = _resize_weights(boxes[:, 0], boxes[:, 2], images.shape[2], size[0])
    cols = _resize_weights(boxes[:, 1], boxes[:, 3], images.shape[3], size[1])
    resized = rows[:, None] @ images.float() @ cols[:, None].transpose(2, 3)
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def random_flip(images: Batch, generator: Source) -> Batch:
    """Mirrors each image left to right with probability 1/2."""
    chosen = draw(2, len(images), generator).bool()
    return flip(images, chosen)


def flip(images: Batch, chosen: Bool[Tensor, " batch"]) -> Batch:
    """Mirrors the chosen images left to right and returns the others unchanged."""
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def cutout(images: Batch, size: int, generator: Source, fill: int = 0) -> Batch:
    """Sets a square of `size` px at a random position inside each image to `fill`."""
    height, width = images.shape[2:]
    if not 0 <= size <= min(height, width):
        raise UsageError(f"a cutout of {size} px does not fit into images of {height}x{width} px")
    tops = draw(height - size + 1, len(images), generator)
    lefts = draw(width - size + 1, len(images), generator)
    return cover(images, torch.stack([tops, lefts], 1), size, fill)


def cover(images: Batch, corners: Int64[Tensor, "batch 2"], size: int, fill: int = 0) -> Batch:
    """Sets the square of `size` px at row `corners[b, 0]`, column `corners[b, 1]` of image b to `fill`."""
    if not 0 <= fill <= 255:
        raise UsageError(f"a fill is 0 to 255, got {fill}")
    covered = [
        (pixel >= corners[:, axis, None]) & (pixel < corners[:, axis, None] + size)
        for axis, pixel in enumerate(torch.arange(n, device=images.device)[None, :] for n in images.shape[2:])
    ]
    return images.masked_fill(covered[0][:, None, :, None] & covered[1][:, None, None, :], fill)


def random_color(images: Batch, strength: float, generator: Source) -> Batch:
    """Changes brightness, contrast and saturation of each image by random factors.

    Args:
        strength: the three factors are uniform in [1 - strength, 1 + strength]; 0 returns the images unchanged.
        generator: on the device of the images.
    """
    if not 0 <= strength < 1:
        raise UsageError(f"a color augmentation has a strength of at least 0 and below 1, got {strength}")
    if strength == 0:
        return images
    factors = 1 + strength * (2 * draw_uniform(3, len(images), generator) - 1)
    return recolor(images, factors.T)


def recolor(images: Batch, factors: Float[Tensor, "batch 3"]) -> Batch:
    """Multiplies brightness, contrast and saturation of image b by `factors[b]`, in this order.

    Contrast is the distance of a pixel from the mean gray value of its image. Saturation is the distance from the gray
    value of the pixel (the mean of its channels). Values are rounded and clipped once, at the end.
    """
    brightness, contrast, saturation = factors.T[:, :, None, None, None]
    pixels = images.float() * brightness
    mean = pixels.mean((1, 2, 3), keepdim=True)
    pixels = mean + (pixels - mean) * contrast
    gray = pixels.mean(1, keepdim=True)
    pixels = gray + (pixels - gray) * saturation
    return pixels.round_().clamp_(0, 255).to(torch.uint8)


def random_positions(count: int, image_size: tuple[int, int], generator: Source) -> Int[Tensor, "count 2"]:
    """Draws a uniform random position for each of `count` training images, including the last row and column."""
    return torch.stack([draw(side, count, generator) for side in image_size], 1)


def _check_crop(images: Tensor, padding: int, mode: str) -> None:
    height, width = images.shape[2:]
    if mode not in ("reflect", "zero"):
        raise UsageError(f"a crop pads with reflect or zero, got {mode!r}")
    if padding < 0 or (mode == "reflect" and padding >= min(height, width)):
        raise UsageError(f"a padding of {padding} px does not suit images of {height}x{width} px")


def _source_pixels(offsets: Tensor, padding: int, pixels: int) -> tuple[Tensor, Tensor]:
    """Returns the source pixel of each resulting pixel, [batch, pixels], and whether it lies inside the image."""
    source = offsets[:, None] - padding + torch.arange(pixels, device=offsets.device)[None, :]
    inside = (source >= 0) & (source < pixels)
    mirrored = source.abs()
    mirrored = (pixels - 1) - ((pixels - 1) - mirrored).abs()
    return mirrored.clamp(0, pixels - 1), inside


def _resize_weights(start: Tensor, length: Tensor, source: int, target: int) -> Float[Tensor, "batch target source"]:
    """Returns the weight of each source pixel in each resulting pixel along one axis: a triangle filter."""
    scale = (length / target)[:, None, None]
    center = start[:, None, None] + (torch.arange(target, device=start.device)[None, :, None] + 0.5) * scale
    pixel = torch.arange(source, device=start.device)[None, None, :] + 0.5
    weights = (1 - (pixel - center).abs() / scale.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)
