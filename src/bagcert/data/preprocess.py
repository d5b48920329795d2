"""Preprocessing of photos to network input, and mapping of score maps back to pixels of the stored photo.

Each step (EXIF rotation, cropping, resizing) acts on rows and columns separately. A network row therefore depends on
a set of source rows, and a network column on a set of source columns. Composed with the grid of the network, these
sets give the regions that a patch on the stored photo can affect. See docs/method.md, "Preprocessing".
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image

from bagcert.data.photo import Photo, turn
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.scores import ScoreMap

FITS = ("squash", "center-crop")

# Pillow's 8-bit resize rounds weights to multiples of 2^-22: smaller weights have no effect.
_NEGLIGIBLE = 1e-9


StoredShape = tuple[tuple[int, int], int]
"""(height_px, width_px) of a photo as stored, and its EXIF orientation."""


@dataclass(frozen=True, eq=False)
class PhotoGeometry:
    """Dependence of each row and column of the network's input on the rows and columns of a stored photo.

    Attributes:
        rows_from: boolean [network height, upright height of the photo].
        cols_from: boolean [network width, upright width of the photo].
        swapped: whether EXIF swaps the axes, so that upright rows are columns of the stored photo.

    Upright rows and columns are counted along the stored axes: mirroring and rotation by 180 degrees only change these
    tables.
    """

    rows_from: Bool[np.ndarray, "net_height upright_height"]
    cols_from: Bool[np.ndarray, "net_width upright_width"]
    swapped: bool

    def grid(self, net_grid: RegionGrid) -> RegionGrid:
        """Returns the network's grid in pixels of the stored photo, transposed if the axes are swapped."""
        return _composed(self, net_grid)

    def score_map(self, scores: ScoreMap) -> ScoreMap:
        """Returns the score map over the stored photo, with rows and columns along the stored axes."""
        grid = self.grid(scores.grid)
        return scores.turned(grid) if self.swapped else replace(scores, grid=grid)


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of photos: EXIF rotation, optional center crop, and resizing with antialiasing.

    Attributes:
        size: (height_px, width_px) of the network's input.
        fit: "squash" resizes the whole photo, which may change its aspect ratio; "center-crop" first crops the
            largest centered part with the network's aspect ratio.

    Raises:
        UsageError: another fit, or a size below 1.
    """

    size: tuple[int, int]
    fit: str = "squash"

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", tuple(self.size))  # configuration files hold lists
        if self.fit not in FITS:
            raise UsageError(f"a fit is {' or '.join(FITS)}, got {self.fit!r}")
        if min(self.size) < 1:
            raise UsageError(f"the network's input must be at least 1x1 px, got {self.size[0]}x{self.size[1]}")

    def apply(self, photo: Photo) -> UInt8[np.ndarray, "net_height net_width rgb"]:
        """Converts a photo to network input with Pillow's antialiased bilinear resize.

        A photo that is upright and has the right size is returned unchanged.
        """
        upright = photo.upright()
        (top, bottom), (left, right) = self._crop((upright.shape[0], upright.shape[1]))
        cropped = np.ascontiguousarray(upright[top:bottom, left:right])
        if cropped.shape[:2] == self.size:
            return cropped
        # `reducing_gap` stays unset: its box reduction would reach further than the filter.
        resized = Image.fromarray(cropped).resize((self.size[1], self.size[0]), Image.Resampling.BILINEAR)
        return np.array(resized)

    def geometry(self, stored_size: tuple[int, int], orientation: int = 1) -> PhotoGeometry:
        """Computes which photo pixels each network row and column depends on after `apply`.

        Args:
            stored_size: (height_px, width_px) of the photo as stored.
            orientation: its EXIF orientation, 1 to 8.

        Guarantee: every dependence of `apply` is included.
        """
        if min(stored_size) < 1:
            raise UsageError(f"a photo must be at least 1x1 px, got {stored_size[0]}x{stored_size[1]}")
        return _geometry(self, (int(stored_size[0]), int(stored_size[1])), orientation)

    def score_maps(
        self, scores: ScoreMap, shapes: Sequence[StoredShape]
    ) -> list[tuple[StoredShape, list[int], ScoreMap]]:
        """Groups the score map of a batch by photo shape: (shape, positions in the batch, score map of the group)."""
        members: dict[StoredShape, list[int]] = {}
        for position, shape in enumerate(shapes):
            members.setdefault(shape, []).append(position)
        return [
            (shape, chosen, self.geometry(*shape).score_map(scores if len(members) == 1 else _some(scores, chosen)))
            for shape, chosen in members.items()
        ]

    def _crop(self, upright_size: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns ((top, bottom), (left, right)) of the used part of the upright photo."""
        height, width = upright_size
        if self.fit == "squash":
            return (0, height), (0, width)
        net_height, net_width = self.size
        # Rounding down keeps the crop inside; a very long photo keeps at least one pixel.
        crop_height = min(height, max(1, width * net_height // net_width))
        crop_width = min(width, max(1, height * net_width // net_height))
        top, left = (height - crop_height) // 2, (width - crop_width) // 2
        return (top, top + crop_height), (left, left + crop_width)


def _some(scores: ScoreMap, chosen: list[int]) -> ScoreMap:
    return scores[torch.tensor(chosen, device=scores.scores.device)]


@lru_cache(maxsize=64)
def _composed(geometry: PhotoGeometry, net_grid: RegionGrid) -> RegionGrid:
    """Returns the composed grid, cached because windows are cached per grid and photos often share their geometry."""
    grid = net_grid.through(geometry.rows_from, geometry.cols_from)
    return grid.transposed() if geometry.swapped else grid


@lru_cache(maxsize=64)
def _geometry(preprocessing: Preprocessing, stored_size: tuple[int, int], orientation: int) -> PhotoGeometry:
    swapped, rows_reversed, cols_reversed = turn(orientation)
    # How long each upright axis is, and whether it runs against the stored axis it lies on.
    height, width = stored_size[::-1] if swapped else stored_size
    reversed_axes = (cols_reversed, rows_reversed) if swapped else (rows_reversed, cols_reversed)
    tables = []
    for pixels, span, target, backwards in zip(
        (height, width), preprocessing._crop((height, width)), preprocessing.size, reversed_axes, strict=True
    ):
        tables.append(_axis_table(pixels, span, target, backwards))
    return PhotoGeometry(tables[0], tables[1], swapped)


@lru_cache(maxsize=256)
def _axis_table(pixels: int, span: tuple[int, int], target: int, backwards: bool) -> np.ndarray:
    """Computes the dependence table of one axis, boolean [target, pixels]. Cached per axis length."""
    table = np.zeros((target, pixels), dtype=bool)
    table[:, slice(*span)] = _resize_support(span[1] - span[0], target)
    return table[:, ::-1] if backwards else table


def _resize_support(source: int, target: int) -> np.ndarray:
    """Returns which source pixels have a weight in each pixel of Pillow's bilinear resize, boolean [target, source].

    The filter is a triangle around the center (t + 1/2)·source/target of each target pixel t, of half-width
    max(1, source/target) source pixels, sampled at pixel centers. An axis of unchanged length is not resampled.
    """
    if source == target:
        return np.eye(source, dtype=bool)
    scale = source / target
    support = max(1.0, scale)
    center = (np.arange(target)[:, None] + 0.5) * scale
    distance = np.abs(np.arange(source)[None, :] + 0.5 - center)
    return distance < support * (1 - _NEGLIGIBLE)
