"""Preprocessing: what it does, and that its declared geometry holds against Pillow by perturbation."""

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from bagcert.data.photo import Photo, read_image
from bagcert.data.preprocess import FITS, Preprocessing
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.scores import ScoreMap
from tests import refused

NET = (8, 6)
STORED = [
    (8, 6), (6, 8), (16, 12), (24, 18), (19, 11), (11, 19), (5, 3), (3, 9), (8, 13), (17, 6), (1, 1), (2, 40), (41, 7),
]  # fmt: skip


def _pixels(size: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


def _changed(pre: Preprocessing, size: tuple[int, int], orientation: int, axis: int) -> np.ndarray:
    """Boolean [stored lines, network height, network width]: what moves when one stored row or column changes."""
    moved = np.zeros((size[axis], *pre.size), dtype=bool)
    for base in (np.zeros((*size, 3), np.uint8), np.full((*size, 3), 255, np.uint8), _pixels(size)):
        before = pre.apply(Photo(base, orientation))
        for line in range(size[axis]):
            after = base.copy()
            index = (line, slice(None)) if axis == 0 else (slice(None), line)
            after[index] = 255 - after[index]
            moved[line] |= (pre.apply(Photo(after, orientation)) != before).any(2)
    return moved


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", STORED)
@pytest.mark.parametrize("orientation", range(1, 9))
def test_declared_geometry_holds_against_pillow(size: tuple[int, int], fit: str, orientation: int) -> None:
    pre = Preprocessing(NET, fit)
    geometry = pre.geometry(size, orientation)
    for axis in (0, 1):
        moved = _changed(pre, size, orientation, axis)
        # A stored row lies along network rows, or, with swapped axes, along network columns.
        along_rows = (axis == 0) != geometry.swapped
        declared = (geometry.rows_from if along_rows else geometry.cols_from).T
        measured = moved.any(2) if along_rows else moved.any(1)
        assert declared.shape == measured.shape
        assert not (measured & ~declared).any()
        if orientation == 1 and max(size) <= 24:  # and not much more is declared than moves
            assert (declared & ~measured).sum() <= 0.1 * declared.sum()


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("source", "target"), [((37, 53), (32, 32)), ((640, 480), (32, 32)), ((7, 9), (32, 32))])
def test_single_pixels_move_only_declared_pixels(source: tuple[int, int], target: tuple[int, int], fit: str) -> None:
    pre = Preprocessing(target, fit)
    geometry = pre.geometry(source, 6)
    random = np.random.default_rng(0)
    base = _pixels(source)
    before = pre.apply(Photo(base, 6))
    for _ in range(30):
        row, col = int(random.integers(source[0])), int(random.integers(source[1]))
        after = base.copy()
        after[row, col] = 255 - after[row, col]
        moved = (pre.apply(Photo(after, 6)) != before).any(2)
        assert not (moved & ~np.outer(geometry.rows_from[:, col], geometry.cols_from[:, row])).any()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_squash_is_pillows_own_transpose_and_resize(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    Image.fromarray(_pixels((21, 34))).save(file, "PNG", exif=exif)
    expected = ImageOps.exif_transpose(Image.open(file)).resize((12, 16), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(Preprocessing((16, 12)).apply(read_image(file.getvalue())), np.asarray(expected))


def test_center_crop_takes_the_largest_centered_part() -> None:
    pixels = _pixels((10, 31))
    np.testing.assert_array_equal(Preprocessing((10, 10), "center-crop").apply(Photo(pixels)), pixels[:, 10:20])
    np.testing.assert_array_equal(
        Preprocessing((10, 10), "center-crop").apply(Photo(pixels.swapaxes(0, 1).copy())),
        pixels[:, 10:20].swapaxes(0, 1),
    )
    geometry = Preprocessing((10, 10), "center-crop").geometry((10, 31))
    np.testing.assert_array_equal(np.flatnonzero(geometry.cols_from.any(0)), np.arange(10, 20))


@pytest.mark.parametrize("fit", FITS)
def test_an_image_of_the_right_size_passes_unchanged(fit: str) -> None:
    pixels = _pixels(NET)
    np.testing.assert_array_equal(Preprocessing(NET, fit).apply(Photo(pixels)), pixels)
    geometry = Preprocessing(NET, fit).geometry(NET)
    np.testing.assert_array_equal(geometry.rows_from, np.eye(NET[0], dtype=bool))
    np.testing.assert_array_equal(geometry.cols_from, np.eye(NET[1], dtype=bool))


def _patch_sums(pixels: np.ndarray) -> np.ndarray:
    """A score map [rows, cols] that sees 3x3 px at stride 2: the smallest network there is."""
    gray = pixels.astype(np.int64).sum(2)
    windows = np.lib.stride_tricks.sliding_window_view(gray, (3, 3))[::2, ::2]
    return windows.sum((2, 3))


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("size", [(9, 13), (30, 22), (13, 9)])
def test_score_maps_speak_of_stored_pixels(size: tuple[int, int], orientation: int, fit: str) -> None:
    """Change any rectangle of the stored photo: only regions that the composed grid says it touches move."""
    pre, net_size = Preprocessing((13, 9), fit), (13, 9)
    net_grid = RegionGrid.from_axis(3, 2, 0, net_size)
    geometry = pre.geometry(size, orientation)

    def score_map(pixels: np.ndarray) -> ScoreMap:
        sums = torch.as_tensor(_patch_sums(pre.apply(Photo(pixels, orientation))))
        return geometry.score_map(ScoreMap(torch.stack([sums, -sums])[None], -9000, 9000, net_grid))

    base = _pixels(size)
    before = score_map(base)
    assert before.grid.image_size == size
    assert before.grid.map_size == geometry.grid(net_grid).map_size == tuple(before.scores.shape[2:])
    assert before.grid is pre.geometry(size, orientation).grid(net_grid)
    random = np.random.default_rng(orientation)
    patch = (2, 4)
    rows, cols = before.grid.touched_rows(patch), before.grid.touched_cols(patch)
    for _ in range(25):
        top, left = int(random.integers(size[0] - 1)), int(random.integers(size[1] - 3))
        after = base.copy()
        after[top : top + 2, left : left + 4] = random.integers(0, 256, (2, 4, 3))
        moved = (score_map(after).scores != before.scores)[0].any(0).numpy()
        assert not (moved & ~np.outer(rows[top], cols[left])).any()


def test_bad_arguments_are_refused() -> None:
    for ask, message in (
        (lambda: Preprocessing((8, 8), "stretch"), "squash or center-crop, got 'stretch'"),
        (lambda: Preprocessing((0, 8)), "at least 1x1"),
        (lambda: Preprocessing((8, 8)).geometry((0, 4)), "at least 1x1"),
        (lambda: Preprocessing((8, 8)).geometry((4, 4), 0), "1 to 8"),
    ):
        refused(UsageError, message, ask)
