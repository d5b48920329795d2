"""The threat of a certificate record as numbers: patches, geometry, windows, and where patches may lie.

A part of the independent checker, see `bagcert.proofs.verify`. It is a second reading of the patch notation and of the
windows, by docs/method.md and docs/records.md. Whatever a record holds is taken to be hostile until it was checked.
"""

import base64
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from math import ceil, isqrt, prod
from operator import index
from typing import Any, NamedTuple

import numpy as np

MOST_SIDE = 8192
"""Pixels along a side of an image; regions along a side of a map; classes."""
MOST_SCORES = 2**25
"""Integers in a map."""
MOST_TERMS = 2**8
"""Shapes written in a notation."""
MOST_LINES = 2**11
"""Different lines of an axis."""
MOST_CELLS = 2**24
"""Entries of a table: windows, masks x regions, regions x pixels along an axis."""
MOST_LOOKS = 2**27
"""Pixels looked at for placements in the white part of a mask."""


class FaultError(Exception):
    """A record does not hold: a sentence, and what failed."""

    def __init__(self, reason: str, fault: str) -> None:
        super().__init__(reason, fault)
        self.reason, self.fault = reason, fault


def need(holds: object, otherwise: str, fault: str = "record") -> None:
    """Refuses the record with the sentence `otherwise` unless `holds`."""
    if not holds:
        raise FaultError(otherwise, fault)


def integer(value: Any, low: int, high: int, what: str) -> int:
    """An integer from `low` to `high`."""
    need(type(value) is int and low <= value <= high, f"{what} must be an integer from {low} to {high}, got {value!r}")
    return value


def unpack(text: str, shape: list[int], dtype: str) -> np.ndarray:
    """Integers of a shape from deflated bytes in base64. Never inflates more bytes than the shape has."""
    size = prod(shape) * int(dtype[-1])
    stream = zlib.decompressobj()
    content = stream.decompress(base64.b64decode(text, validate=True), size + 1)
    need(len(content) == size and stream.eof and not stream.unused_data, f"packed data must be of {size} bytes")
    return np.frombuffer(content, dtype).reshape(shape)


class Windows(NamedTuple):
    """Sets of regions: window (i, j) is the product of line `rows[i]` and line `cols[j]`, where `keep[i, j]`.

    A line has a 1 for each row (column) of regions that it holds, and 0 for the others.
    """

    rows: np.ndarray
    cols: np.ndarray
    keep: np.ndarray


class Reach(NamedTuple):
    """`R(l)` of one patch of `height` x `width` px, as a line of rows and a line of columns."""

    height: int
    width: int
    rows: np.ndarray
    cols: np.ndarray


@dataclass(frozen=True)
class Claim:
    """What a record says, apart from its verdict.

    Attributes:
        rule: its name, which may be any value.
        patches: K, how many patches at once.
        windows: the windows of each largest shape, or all windows together where placements are restricted.
        worst: `R(l)` of each worst placement.
    """

    rule: Any
    patches: int
    windows: list[Windows]
    worst: list[Reach]


def read_claim(record: dict[str, Any], map_size: list[int]) -> Claim:
    """The threat of a record on its geometry, with the windows.

    Args:
        record: as it was parsed.
        map_size: rows and columns of its map.
    """
    threat, rule = record["threat"], record["rule"]
    height, width = size = read_image_size(record)
    seen = read_geometry(record["geometry"], size, map_size)
    patches = integer(threat["patches"], 1, 64, "the number of patches")
    allowed = None if threat["allowed"] is None else read_allowed(threat["allowed"], height, width)
    widest = widest_patches(threat["notation"], patches, height, width)
    shapes = [[h, int(widest[h])] for h in range(1, height + 1) if widest[h] > widest[h + 1]]
    need(threat["shapes"] == shapes, f"the threat {threat['notation']} means the shapes {shapes}", "proof")
    rows, cols = Axis(seen[0], height), Axis(seen[1], width)
    windows = windows_anywhere(shapes, rows, cols) if allowed is None else [windows_within(widest, allowed, rows, cols)]
    need(sum(each.keep.size for each in windows) <= MOST_CELLS, "too many windows to go through", "limit")
    count = patches * (2 if rule == "double-masking" else 1)
    places = record["verdict"]["worst_placement"]
    worst = []
    for _, place in zip(range(count), [places] if count == 1 else places, strict=True):
        top, left, h, w = map(index, place)
        inside = min(top, left, h - 1, w - 1) >= 0 and h <= height - top and w <= min(width - left, widest[h])
        white = inside and (allowed is None or allowed[top : top + h, left : left + w].all())
        need(white, f"the worst placement {place} is not allowed", "proof")
        worst.append(Reach(h, w, rows.line(top, h), cols.line(left, w)))
    return Claim(rule, patches, windows, worst)


def read_image_size(record: dict[str, Any]) -> tuple[int, int]:
    """Height and width of the image in pixels."""
    height, width = (integer(side, 1, MOST_SIDE, "a side in px") for side in record["image"]["size_px"])
    return height, width


def read_geometry(geometry: dict[str, Any], size: tuple[int, int], map_size: list[int]) -> tuple[list, list]:
    """For each row and each column of regions the runs [start, stop) of pixels that it sees."""
    seen = geometry["rows"], geometry["cols"]
    need([len(axis) for axis in seen] == map_size, f"the geometry must have {map_size} rows and columns")
    for axis, pixels in zip(seen, size, strict=True):
        for runs in axis:
            ends = []
            for start, stop in runs:
                ends += [integer(end, 0, pixels, "an end of a run of pixels") for end in (start, stop)]
            need(ends == sorted(set(ends)), f"the pixels of a region must be ascending runs [start, stop), got {runs}")
    return seen


def read_allowed(packed: str, height: int, width: int) -> np.ndarray:
    """Boolean [height, width]: the white part, within which patches may lie."""
    bits = unpack(packed, [-(-height * width // 8)], "u1")
    return np.unpackbits(bits, count=height * width).reshape(height, width) > 0


def widest_patches(notation: str, patches: int, height: int, width: int) -> np.ndarray:
    """By height in pixels, from 0 to `height` + 1: the width of the widest patch of that height, 0 where there is none.

    Reads 5, 2x8, 2%, 5+2x8, area:25 and 2*5. A patch is any rectangle that fits inside one of those that are written.
    """
    ((number, text),) = re.findall(r"\A(?:([0-9]+)\*)?([^*]+)\Z", notation)
    terms = text.split("+")
    need(len(terms) <= MOST_TERMS, f"{len(terms):,} shapes are too many to go through", "limit")
    heights, widest = np.arange(1, height + 1), np.zeros(height + 2, dtype=int)
    for term in terms:
        ((area, share, h, w),) = re.findall(
            r"\A(?:area:([0-9]+)|([0-9]+(?:\.[0-9]+)?)%|([0-9]+)(?:x([0-9]+))?)\Z", term
        )
        if area:
            wide = np.minimum(width, min(int(area), height * width) // heights)
        else:
            tall = isqrt(ceil(Fraction(share) * height * width / 100) - 1) + 1 if share else int(h)
            need(1 <= tall <= height and 1 <= int(w or tall) <= width, "a patch does not fit")
            wide = np.where(heights <= tall, int(w or tall), 0)
        widest[1:-1] = np.maximum(widest[1:-1], wide)
    need(widest[1] > 0, "a patch must be of at least 1 px")
    need(int(number or 1) == patches, f"the threat {notation} is not of {patches} patches", "proof")
    return widest


class Axis:
    """The rows (or columns) of regions, and which of them see a pixel of a run of pixels: the line of that run.

    Lines are numbered in the order in which `numbers` meets them.
    """

    def __init__(self, seen: list, pixels: int) -> None:
        need(len(seen) * pixels <= MOST_CELLS, "the geometry is too large to go through", "limit")
        sees = np.zeros((pixels + 1, len(seen)), dtype=np.int16)
        for region, runs in enumerate(seen):
            for start, stop in runs:
                sees[start + 1 : stop + 1, region] = 1
        self._seen_before = sees.cumsum(0, dtype=np.int16)  # [p, a]: how many pixels before p region a sees
        self._number: dict[bytes, int] = {}
        self._looks_left = 2**3 * MOST_LOOKS

    def line(self, first: int, side: int) -> np.ndarray:
        """The line of `side` pixels from `first` on."""
        return (self._seen_before[first + side] > self._seen_before[first]).astype(float)

    def numbers(self, side: int) -> np.ndarray:
        """For each run of `side` pixels the number of its line."""
        self._looks_left -= self._seen_before.size + 2**6 * len(self._seen_before)
        need(self._looks_left >= 0, "the shapes are too many to go through", "limit")
        lines = np.packbits(self._seen_before[side:] > self._seen_before[:-side], axis=1)
        changes = np.append(True, (lines[1:] != lines[:-1]).any(1))
        found = [self._number.setdefault(line.tobytes(), len(self._number)) for line in lines[changes]]
        need(len(self._number) < 2**15, "the sets of rows or columns are too many to go through", "limit")
        return np.array(found)[changes.cumsum() - 1]

    def lines(self, numbers: list[int]) -> np.ndarray:
        """Lines by their numbers."""
        need(len(numbers) <= MOST_LINES, f"{len(numbers):,} sets of rows or columns are too many", "limit")
        packed = np.frombuffer(b"".join(self._number), np.uint8).reshape(len(self._number), -1)[numbers]
        return np.unpackbits(packed, axis=1, count=self._seen_before.shape[1]).astype(np.float32)

    def descending(self) -> list[int]:
        """The numbers of all lines, as strings of 0 and 1 in descending order."""
        text = list(self._number)
        return sorted(self._number.values(), key=text.__getitem__, reverse=True)


def lies_inside(lines: np.ndarray) -> np.ndarray:
    """[a, b]: line a lies inside line b."""
    return (lines @ lines.T == lines.sum(1)[:, None]).astype(np.float32)


def windows_anywhere(shapes: list[list[int]], rows: Axis, cols: Axis) -> list[Windows]:
    """For each of the largest shapes the `R(l)` that lie in no other of that shape, in the order of their placements.

    `R(l)` is a product of two lines, so it lies in no other if neither of its lines does.
    """
    found = []
    for h, w in shapes:
        maximal = []
        for axis, side in ((rows, h), (cols, w)):
            lines = axis.lines(list(dict.fromkeys(axis.numbers(side).tolist())))
            maximal.append(lines[lies_inside(lines).sum(1) == 1])
        own_rows, own_cols = maximal
        found.append(Windows(own_rows, own_cols, np.ones((len(own_rows), len(own_cols)), dtype=bool)))
    return found


def windows_within(widest: np.ndarray, allowed: np.ndarray, rows: Axis, cols: Axis) -> Windows:
    """Each `R(l)` of any patch in the white part that lies in no other, once; those with earlier rows first.

    Lines are in descending order as strings of 0 and 1, and so windows are sorted by their rows, then by their columns.
    """
    need(allowed.any(), "no patch lies in the white part")
    height, width = int(np.flatnonzero(widest)[-1]), allowed.shape[1]
    row_numbers = [rows.numbers(h) for h in range(1, height + 1)]
    col_numbers = np.zeros((widest[1] + 1, width), dtype=np.int16)  # by the width of a patch and its first column
    for w in range(1, widest[1] + 1):
        col_numbers[w, : width - w + 1] = cols.numbers(w)
    row_order, col_order = rows.descending(), cols.descending()
    row_lines, col_lines = rows.lines(row_order), cols.lines(col_order)
    reached = np.zeros((len(row_lines), len(col_lines)), dtype=bool)
    for h, tops, wide in placements_within(widest, allowed, height):
        top, left = wide.nonzero()
        reached[row_numbers[h - 1][tops[top]], col_numbers[wide[top, left], left]] = True
    reached = reached[np.ix_(row_order, col_order)]
    some = reached & np.outer(row_lines.any(1), col_lines.any(1))  # a product with an empty line holds no region
    holders = lies_inside(row_lines) @ some.astype(np.float32) @ lies_inside(col_lines).T
    keep = some & (holders == 1)
    if not some.any():
        keep[tuple(np.argwhere(reached)[0])] = True  # one window, of no region
    used_rows, used_cols = keep.any(1), keep.any(0)
    return Windows(row_lines[used_rows], col_lines[used_cols], keep[np.ix_(used_rows, used_cols)])


def placements_within(widest: np.ndarray, allowed: np.ndarray, height: int):
    """Yields (h, tops, wide): of the patches h px high, the widest in the white part from each top and left pixel on.

    `wide` is [tops, image width], 0 where no patch of that height fits. A top row is left out where its patches lie
    inside higher ones.
    """
    width, looks_left = allowed.shape[1], MOST_LOOKS
    tall = white = np.packbits(allowed, axis=1)  # by top: the columns in which h pixels from there on are white
    for h in range(1, height + 1):
        taller, look = tall[:-1] & white[h:], np.array(tall.any(1))
        if widest[h] == widest[h + 1]:  # a row more, above or below, that leaves all columns: the higher patch is there
            look[:-1] &= (tall[:-1] != taller).any(1)
            look[1:] &= (tall[1:] != taller).any(1)
        looks_left -= allowed.size // 2**8 + int(look.sum()) * width
        need(looks_left >= 0, "the mask leaves too many placements to go through", "limit")
        for tops in np.array_split(look.nonzero()[0], int(look.sum()) * width // 2**22 + 1):  # to bound memory
            black = np.unpackbits(tall[tops], axis=1, count=width) == 0
            end = np.minimum.accumulate(np.where(black, np.arange(width), width)[:, ::-1], axis=1)[:, ::-1]
            yield h, tops, np.minimum(end - np.arange(width), widest[h])
        tall = taller
