"""The largest rectangles of pixels an attacker may replace under a mask."""

import numpy as np

MOST_PIXELS = 2**22  # of the mask at a time, which bounds memory


def maximal_rectangles(shapes: tuple[tuple[int, int], ...], allowed: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """The rectangles that fit inside one of `shapes`, lie in the True part of `allowed`, and lie in no other such one.

    A rectangle that lies in a larger one lies in one that is a pixel higher or wider, so these are tried. For a
    height and a first pixel the widest rectangle is the only one that can be maximal.

    Args:
        shapes: (height_px, width_px).
        allowed: boolean [height, width].

    Returns:
        By (height_px, width_px), ascending: int [rectangles], the index of the first pixel in the flattened mask,
        ascending.

    >>> maximal_rectangles(((2, 2),), np.array([[1, 1, 1], [1, 1, 0]], dtype=bool))
    {(1, 2): array([1]), (2, 2): array([0])}
    """
    widest = _widest(shapes, allowed.shape[0])
    white = np.packbits(allowed, axis=1)
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    column = white  # by top: the pixels at which a column of the height is white, eight in a byte
    for height in range(1, max(h for h, _ in shapes) + 1):
        if not column.any():
            break
        taller = column[:-1] & white[height:]
        tops = np.flatnonzero(column.any(1))
        if widest[height + 1] == widest[height]:
            # Every rectangle of this height may be a pixel higher. Only beside black pixels it cannot.
            lower = np.zeros_like(column)
            lower[:-1] = taller
            upper = np.zeros_like(column)
            upper[1:] = taller
            tops = np.flatnonzero((column & ~lower).any(1) & (column & ~upper).any(1))
        for some in np.array_split(tops, -(-len(tops) * allowed.shape[1] // MOST_PIXELS) or 1):
            _add(found, height, some, column, taller, widest, allowed.shape[1])
        column = taller
    return {shape: np.concatenate(found[shape]) for shape in sorted(found)}


def _widest(shapes: tuple[tuple[int, int], ...], height: int) -> np.ndarray:
    """By height in pixels, from 0 to one more than that of the image: the width of the widest patch, 0 for none."""
    widest = np.zeros(height + 2, dtype=np.int64)
    for h, w in shapes:
        widest[h] = max(widest[h], w)
    return np.maximum.accumulate(widest[::-1])[::-1]


def _runs(packed: np.ndarray, width: int) -> np.ndarray:
    """Int [rows, width]: how many white pixels follow one another from each pixel on."""
    white = np.unpackbits(packed, axis=1, count=width)
    pixel = np.arange(width, dtype=np.int32)
    black = np.where(white, np.int32(width), pixel)
    return np.minimum.accumulate(black[:, ::-1], axis=1)[:, ::-1] - pixel


def _add(
    found: dict[tuple[int, int], list[np.ndarray]],
    height: int,
    tops: np.ndarray,
    column: np.ndarray,
    taller: np.ndarray,
    widest: np.ndarray,
    width: int,
) -> None:
    """Adds the maximal rectangles of a height whose first row is one of `tops`."""
    run = _runs(column[tops], width)
    wide = np.minimum(run, widest[height])
    maximal = wide > 0
    maximal[:, 1:] &= (run[:, :-1] == 0) | (wide[:, 1:] == widest[height])  # not a pixel wider, to the left
    for first, inside in ((tops, tops < len(taller)), (tops - 1, tops > 0)):  # nor higher, downward and upward
        rows = np.flatnonzero(inside)
        reach = np.minimum(_runs(taller[first[rows]], width), widest[height + 1])
        maximal[rows] &= reach < wide[rows]
    row, left = np.nonzero(maximal)
    wide = wide[row, left]
    order = np.argsort(wide, kind="stable")
    starts = np.flatnonzero(np.diff(wide[order], prepend=0))
    for some in np.split(order, starts[1:]):
        if len(some):
            shape = (height, int(wide[some[0]]))
            found.setdefault(shape, []).append(tops[row[some]] * width + left[some])
