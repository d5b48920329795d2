"""Geometry of score maps: which pixels each region sees, and which regions a patch can reach.

Receptive fields are products of row sets and column sets, so the geometry is stored per axis as boolean incidence
matrices. This representation covers strides, dilation, clipping at the border, resizing, cropping, rotation by
multiples of 90 degrees and ablations that wrap around. See docs/method.md, "Score map".
"""

from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache

import numpy as np

from bagcert.errors import UsageError
from bagcert.threat import PatchThreatModel


@dataclass(frozen=True, eq=False)
class WindowBlock:
    """A set of windows, each the product of a row set in `rows` and a column set in `cols` that is marked by `keep`.

    Attributes:
        rows: boolean [row windows, map rows].
        cols: boolean [column windows, map columns].
        keep: boolean [row windows, column windows].
        places: int [row windows, column windows, 4], the first placement `[top, left, height, width]` in pixels whose
            reach is the window; undefined where `keep` is False.
    """

    rows: np.ndarray
    cols: np.ndarray
    keep: np.ndarray
    places: np.ndarray

    @cached_property
    def regions(self) -> np.ndarray:
        """Number of regions in each window, int [row windows, column windows]."""
        return np.outer(self.rows.sum(1), self.cols.sum(1))


@dataclass(frozen=True, eq=False)
class RegionGrid:
    """Geometry of a score map: region (a, b) sees pixel (i, j) iff `rows_seen[a, i]` and `cols_seen[b, j]`.

    Attributes:
        rows_seen: boolean [map rows, image height].
        cols_seen: boolean [map columns, image width].
        masks_per_axis: largest number of windows per axis; None for no limit. See `windows`.
    """

    rows_seen: np.ndarray
    cols_seen: np.ndarray
    masks_per_axis: int | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        if self.masks_per_axis is not None and self.masks_per_axis < 1:
            raise UsageError(f"the number of masks per axis must be at least 1, got {self.masks_per_axis}")
        for name in ("rows_seen", "cols_seen"):
            seen = np.ascontiguousarray(getattr(self, name), dtype=bool)
            if seen.ndim != 2 or 0 in seen.shape:
                raise UsageError(f"{name} must be a non-empty [regions, pixels] table, got shape {seen.shape}")
            object.__setattr__(self, name, seen)

    @classmethod
    def from_axis(cls, receptive_field: int, stride: int, start: int, image_size: tuple[int, int]) -> "RegionGrid":
        """Build the grid of a stack of convolutions: region `a` sees `receptive_field` pixels from start + stride * a.

        Regions extend to the same margin `-start` beyond the far side of the image. Pixels outside the image are
        clipped.

        Args:
            receptive_field: side of the receptive field in pixels.
            stride: stride of the regions in pixels.
            start: first pixel of region 0; negative with padding.
            image_size: (height_px, width_px).
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
        """Rows of regions that a patch reaches, boolean [placements, map rows], for each top row of the patch."""
        return _touched(self.rows_seen, self._shape(patch)[0])

    def touched_cols(self, patch: "int | str | tuple[int, int]") -> np.ndarray:
        """Columns of regions that a patch reaches, boolean [placements, map columns], for each left column."""
        return _touched(self.cols_seen, self._shape(patch)[1])

    def through(self, rows_from: np.ndarray, cols_from: np.ndarray) -> "RegionGrid":
        """Grid of the same map relative to the image before a separable preprocessing step (resize, crop, flip).

        Args:
            rows_from: boolean [height after, height before], which input rows each output row depends on.
            cols_from: the same for columns.
        """
        for name, table, pixels in (
            ("rows_from", rows_from, self.image_size[0]),
            ("cols_from", cols_from, self.image_size[1]),
        ):
            if len(table) != pixels:
                raise UsageError(f"{name} must have one row for each of {pixels} px, got {len(table)}")
        rows, cols = _compose(self.rows_seen, rows_from), _compose(self.cols_seen, cols_from)
        return replace(self, rows_seen=rows, cols_seen=cols)

    def transposed(self) -> "RegionGrid":
        """Grid of the transposed map for the transposed image."""
        return replace(self, rows_seen=self.cols_seen, cols_seen=self.rows_seen)

    def with_masks_per_axis(self, most: int | None) -> "RegionGrid":
        """The same geometry with another limit for the windows per axis; the grid itself if the limit is the same."""
        return self if most == self.masks_per_axis else replace(self, masks_per_axis=most)

    def covers(self, other: "RegionGrid") -> bool:
        """Whether every region sees at least the pixels that it sees in `other`."""
        same = self.map_size == other.map_size and self.image_size == other.image_size
        return same and not (other.rows_seen & ~self.rows_seen).any() and not (other.cols_seen & ~self.cols_seen).any()

    def windows(self, threat: PatchThreatModel) -> tuple[WindowBlock, ...]:
        """Windows of one patch: the maximal reaches R(l). Every reach is contained in a window.

        For unrestricted placements there is one block per shape. It contains the reaches that no other reach of that
        shape contains, in the order (shape, top, left). For a mask of allowed placements there is one block. It
        contains the reaches that no other reach contains, sorted by row sets and then column sets as strings of 0 and
        1 in descending order.

        With `masks_per_axis` = k, neighboring windows are merged: of the n row windows of a block, window i becomes
        part of window floor(i k' / n) with k' = min(n, k), and in the same way for columns. Every reach is still
        contained in a window, so certificates hold, but they are weaker. Rules that compare all pairs of windows need
        at most k^2 (k^2 + 1) / 2 comparisons per block.

        Source of the mask sets: Xiang et al., PatchCleanser, USENIX Security 2022, section 3.2.

        Raises:
            UsageError: the threat is for another image size.
        """
        return _windows(self, threat)

    def _shape(self, patch: "int | str | tuple[int, int]") -> tuple[int, int]:
        shapes = PatchThreatModel.parse(patch, self.image_size).shapes
        if len(shapes) != 1:
            raise UsageError(f"touched regions are defined for one shape; {patch!r} has {len(shapes)} shapes")
        return shapes[0]


def _extent(seen: np.ndarray) -> int:
    first = seen.argmax(1)
    last = seen.shape[1] - 1 - seen[:, ::-1].argmax(1)
    return int(np.where(seen.any(1), last - first + 1, 0).max())


def _touched(seen: np.ndarray, side: int) -> np.ndarray:
    """Which regions see a pixel of each run of `side` px, boolean [placements, regions], by prefix sums over pixels."""
    count = np.zeros((seen.shape[1] + 1, len(seen)), dtype=np.int64)
    count[1:] = seen.T.cumsum(0)
    return count[side:] > count[:-side]


def _compose(outer: np.ndarray, inner: np.ndarray) -> np.ndarray:
    return (outer.astype(np.float32) @ inner.astype(np.float32)) > 0


def _lines(touched: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct lines of `touched` in order of first appearance, and the line number of each placement."""
    # Neighboring placements mostly reach the same regions, so only the first line of each run has to be sorted.
    changes = np.ones(len(touched), dtype=bool)
    changes[1:] = (touched[1:] != touched[:-1]).any(1)
    runs, run_of = touched[changes], np.cumsum(changes) - 1
    _, first, line = np.unique(runs, axis=0, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return runs[first[order]], rank[line.reshape(-1)][run_of]


def _inside(lines: np.ndarray) -> np.ndarray:
    """Whether line a is contained in line b, boolean [lines, lines]."""
    counts = lines.astype(np.float32)
    return counts @ counts.T == counts.sum(1)[:, None]


def _axis_windows(seen: np.ndarray, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Maximal lines of patches of a side along an axis, in order of first appearance, and their first placements."""
    return _axis_windows_of(np.packbits(seen, axis=1).tobytes(), seen.shape, side)


@lru_cache(maxsize=4096)
def _axis_windows_of(packed: bytes, shape: tuple[int, int], side: int) -> tuple[np.ndarray, np.ndarray]:
    """`_axis_windows`, cached by content because photos of many sizes share the lengths of their axes."""
    lines = np.frombuffer(packed, dtype=np.uint8).reshape(shape[0], -1)
    distinct, line_of = _lines(_touched(np.unpackbits(lines, axis=1, count=shape[1]).astype(bool), side))
    is_maximal = _inside(distinct).sum(1) == 1
    first = np.unique(line_of, return_index=True)[1]
    return distinct[is_maximal], first[is_maximal]


@lru_cache(maxsize=256)
def _windows(grid: RegionGrid, threat: PatchThreatModel) -> tuple[WindowBlock, ...]:
    if threat.image_size != grid.image_size:
        raise UsageError(f"the threat is for images of {threat.image_size} px, the grid for {grid.image_size} px")
    blocks = _maximal(grid, threat)
    return blocks if grid.masks_per_axis is None else tuple(_merged(block, grid.masks_per_axis) for block in blocks)


def _maximal(grid: RegionGrid, threat: PatchThreatModel) -> tuple[WindowBlock, ...]:
    """The maximal reaches, without a limit for their number."""
    if threat.allowed is not None:
        return (_restricted(grid, threat),)
    blocks = []
    for shape in threat.shapes:
        rows, tops = _axis_windows(grid.rows_seen, shape[0])
        cols, lefts = _axis_windows(grid.cols_seen, shape[1])
        size = (len(rows), len(cols))
        places = np.stack(np.broadcast_arrays(tops[:, None], lefts[None, :], *shape), 2)
        blocks.append(WindowBlock(rows, cols, np.ones(size, dtype=bool), places))
    return tuple(blocks)


def _merged(block: WindowBlock, most: int) -> WindowBlock:
    """Merge neighboring windows so that at most `most` remain per axis."""
    (rows, row_of), (cols, col_of) = _unions(block.rows, most), _unions(block.cols, most)
    keep = np.zeros((len(rows), len(cols)), dtype=bool)
    places = np.zeros((*keep.shape, 4), dtype=np.int64)
    row, col = (index[::-1] for index in block.keep.nonzero())  # so that the first placement is written last
    keep[row_of[row], col_of[col]] = True
    places[row_of[row], col_of[col]] = block.places[row, col]
    return WindowBlock(rows, cols, keep, places)


def _unions(lines: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Unions of neighboring lines, at most `most`, and the number of the union that contains each line."""
    count = min(len(lines), most)
    union_of = np.arange(len(lines)) * count // len(lines)
    return np.logical_or.reduceat(lines, np.searchsorted(union_of, np.arange(count))), union_of


def _restricted(grid: RegionGrid, threat: PatchThreatModel) -> WindowBlock:
    """The maximal reaches of all shapes for a mask of allowed placements."""
    shapes = threat.maximal_shapes
    row_lines, row_of = _axis_lines(grid.rows_seen, {h for h, _ in shapes})
    col_lines, col_of = _axis_lines(grid.cols_seen, {w for _, w in shapes})
    places = np.zeros((len(row_lines), len(col_lines), 4), dtype=np.int64)
    for shape in reversed(shapes):  # so that the first placement of a reach is written last
        corners = threat.corners(shape)[::-1]
        reach = row_of[shape[0]][corners[:, 0]], col_of[shape[1]][corners[:, 1]]
        places[reach] = np.concatenate([corners, np.broadcast_to(shape, corners.shape)], 1)
    found = places[:, :, 2] > 0
    holds_some = np.outer(row_lines.any(1), col_lines.any(1))
    if not (found & holds_some).any():  # no patch reaches a region
        place = places[tuple(np.argwhere(found)[0])][None, None]
        nothing = [np.zeros((1, count), dtype=bool) for count in grid.map_size]
        return WindowBlock(nothing[0], nothing[1], np.ones((1, 1), dtype=bool), place)
    found &= holds_some
    holders = _inside(row_lines).astype(np.float32) @ found.astype(np.float32) @ _inside(col_lines).T
    keep = found & (holders == 1)  # contained only in itself
    rows, cols = keep.any(1), keep.any(0)
    return WindowBlock(row_lines[rows], col_lines[cols], keep[rows][:, cols], places[rows][:, cols])


def _axis_lines(seen: np.ndarray, sides: set[int]) -> tuple[np.ndarray, dict[int, np.ndarray]]:
    """The distinct lines of patches of all `sides`, descending, and for each side the line number of each placement."""
    lines = {side: _lines(_touched(seen, side)) for side in sorted(sides)}
    distinct, which = np.unique(np.concatenate([own for own, _ in lines.values()]), axis=0, return_inverse=True)
    which = len(distinct) - 1 - which.reshape(-1)  # descending
    ends = np.cumsum([len(own) for own, _ in lines.values()])
    parts = np.split(which, ends[:-1])
    return distinct[::-1], {side: part[of] for part, (side, (_, of)) in zip(parts, lines.items(), strict=True)}
