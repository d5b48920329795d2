"""Reads the threat of a certificate record: patches, geometry, windows and allowed placements.

This module is part of the independent checker; see `bagcert.proofs.verify`. It implements the patch notation and the
windows a second time, from docs/method.md and docs/records.md. The content of a record is untrusted until checked.
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
"""Limit for the pixels along a side of an image, the regions along a side of a map, and the classes."""
MOST_SCORES = 2**25
"""Limit for the number of integers in a map."""
MOST_TERMS = 2**8
"""Limit for the number of shapes in a patch notation."""
MOST_LINES = 2**11
"""Limit for the number of distinct lines of an axis."""
MOST_CELLS = 2**24
"""Limit for the size of a table: windows, masks x regions, regions x pixels along an axis."""
MOST_LOOKS = 2**27
"""Limit for the number of pixels examined to find placements in the allowed part of a mask."""


class FaultError(Exception):
    """A record failed verification.

    Attributes:
        reason: explanation in one sentence.
        fault: what failed: "record", "proof" or "limit".
    """

    def __init__(self, reason: str, fault: str) -> None:
        super().__init__(reason, fault)
        self.reason, self.fault = reason, fault


def need(holds: object, otherwise: str, fault: str = "record") -> None:
    """Raise `FaultError` with the message `otherwise` unless `holds` is true."""
    if not holds:
        raise FaultError(otherwise, fault)


def integer(value: Any, low: int, high: int, what: str) -> int:
    """Check that a value is an integer from `low` to `high` and return it."""
    need(type(value) is int and low <= value <= high, f"{what} must be an integer from {low} to {high}, got {value!r}")
    return value


def unpack(text: str, shape: list[int], dtype: str) -> np.ndarray:
    """Decode base64, inflate, and return an array of integers. Never inflates more bytes than `shape` requires."""
    size = prod(shape) * int(dtype[-1])
    stream = zlib.decompressobj()
    content = stream.decompress(base64.b64decode(text, validate=True), size + 1)
    need(len(content) == size and stream.eof and not stream.unused_data, f"packed data must be of {size} bytes")
    return np.frombuffer(content, dtype).reshape(shape)


class Windows(NamedTuple):
    """Windows as sets of regions: window (i, j) is the product of line `rows[i]` and line `cols[j]` if `keep[i, j]`.

    A line is 1 for each row (column) of regions that it contains, and 0 elsewhere.
    """

    rows: np.ndarray
    cols: np.ndarray
    keep: np.ndarray


class Reach(NamedTuple):
    """The reach `R(l)` of one patch of `height` x `width` px, as a line of rows and a line of columns."""

    height: int
    width: int
    rows: np.ndarray
    cols: np.ndarray


@dataclass(frozen=True)
class Claim:
    """The claim of a record, without its verdict.

    Attributes:
        rule: name of the rule; not validated, so it can be any value.
        patches: K, the number of simultaneous patches.
        windows: the windows of each largest shape, or all windows in one entry if placements are restricted. They are
            merged if the masks per axis are limited.
        worst: the reach `R(l)` of each worst placement, or the mask that contains it if the masks per axis are limited.
    """

    rule: Any
    patches: int
    windows: list[Windows]
    worst: list[Reach]


def read_claim(record: dict[str, Any], map_size: list[int]) -> Claim:
    """Read the threat and the geometry of a record and compute the windows.

    Args:
        record: the parsed record.
        map_size: number of rows and columns of its map.

    Raises:
        FaultError: the threat or the geometry is invalid, or too large to check.
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
    maximal = windows_anywhere(shapes, rows, cols) if allowed is None else [windows_within(widest, allowed, rows, cols)]
    most = read_masks_per_axis(record["geometry"])
    windows = maximal if most is None else [merged(each, most) for each in maximal]
    need(sum(each.keep.size for each in windows) <= MOST_CELLS, "too many windows to check", "limit")
    count = patches * (2 if rule == "double-masking" else 1)
    places = record["verdict"]["worst_placement"]
    worst = []
    for _, place in zip(range(count), [places] if count == 1 else places, strict=True):
        top, left, h, w = map(index, place)
        inside = min(top, left, h - 1, w - 1) >= 0 and h <= height - top and w <= min(width - left, widest[h])
        white = inside and (allowed is None or allowed[top : top + h, left : left + w].all())
        need(white, f"the worst placement {place} is not allowed", "proof")
        reach = Reach(h, w, rows.line(top, h), cols.line(left, w))
        if most is not None:
            reach = mask_of(reach, maximal[0 if allowed is not None else shapes.index([h, w])], most)
        worst.append(reach)
    return Claim(rule, patches, windows, worst)


def read_image_size(record: dict[str, Any]) -> tuple[int, int]:
    """Read the height and width of the image in pixels."""
    height, width = (integer(side, 1, MOST_SIDE, "a side in px") for side in record["image"]["size_px"])
    return height, width


def read_geometry(geometry: dict[str, Any], size: tuple[int, int], map_size: list[int]) -> tuple[list, list]:
    """Read the runs [start, stop) of pixels that each row and each column of regions sees."""
    seen = geometry["rows"], geometry["cols"]
    need([len(axis) for axis in seen] == map_size, f"the geometry must have {map_size} rows and columns")
    for axis, pixels in zip(seen, size, strict=True):
        for runs in axis:
            ends = []
            for start, stop in runs:
                ends += [integer(end, 0, pixels, "an end of a run of pixels") for end in (start, stop)]
            need(ends == sorted(set(ends)), f"the pixels of a region must be ascending runs [start, stop), got {runs}")
    return seen


def read_masks_per_axis(geometry: dict[str, Any]) -> int | None:
    """Read the largest number of masks per axis; None if it is not limited."""
    most = geometry.get("masks_per_axis")
    return most if most is None else integer(most, 1, MOST_SIDE, "the number of masks per axis")


def read_allowed(packed: str, height: int, width: int) -> np.ndarray:
    """Read the mask of allowed placements: boolean [height, width], True where patches may lie."""
    bits = unpack(packed, [-(-height * width // 8)], "u1")
    return np.unpackbits(bits, count=height * width).reshape(height, width) > 0


def widest_patches(notation: str, patches: int, height: int, width: int) -> np.ndarray:
    """Width of the widest patch for each height in pixels from 0 to `height` + 1; 0 if there is no such patch.

    Parses the notations 5, 2x8, 2%, 5+2x8, area:25 and 2*5. A patch is any rectangle that fits inside one of the
    rectangles of the notation.
    """
    ((number, text),) = re.findall(r"\A(?:([0-9]+)\*)?([^*]+)\Z", notation)
    terms = text.split("+")
    need(len(terms) <= MOST_TERMS, f"{len(terms):,} shapes are too many to check", "limit")
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
    """The rows (or columns) of regions and the lines of pixel runs.

    The line of a run of pixels marks the rows (columns) of regions that see at least one pixel of the run. Lines are
    numbered in the order in which `numbers` encounters them.
    """

    def __init__(self, seen: list, pixels: int) -> None:
        need(len(seen) * pixels <= MOST_CELLS, "the geometry is too large to check", "limit")
        sees = np.zeros((pixels + 1, len(seen)), dtype=np.int16)
        for region, runs in enumerate(seen):
            for start, stop in runs:
                sees[start + 1 : stop + 1, region] = 1
        self._seen_before = sees.cumsum(0, dtype=np.int16)  # [p, a]: number of pixels before p that region a sees
        self._number: dict[bytes, int] = {}
        self._looks_left = 2**3 * MOST_LOOKS

    def line(self, first: int, side: int) -> np.ndarray:
        """The line of the `side` pixels that start at pixel `first`."""
        return (self._seen_before[first + side] > self._seen_before[first]).astype(float)

    def numbers(self, side: int) -> np.ndarray:
        """The number of the line of each run of `side` pixels."""
        self._looks_left -= self._seen_before.size + 2**6 * len(self._seen_before)
        need(self._looks_left >= 0, "the shapes are too many to check", "limit")
        lines = np.packbits(self._seen_before[side:] > self._seen_before[:-side], axis=1)
        changes = np.append(True, (lines[1:] != lines[:-1]).any(1))
        found = [self._number.setdefault(line.tobytes(), len(self._number)) for line in lines[changes]]
        need(len(self._number) < 2**15, "the sets of rows or columns are too many to check", "limit")
        return np.array(found)[changes.cumsum() - 1]

    def lines(self, numbers: list[int]) -> np.ndarray:
        """The lines with the given numbers, float32 [lines, regions]."""
        need(len(numbers) <= MOST_LINES, f"{len(numbers):,} sets of rows or columns are too many", "limit")
        packed = np.frombuffer(b"".join(self._number), np.uint8).reshape(len(self._number), -1)[numbers]
        return np.unpackbits(packed, axis=1, count=self._seen_before.shape[1]).astype(np.float32)

    def descending(self) -> list[int]:
        """The numbers of all lines, sorted by the lines as strings of 0 and 1 in descending order."""
        text = list(self._number)
        return sorted(self._number.values(), key=text.__getitem__, reverse=True)


def groups(count: int, most: int) -> list[int]:
    """The group of each of `count` lines: line i belongs to group floor(i k / count) with k = min(count, most)."""
    k = min(count, most)
    return [i * k // count for i in range(count)]


def merged(windows: Windows, most: int) -> Windows:
    """Merge the lines of each group into their union, so that at most `most` lines remain per axis."""
    row_groups, col_groups = groups(len(windows.rows), most), groups(len(windows.cols), most)
    keep = np.zeros((max(row_groups) + 1, max(col_groups) + 1), dtype=bool)
    for i, j in np.argwhere(windows.keep):
        keep[row_groups[i], col_groups[j]] = True
    return Windows(unions(windows.rows, row_groups), unions(windows.cols, col_groups), keep)


def unions(lines: np.ndarray, group: list[int]) -> np.ndarray:
    """The union of the lines of each group."""
    return np.array([lines[np.array(group) == number].max(0) for number in range(max(group) + 1)])


def mask_of(reach: Reach, windows: Windows, most: int) -> Reach:
    """The merged window that contains the window of a worst placement."""
    same = [
        (i, j)
        for i, j in np.argwhere(windows.keep)
        if (windows.rows[i] == reach.rows).all() and (windows.cols[j] == reach.cols).all()
    ]
    need(same, "the reach of a worst placement must be maximal", "proof")
    ((row, col),) = same
    row_groups, col_groups = groups(len(windows.rows), most), groups(len(windows.cols), most)
    rows, cols = unions(windows.rows, row_groups), unions(windows.cols, col_groups)
    return reach._replace(rows=rows[row_groups[row]].astype(float), cols=cols[col_groups[col]].astype(float))


def lies_inside(lines: np.ndarray) -> np.ndarray:
    """Containment matrix: entry [a, b] is 1 if line a is contained in line b, else 0."""
    return (lines @ lines.T == lines.sum(1)[:, None]).astype(np.float32)


def windows_anywhere(shapes: list[list[int]], rows: Axis, cols: Axis) -> list[Windows]:
    """Compute the maximal reaches `R(l)` of each largest shape, in the order of their placements.

    A reach is maximal if no other reach of the same shape contains it. `R(l)` is a product of two lines, so it is
    maximal if both of its lines are.
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
    """Compute the maximal reaches `R(l)` of all patches in the allowed part of the image, without duplicates.

    Lines are sorted as strings of 0 and 1 in descending order, so windows are sorted by rows, then by columns.
    """
    need(allowed.any(), "the mask allows no placement")
    height, width = int(np.flatnonzero(widest)[-1]), allowed.shape[1]
    row_numbers = [rows.numbers(h) for h in range(1, height + 1)]
    col_numbers = np.zeros((widest[1] + 1, width), dtype=np.int16)  # [width of a patch, its first column]
    for w in range(1, widest[1] + 1):
        col_numbers[w, : width - w + 1] = cols.numbers(w)
    row_order, col_order = rows.descending(), cols.descending()
    row_lines, col_lines = rows.lines(row_order), cols.lines(col_order)
    reached = np.zeros((len(row_lines), len(col_lines)), dtype=bool)
    for h, tops, wide in placements_within(widest, allowed, height):
        top, left = wide.nonzero()
        reached[row_numbers[h - 1][tops[top]], col_numbers[wide[top, left], left]] = True
    reached = reached[np.ix_(row_order, col_order)]
    some = reached & np.outer(row_lines.any(1), col_lines.any(1))  # a product with an empty line contains no region
    holders = lies_inside(row_lines) @ some.astype(np.float32) @ lies_inside(col_lines).T
    keep = some & (holders == 1)
    if not some.any():
        keep[tuple(np.argwhere(reached)[0])] = True  # a single window without regions
    used_rows, used_cols = keep.any(1), keep.any(0)
    return Windows(row_lines[used_rows], col_lines[used_cols], keep[np.ix_(used_rows, used_cols)])


def placements_within(widest: np.ndarray, allowed: np.ndarray, height: int):
    """Yield (h, tops, wide) for every patch height h: the widest allowed patch at each top and left pixel.

    `wide` is int [tops, image width], and 0 where no patch of height h fits. Top rows whose patches are all contained
    in taller patches are omitted.
    """
    width, looks_left = allowed.shape[1], MOST_LOOKS
    tall = white = np.packbits(allowed, axis=1)  # by top row: columns where h pixels from it on are allowed
    for h in range(1, height + 1):
        taller, look = tall[:-1] & white[h:], np.array(tall.any(1))
        if widest[h] == widest[h + 1]:  # one more row above or below, allowed in the same columns, gives a taller patch
            look[:-1] &= (tall[:-1] != taller).any(1)
            look[1:] &= (tall[1:] != taller).any(1)
        looks_left -= allowed.size // 2**8 + int(look.sum()) * width
        need(looks_left >= 0, "the mask leaves too many placements to check", "limit")
        for tops in np.array_split(look.nonzero()[0], int(look.sum()) * width // 2**22 + 1):  # bounds memory
            black = np.unpackbits(tall[tops], axis=1, count=width) == 0
            end = np.minimum.accumulate(np.where(black, np.arange(width), width)[:, ::-1], axis=1)[:, ::-1]
            yield h, tops, np.minimum(end - np.arange(width), widest[h])
        tall = taller
