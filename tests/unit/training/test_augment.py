"""Augmentation of batches against plain numpy, image by image."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image

from bagcert.errors import UsageError
from bagcert.training.augment import (
    cover,
    crop,
    cutout,
    flip,
    random_color,
    random_crop,
    random_flip,
    random_positions,
    random_resized_crop,
    resized_crop,
)
from tests import refused


def _images(batch: int = 9, height: int = 6, width: int = 8) -> torch.Tensor:
    return torch.as_tensor(np.random.default_rng(0).integers(0, 256, (batch, 3, height, width), dtype=np.uint8))


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("mode", ["reflect", "zero"])
@pytest.mark.parametrize("padding", [0, 1, 2, 5])
def test_crop_is_numpy_pad_and_slice(padding: int, mode: str) -> None:
    images = _images((2 * padding + 1) ** 2)
    offsets = torch.cartesian_prod(torch.arange(2 * padding + 1), torch.arange(2 * padding + 1))
    cropped = crop(images, offsets, padding, mode).numpy()
    for image, (top, left), found in zip(images.numpy(), offsets.tolist(), cropped, strict=True):
        around = ((0, 0), (padding, padding), (padding, padding))
        padded = np.pad(image, around, mode="reflect") if mode == "reflect" else np.pad(image, around)
        np.testing.assert_array_equal(found, padded[:, top : top + 6, left : left + 8])


def test_zero_padding_may_exceed_the_image() -> None:
    images = _images(2)
    assert not crop(images, torch.tensor([[0, 0], [20, 20]]), 10, "zero").any()
    assert torch.equal(crop(images, torch.full((2, 2), 10), 10, "zero"), images)


def test_flip_and_cover_are_per_image() -> None:
    images = _images(4)
    chosen = torch.tensor([True, False, False, True])
    corners = torch.tensor([[0, 0], [3, 5], [1, 2], [3, 0]])
    flipped, covered = flip(images, chosen), cover(images, corners, 3, fill=7)
    for b in range(4):
        expected = images[b].numpy()
        np.testing.assert_array_equal(flipped[b], expected[:, :, ::-1] if chosen[b] else expected)
        expected = expected.copy()
        top, left = corners[b].tolist()
        expected[:, top : top + 3, left : left + 3] = 7
        np.testing.assert_array_equal(covered[b], expected)


def test_draws_reach_every_offset() -> None:
    images = _images(1).expand(4000, -1, -1, -1)
    for draw, outcomes in (
        (lambda g: random_crop(images, 1, g), 9),
        (lambda g: random_flip(images, g), 2),
        (lambda g: cutout(images, 4, g), 15),
    ):
        first, again, other = draw(_generator()), draw(_generator()), draw(_generator(1))
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
        counts = torch.unique(first.flatten(1), dim=0, return_counts=True)[1]
        assert len(counts) == outcomes
        assert counts.min() > 0.7 * 4000 / outcomes
        assert first.dtype == torch.uint8


def test_nothing_to_do_changes_nothing() -> None:
    images = _images()
    assert torch.equal(random_crop(images, 0, _generator()), images)
    assert torch.equal(cutout(images, 0, _generator()), images)
    boxes = torch.tensor([[0.0, 0.0, 6.0, 8.0]]).expand(len(images), 4)
    assert torch.equal(resized_crop(images, boxes, (6, 8)), images)
    generator = _generator()
    state = generator.get_state()
    assert random_color(images, 0.0, generator) is images
    assert torch.equal(generator.get_state(), state)


def test_channels_last_batches_give_the_same() -> None:
    images = _images()
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(random_crop(images, 2, _generator()), random_crop(last, 2, _generator()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda images: random_crop(images, 2, _generator(), "wrap"), "reflect or zero, got 'wrap'"),
        (lambda images: random_crop(images, 6, _generator()), "padding of 6 px does not suit images of 6x8"),
        (lambda images: random_crop(images, -1, _generator()), "padding of -1 px"),
        (lambda images: cutout(images, 7, _generator()), "cutout of 7 px does not fit"),
        (lambda images: cutout(images, -1, _generator()), "cutout of -1 px"),
        (lambda images: cutout(images, 2, _generator(), 256), "a fill is 0 to 255"),
        (lambda images: random_resized_crop(images, (4, 4), 0.0, _generator()), "above 0 and at most 1"),
        (lambda images: random_resized_crop(images, (4, 4), 1.5, _generator()), "above 0 and at most 1"),
        (lambda images: random_resized_crop(images, (4, 4), -1.0, _generator()), "above 0 and at most 1"),
        (lambda images: random_resized_crop(images, (4, 4), float("nan"), _generator()), "above 0 and at most 1"),
        (lambda images: random_resized_crop(images, (0, 4), 0.5, _generator()), "at least 1x1 px, got 0x4"),
        (lambda images: random_color(images, -0.1, _generator()), "strength"),
        (lambda images: random_color(images, 1.0, _generator()), "strength"),
    ],
)
def test_bad_arguments_refused(call: Callable[[torch.Tensor], object], message: str) -> None:
    refused(UsageError, message, call, _images())


@pytest.mark.parametrize("size", [(5, 7), (16, 9), (3, 20), (1, 1)])
def test_a_resized_crop_is_pillows(size: tuple[int, int]) -> None:
    images = _images(6, 13, 17)
    boxes = torch.tensor(
        [[0, 0, 13, 17], [2, 3, 5, 7], [0.25, 1.5, 9.75, 12.0], [6, 9, 7, 8], [12, 16, 1, 1], [3.3, 0.1, 4.4, 16.8]]
    )
    found = resized_crop(images, boxes, size).numpy().astype(int)
    for image, (top, left, height, width), crop_ in zip(images.numpy(), boxes.tolist(), found, strict=True):
        box = (left, top, min(left + width, 17), min(top + height, 13))
        expected = Image.fromarray(image.transpose(1, 2, 0)).resize(size[::-1], Image.Resampling.BILINEAR, box)
        assert np.abs(crop_ - np.asarray(expected).astype(int).transpose(2, 0, 1)).max() <= 1


def test_random_boxes_lie_inside_and_keep_their_share() -> None:
    """On a ramp the crop's mean and slope tell where its box was, and how large."""
    ramp = torch.arange(0, 240, 4, dtype=torch.uint8).expand(2000, 1, 60, 60).contiguous()
    both = torch.cat([ramp, ramp.transpose(2, 3)], 1)
    drawn = random_resized_crop(both, (60, 60), 0.25, _generator())
    again, other = (random_resized_crop(both, (60, 60), 0.25, _generator(seed)) for seed in (0, 1))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, other)
    values = drawn.float()
    wide = (values[:, 0, :, 50] - values[:, 0, :, 10]).mean(1) / 4 / 40
    tall = (values[:, 1, 50] - values[:, 1, 10]).mean(1) / 4 / 40
    share, aspect = wide * tall, wide / tall
    assert 0.23 < share.min() < 0.3
    assert share.max() <= 1.01
    assert share.mean() == pytest.approx(0.61, abs=0.03)  # sides that were cut make it less than 0.625
    assert 0.7 < aspect.min() < 0.8 < 1.25 < aspect.max() < 1.4
    assert abs(float(values.mean()) - float(both.float().mean())) < 2  # no side is preferred


def test_random_positions_draw_every_row_and_column() -> None:
    drawn = random_positions(500, (6, 7), _generator())
    assert {tuple(position) for position in drawn.tolist()} == {(i, j) for i in range(6) for j in range(7)}


def test_random_color() -> None:
    images = torch.randint(0, 256, (6, 3, 5, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    found = random_color(images, 0.4, torch.Generator().manual_seed(2))
    factors = 1 + 0.4 * (2 * torch.rand(3, 6, generator=torch.Generator().manual_seed(2)) - 1)
    for image, result, (brightness, contrast, saturation) in zip(images, found, factors.T.tolist(), strict=True):
        pixels = image.double().numpy() * brightness
        pixels = pixels.mean() + contrast * (pixels - pixels.mean())
        gray = pixels.mean(0)
        expected = np.clip(gray + saturation * (pixels - gray), 0, 255)
        assert np.abs(result.double().numpy() - expected).max() < 0.51
    assert not torch.equal(found, images)
