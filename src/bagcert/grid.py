"""Geometry: which pixels each region of a score map sees, and which regions a patch can reach.

Receptive fields are products of row sets and column sets, so everything is kept per axis, as boolean
incidence. That one representation covers strides, dilation, clipping at the border, resizing, cropping,
rotation by quarter turns and wrap-around ablations. Source: METHOD section 2 of the design notes.
"""

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np

from bagcert.errors import UsageError
from bagcert.threat import PatchThreatModel


@dataclass(frozen=True, eq=False)
class WindowBlock:
    """The windows one patch shape leads to: the products of `rows` and `cols` that `keep` marks.

    Attributes:
        shape: (height_px, width_px) of the patch.
        rows: boolean [row windows, map rows].
        cols: boolean [column windows, map columns].
        keep: boolean [row windows, column windows].
        tops, lefts: int [row windows, column windows], one admissible placement whose reach lies in the window.
    """

    shape: tuple[int, int]
    rows: np.ndarray
    cols: np.ndarray
    keep: np.ndarray
    tops: np.ndarray
    lefts: np.ndarray

    @cached_property
    def regions(self) -> np.ndarray:
        """Int [row windows, column windows]: how many regions each window holds."""
        return np.outer(self.rows.sum(1), self.cols.sum(1))


@dataclass(frozen=True, eq=False)
class RegionGrid:
    """Which pixels each region of a map sees: region (a, b) sees pixel (i, j) iff rows_seen[a, i] and cols_seen[b, j].

    Attributes:
        rows_seen: boolean [map rows, image height].
        cols_seen: boolean [map columns, image width].
    """

    rows_seen: np.ndarray
    cols_seen: np.ndarray

    def __post_init__(self) -> None:
        for name in ("rows_seen", "cols_seen"):
            seen = np.ascontiguousarray(getattr(self, name), dtype=bool)
            if seen.ndim != 2 or 0 in seen.shape:
                raise UsageError(f"{name} must be a non-empty [regions, pixels] table, got shape {seen.shape}")
            object.__setattr__(self, name, seen)

    @classmethod
    def from_axis(cls, receptive_field: int, stride: int, start: int, image_size: tuple[int, int]) -> "RegionGrid":
        """The grid of a plain stack: region `a` sees the `receptive_field` pixels from start + stride * a on.

        Regions go on as long as their first pixel plus `receptive_field` ends within the image plus the same
        margin `-start` at the far side; what lies outside the image is clipped.
        """
        axes = []
        for pixels in image_size:
            count = (pixels - 2 * start - receptive_field) // stride + 1
            first = start + stride * np.arange(count)[:, None]
            pixel = np.arange(pixels)[None, :]
            axes.append((pixel >= first) & (pixel < first + receptive_field))
        return cls(*axes)

    @property
    def map_size(self) -> tuple[int, int]:
        """(rows, columns) of the score map."""
        return len(self.rows_seen), len(self.cols_seen)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height_px, width_px) of the image."""
        return self.rows_seen.shape[1], self.cols_seen.shape[1]

    @property
    def receptive_field(self) -> tuple[int, int]:
        """(height_px, width_px) of the largest receptive field, from its first to its last pixel."""
        return _extent(self.rows_seen), _extent(self.cols_seen)

    def touched_rows(self, patch: "int | str | tuple[int, int]") -> np.ndarray:
        """Boolean [placements, map rows]: the rows of regions a patch reaches, one line per top row of the patch."""
        return _touched(self.rows_seen, self._shape(patch)[0])

    def touched_cols(self, patch: "int | str | tuple[int, int]") -> np.ndarray:
        """Boolean [placements, map columns]: the columns of regions a patch reaches, one line per left column."""
        return _touched(self.cols_seen, self._shape(patch)[1])

    def through(self, rows_from: np.ndarray, cols_from: np.ndarray) -> "RegionGrid":
        """The same map seen from the image before a separable step (resize, crop, flip).

        Args:
            rows_from: boolean [height after, height before]: which source rows each resulting row depends on.
            cols_from: likewise for columns.
        """
        for name, table, pixels in (
            ("rows_from", rows_from, self.image_size[0]),
            ("cols_from", cols_from, self.image_size[1]),
        ):
            if len(table) != pixels:
                raise UsageError(f"{name} must have one line for each of {pixels} px, got {len(table)}")
        return RegionGrid(_compose(self.rows_seen, rows_from), _compose(self.cols_seen, cols_from))

    def transposed(self) -> "RegionGrid":
        """The grid of the transposed map over the transposed image."""
        return RegionGrid(self.cols_seen, self.rows_seen)

    def covers(self, other: "RegionGrid") -> bool:
        """Does every region here see at least what it sees in `other`?"""
        same = self.map_size == other.map_size and self.image_size == other.image_size
        return same and not (other.rows_seen & ~self.rows_seen).any() and not (other.cols_seen & ~self.cols_seen).any()

    def windows(self, threat: PatchThreatModel, maximal: bool = True) -> tuple[WindowBlock, ...]:
        """What one patch of the threat can reach: a block of windows per shape, in the order (shape, top, left).

        With `maximal`, windows inside another are left out, so that every reach R(l) lies inside a window;
        enough wherever a larger window is never better for the attacked. Each allowed placement is mapped to
        one maximal window that contains its reach. Without it, exactly the reaches R(l), each once per axis.
        """
        return _windows(self, threat, maximal)

    def _shape(self, patch: "int | str | tuple[int, int]") -> tuple[int, int]:
        shapes = PatchThreatModel.parse(patch, self.image_size).shapes
        if len(shapes) != 1:
            raise UsageError(f"touched regions are per shape; {patch!r} stands for {len(shapes)} shapes")
        return shapes[0]


def _extent(seen: np.ndarray) -> int:
    first = seen.argmax(1)
    last = seen.shape[1] - 1 - seen[:, ::-1].argmax(1)
    return int(np.where(seen.any(1), last - first + 1, 0).max())


def _touched(seen: np.ndarray, side: int) -> np.ndarray:
    """Boolean [placements, regions]: an integral over pixels says whether a run of `side` px meets what is seen."""
    count = np.zeros((seen.shape[1] + 1, len(seen)), dtype=np.int64)
    count[1:] = seen.T.cumsum(0)
    return count[side:] > count[:-side]


def _compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    return (outer.astype(np.float32) @ inner.astype(np.float32)) > 0


def _axis_windows(touched: np.ndarray, maximal: bool) -> tuple[np.ndarray, np.ndarray]:
    """The distinct (maximal) lines of `touched` in order of first appearance, and for each line one that holds it."""
    # Neighbouring placements mostly reach the same regions; thousands of lines are few runs, and only those are sorted.
    changes = np.ones(len(touched), dtype=bool)
    changes[1:] = (touched[1:] != touched[:-1]).any(1)
    runs, run_of = touched[changes], np.cumsum(changes) - 1
    _, first, line = np.unique(runs, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    distinct, line = runs[first[order]], rank[line.reshape(-1)][run_of]
    if not maximal:
        return distinct, line
    counts = distinct.astype(np.int64)
    inside = counts @ counts.T == counts.sum(1)[:, None]  # [a, b]: line a lies inside line b
    is_maximal = inside.sum(1) == 1
    container = (inside & is_maximal[None, :]).argmax(1)
    position = np.cumsum(is_maximal) - 1
    return distinct[is_maximal], position[container][line]


def _witnesses(touched: np.ndarray, window_of: np.ndarray) -> np.ndarray:
    """For each window the first placement among those that reach most of it."""
    order = np.lexsort((-touched.sum(1), window_of))
    return order[np.unique(window_of[order], return_index=True)[1]]


@lru_cache(maxsize=256)
def _windows(grid: RegionGrid, threat: PatchThreatModel, maximal: bool) -> tuple[WindowBlock, ...]:
    if threat.image_size != grid.image_size:
        raise UsageError(f"the threat is for images of {threat.image_size} px, the grid for {grid.image_size} px")
    blocks = []
    for shape in threat.shapes:
        touched_rows, touched_cols = _touched(grid.rows_seen, shape[0]), _touched(grid.cols_seen, shape[1])
        rows, row_of = _axis_windows(touched_rows, maximal)
        cols, col_of = _axis_windows(touched_cols, maximal)
        size = (len(rows), len(cols))
        if threat.allowed is None:
            keep = np.ones(size, dtype=bool)
            top, left = _witnesses(touched_rows, row_of), _witnesses(touched_cols, col_of)
            tops, lefts = np.broadcast_to(top[:, None], size), np.broadcast_to(left[None, :], size)
        else:
            top, left = np.nonzero(threat.placements(shape))
            reach = touched_rows.sum(1)[top] * touched_cols.sum(1)[left]
            window = row_of[top] * size[1] + col_of[left]
            order = np.lexsort((-reach, window))
            found, first = np.unique(window[order], return_index=True)
            keep = np.zeros(size, dtype=bool)
            tops, lefts = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
            keep.flat[found], tops.flat[found], lefts.flat[found] = True, top[order[first]], left[order[first]]
        if keep.any():
            blocks.append(WindowBlock(shape, rows, cols, keep, tops, lefts))
    return tuple(blocks)
