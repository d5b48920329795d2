"""Augmentation of batches against plain numpy, image by image."""

import numpy as np
import pytest
import torch

from bagcert.data.augment import cover, crop, cutout, flip, random_crop, random_flip
from bagcert.errors import UsageError


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


def test_draws_follow_the_generator_and_reach_every_offset() -> None:
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


def test_channels_last_batches_give_the_same() -> None:
    images = _images()
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.equal(random_crop(images, 2, _generator()), random_crop(last, 2, _generator()))


def test_bad_arguments_are_refused() -> None:
    images = _images()
    for call, message in (
        (lambda: random_crop(images, 2, _generator(), "wrap"), "reflect or zero, got 'wrap'"),
        (lambda: random_crop(images, 6, _generator()), "padding of 6 px does not suit images of 6x8"),
        (lambda: random_crop(images, -1, _generator()), "padding of -1 px"),
        (lambda: cutout(images, 7, _generator()), "cutout of 7 px does not fit"),
        (lambda: cutout(images, -1, _generator()), "cutout of -1 px"),
        (lambda: cutout(images, 2, _generator(), 256), "a fill is 0 to 255"),
    ):
        with pytest.raises(UsageError, match=message):
            call()
