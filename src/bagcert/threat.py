"""The threat model: shapes and placements of the rectangles of pixels that an attacker can replace.

Placements are defined only in this module, in pixels of the user's image (before preprocessing).
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bagcert.errors import UnreadableError, UsageError, sanitize
from bagcert.io.files import open_regular

if TYPE_CHECKING:
    from PIL import Image

NOTATION = "5, 2x8, 2%, 5+2x8 (either shape), area:25 (any rectangle of at most 25 px), 2*5 (two patches)"

MASK_FORMATS = ("PNG", "BMP", "GIF", "JPEG", "TIFF", "WEBP")
ORIENTATION_TAG = 0x0112
MAX_MASK_BYTES = 1 << 29
MAX_MASK_PIXELS = 100_000_000
"""Limit for the pixels of a mask image; a mask has the size of an image, see `bagcert.data.photo`."""

MOST_PATCHES, MOST_TERMS, MOST_DIGITS = 64, 256, 20
"""Limits of the patch notation: simultaneous patches, shapes in a set, digits in a number."""

MOST_PIXELS = 2**22  # pixels of a mask processed at a time; bounds memory

_SQUARE = re.compile(r"(\d+)")
_RECTANGLE = re.compile(r"(\d+)x(\d+)")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
_AREA = re.compile(r"area:(\d+)")
_PATCHES = re.compile(r"(\d+)\*(.+)")


@dataclass(frozen=True, eq=False)
class PatchThreatModel:
    """Threat model of a patch attack: the attacker replaces the pixels of `patches` rectangles of an image.

    Each rectangle fits inside one of `shapes` (height_px, width_px) and lies entirely inside the image and, if
    `allowed` is given, entirely inside its True part. The content of the rectangles is arbitrary. Patches of any form
    inside such a rectangle are covered as well.

    It suffices to consider maximal rectangles, which are not contained in another admissible rectangle. Without a mask
    they have the shapes `shapes`. With a mask they can be smaller. To enumerate placements, use `maximal_shapes` and
    `corners`, which are valid with and without a mask.

    Source: docs/method.md, "Threat model"; Metzen & Yatsura, ICLR 2021, section 3.

    Attributes:
        image_size: (height_px, width_px) of the image.
        shapes: the largest patch shapes, ascending; shapes contained in another shape are removed.
        patches: number of simultaneous patches, at most 64.
        allowed: boolean [height, width], True where patches may lie, or None for no restriction. The array is copied;
            the copy is read-only.
        notation: text in the patch notation, for tables and records.

    Raises:
        UsageError: a shape is empty or larger than the image, the number of patches is out of range, or the mask has
            the wrong size or allows no pixel.
    """

    image_size: tuple[int, int]
    shapes: tuple[tuple[int, int], ...]
    patches: int = 1
    allowed: np.ndarray | None = None
    notation: str = ""

    def __post_init__(self) -> None:
        height, width = self.image_size
        shapes = sorted(set(self.shapes))
        if not shapes:
            raise UsageError("a threat model needs at least one patch shape, got none")
        for h, w in shapes:
            if h < 1 or w < 1:
                raise UsageError(f"a patch must be at least 1x1 px, got {h}x{w}")
            if h > height or w > width:
                raise UsageError(f"a patch of {h}x{w} px does not fit into an image of {height}x{width} px")
        if not 1 <= self.patches <= MOST_PATCHES:
            raise UsageError(f"the number of patches must be from 1 to {MOST_PATCHES}, got {self.patches}")
        shapes = _undominated(shapes)
        if self.allowed is not None:
            allowed = np.array(self.allowed, dtype=bool, order="C")  # a copy that the caller cannot change
            if allowed.shape != (height, width):
                found = "x".join(map(str, allowed.shape))
                raise UsageError(
                    f"the mask of allowed placements must be {height}x{width} px like the image, got {found}"
                )
            allowed.setflags(write=False)
            object.__setattr__(self, "allowed", allowed)
        object.__setattr__(self, "shapes", tuple(shapes))
        if not self.notation:
            text = "+".join(f"{h}x{w}" for h, w in shapes)
            object.__setattr__(self, "notation", f"{self.patches}*{text}" if self.patches > 1 else text)
        if self.allowed is not None and not self.allowed.any():
            raise UsageError(f"no patch of {self.notation} fits into the mask of allowed placements")

    @classmethod
    def parse(
        cls,
        text: "str | int | tuple[int, int] | PatchThreatModel",
        image_size: tuple[int, int],
        allowed: "np.ndarray | str | Path | None" = None,
    ) -> "PatchThreatModel":
        """Parse the patch notation used by the command line, recipes and the API.

        Args:
            text: `5` (square), `2x8` (height x width), `2%` (square covering that share of the image), `5+2x8` (set of
                shapes), `area:25` (every rectangle of at most 25 px) or `2*5` (two patches). Also accepts an int, a
                (height, width) pair, or a threat model for the same image size, which is returned unchanged.
            image_size: (height_px, width_px).
            allowed: boolean [height, width] array, or path of an image file whose white pixels (>= 50 %) are where
                patches may lie. Ignored if `text` is a threat model.

        Raises:
            UsageError: invalid notation, or a patch that does not fit into the image.
            UnreadableError: the mask image cannot be read.

        >>> PatchThreatModel.parse("2%", (224, 224)).shapes
        ((32, 32),)
        >>> PatchThreatModel.parse("area:4", (32, 32)).shapes
        ((1, 4), (2, 2), (4, 1))
        """
        if isinstance(text, PatchThreatModel):
            if text.image_size != tuple(image_size):
                raise UsageError(
                    f"the threat model is for {_size(text.image_size)} px images, the image has {_size(image_size)} px"
                )
            return text
        if isinstance(text, tuple | list):
            if len(text) != 2:
                raise UsageError(f"a patch is a side or a (height, width) pair in px, got {text!r}")
            text = f"{_digits(text[0])}x{_digits(text[1])}"
        patches, shapes, notation = _read_notation(_digits(text), image_size)
        if isinstance(allowed, str | Path):
            allowed = _read_mask(Path(allowed))
        return cls((image_size[0], image_size[1]), tuple(shapes), patches, allowed, notation)

    def tops(self, shape: tuple[int, int]) -> np.ndarray:
        """All top rows of a patch of `shape` inside the image, int [H - h + 1]."""
        return np.arange(self.image_size[0] - shape[0] + 1)

    def lefts(self, shape: tuple[int, int]) -> np.ndarray:
        """All left columns of a patch of `shape` inside the image, int [W - w + 1]."""
        return np.arange(self.image_size[1] - shape[1] + 1)

    @property
    def maximal_shapes(self) -> tuple[tuple[int, int], ...]:
        """Shapes of the maximal rectangles, ascending; equal to `shapes` without a mask."""
        return self.shapes if self.allowed is None else tuple(self._maximal)

    def corners(self, shape: tuple[int, int]) -> np.ndarray:
        """[top, left] of all maximal rectangles of a shape in `maximal_shapes`, int [rectangles, 2], ascending."""
        if self.allowed is None:
            return np.argwhere(self.placements(shape))
        return np.stack(np.divmod(self._maximal[shape], self.image_size[1]), 1)

    @cached_property
    def _maximal(self) -> dict[tuple[int, int], np.ndarray]:
        """Index of the first pixel of every maximal rectangle in the allowed part, by shape in ascending order."""
        assert self.allowed is not None
        return maximal_rectangles(self.shapes, self.allowed)

    def allows(self, top: int, left: int, height: int, width: int) -> bool:
        """Whether a patch may be exactly this rectangle."""
        fits = any(height <= h and width <= w for h, w in self.shapes)
        inside = top >= 0 and left >= 0 and top + height <= self.image_size[0] and left + width <= self.image_size[1]
        white = self.allowed is None or bool(self.allowed[top : top + height, left : left + width].all())
        return min(height, width) >= 1 and fits and inside and white

    def placements(self, shape: tuple[int, int]) -> np.ndarray:
        """Where a rectangle of `shape` lies inside the image and its allowed part, boolean [tops, lefts]."""
        h, w = shape
        if self.allowed is None:
            return np.ones((self.image_size[0] - h + 1, self.image_size[1] - w + 1), dtype=bool)
        # Count the forbidden pixels under each placement with an integral image.
        integral = np.zeros((self.image_size[0] + 1, self.image_size[1] + 1), dtype=np.int64)
        integral[1:, 1:] = (~self.allowed).cumsum(0).cumsum(1)
        return (integral[h:, w:] - integral[:-h, w:] - integral[h:, :-w] + integral[:-h, :-w]) == 0

    @cached_property
    def patch(self) -> tuple[int, int] | None:
        """(height_px, width_px) if the threat is a single unrestricted patch of one shape, else None."""
        single = len(self.shapes) == 1 and self.patches == 1 and self.allowed is None
        return self.shapes[0] if single else None

    @cached_property
    def _key(self) -> tuple:
        mask = None if self.allowed is None else self.allowed.tobytes()
        return (self.image_size, self.shapes, self.patches, mask)

    def __eq__(self, other: object) -> bool:
        """Whether both threat models permit the same attacks, regardless of their notation."""
        return isinstance(other, PatchThreatModel) and self._key == other._key

    def __hash__(self) -> int:
        """Hash consistent with `__eq__`, so that geometry can be cached per threat."""
        return hash(self._key)

    def __str__(self) -> str:
        """The notation, with a remark if placements are restricted."""
        return self.notation + ("" if self.allowed is None else " within the allowed placements")


PatchLike = int | str | tuple[int, int] | PatchThreatModel
"""Types accepted by `PatchThreatModel.parse`."""


def check_notation(text: str) -> None:
    """Check that a text is in the patch notation, independent of the image size.

    Raises:
        UsageError: invalid notation.
    """
    _read_notation(text, (1, 1))


def _read_notation(text: str, image_size: tuple[int, int]) -> tuple[int, list[tuple[int, int]], str]:
    """Parse the number of patches, their shapes, and the normalized text."""
    notation = text.strip().lower().replace(" ", "")
    if any(len(number) > MOST_DIGITS for number in re.findall(r"\d+", notation)):
        raise UsageError(f"a number in a patch has at most {MOST_DIGITS} digits; got {sanitize(notation, 60)!r}")
    patches, shapes_text = 1, notation
    if match := _PATCHES.fullmatch(notation):
        patches, shapes_text = int(match[1]), match[2]
    terms = shapes_text.split("+")
    if len(terms) > MOST_TERMS:
        raise UsageError(f"a set has at most {MOST_TERMS} shapes, got {len(terms):,}")
    return patches, [shape for term in terms for shape in _shapes(term, notation, image_size)], notation


def _digits(value: object) -> str:
    """Convert a number or text to text, rejecting huge integers, which Python refuses to convert."""
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        raise UsageError(f"a number in a patch has at most {MOST_DIGITS} digits")
    return str(value)


def _undominated(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Remove shapes that are contained in another shape; input and output are ascending."""
    kept: list[tuple[int, int]] = []
    widest = 0
    for shape in reversed(shapes):  # starting with the tallest, a shape must be wider than all before it
        if shape[1] > widest:
            kept.append(shape)
            widest = shape[1]
    return kept[::-1]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _shapes(part: str, notation: str, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """The shapes of one term of the notation."""
    height, width = image_size
    if match := _SQUARE.fullmatch(part):
        return [(int(match[1]), int(match[1]))]
    if match := _RECTANGLE.fullmatch(part):
        return [(int(match[1]), int(match[2]))]
    if match := _PERCENT.fullmatch(part):
        share = Fraction(match[1]) * height * width / 100
        side = isqrt(ceil(share))
        side += side**2 < share  # the smallest side whose square covers the share
        return [(side, side)]
    if match := _AREA.fullmatch(part):
        area = int(match[1])
        fitting = [(h, min(width, area // h)) for h in range(1, min(height, area) + 1) if area // h >= 1]
        if not fitting:
            raise UsageError(f"no rectangle of at most {area} px fits into the image; an area must be at least 1 px")
        return fitting
    raise UsageError(f"a patch is written {NOTATION}; got {sanitize(notation, 60)!r}")


def _read_mask(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with open_regular(path, MAX_MASK_BYTES) as file, Image.open(file, formats=MASK_FORMATS) as image:
            if image.size[0] * image.size[1] > MAX_MASK_PIXELS:
                raise ValueError(f"it has more than {MAX_MASK_PIXELS:,} pixels")
            if image.format == "TIFF" and image.getexif().get(ORIENTATION_TAG, 1) != 1:
                # Pillow rotates TIFF pixels by this tag on loading, but a mask refers to pixels as stored.
                raise ValueError("it is a TIFF with an orientation tag; save it without one")
            return _white(image)
    except FileNotFoundError:
        raise UnreadableError(f"the mask image {path} does not exist") from None
    except Exception as error:  # decoders raise all kinds of exceptions for broken files
        reason = sanitize(getattr(error, "strerror", None) or error or type(error).__name__)
        raise UnreadableError(f"the mask {path} cannot be read as an image: {reason}") from error


def _white(image: "Image.Image") -> np.ndarray:
    """Which pixels are at least half white, boolean [height, width]."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return np.asarray(image.convert("L")) >= 2**7
    values = np.asarray(image)  # 16 bits
    if values.min() < 0 or values.max() >= 2**16:
        raise ValueError("its pixels have more than 16 bits; save it with 8 or 16 bits")
    return values >= 2**15


def maximal_rectangles(shapes: tuple[tuple[int, int], ...], allowed: np.ndarray) -> dict[tuple[int, int], np.ndarray]:
    """Find the maximal rectangles that fit inside one of `shapes` and lie in the True part of `allowed`.

    A rectangle is maximal if no other such rectangle contains it. It suffices to compare with rectangles that are one
    pixel taller or wider. For each height and first pixel, only the widest rectangle can be maximal.

    Args:
        shapes: (height_px, width_px).
        allowed: boolean [height, width].

    Returns:
        For each (height_px, width_px), ascending: the index of the first pixel of each rectangle in the flattened
        mask, int [rectangles], ascending.

    >>> maximal_rectangles(((2, 2),), np.array([[1, 1, 1], [1, 1, 0]], dtype=bool))
    {(1, 2): array([1]), (2, 2): array([0])}
    """
    widest = _widest(shapes, allowed.shape[0])
    white = np.packbits(allowed, axis=1)
    found: dict[tuple[int, int], list[np.ndarray]] = {}
    column = white  # by top row: pixels from which `height` pixels downward are allowed, packed as bits
    for height in range(1, max(h for h, _ in shapes) + 1):
        if not column.any():
            break
        taller = column[:-1] & white[height:]
        tops = np.flatnonzero(column.any(1))
        if widest[height + 1] == widest[height]:
            # Taller rectangles are permitted too, so only those next to forbidden pixels can be maximal.
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
    """Width of the widest patch for each height in pixels from 0 to image height + 1; 0 if there is no patch."""
    widest = np.zeros(height + 2, dtype=np.int64)
    for h, w in shapes:
        widest[h] = max(widest[h], w)
    return np.maximum.accumulate(widest[::-1])[::-1]


def _runs(packed: np.ndarray, width: int) -> np.ndarray:
    """Length of the run of allowed pixels that starts at each pixel, int [rows, width]."""
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
    """Add the maximal rectangles of one height whose first row is in `tops` to `found`."""
    run = _runs(column[tops], width)
    wide = np.minimum(run, widest[height])
    maximal = wide > 0
    maximal[:, 1:] &= (run[:, :-1] == 0) | (wide[:, 1:] == widest[height])  # cannot be extended to the left
    for first, inside in ((tops, tops < len(taller)), (tops - 1, tops > 0)):  # nor downward or upward
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
