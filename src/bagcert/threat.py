"""The threat model: which rectangles of pixels an attacker may replace, and where.

This is the only module that knows placements. Everything is in pixels of the image the user has.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import ceil, isqrt
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from bagcert.errors import UnreadableError, UsageError, shown
from bagcert.io.files import open_regular

if TYPE_CHECKING:
    from PIL import Image

NOTATION = "5, 2x8, 2%, 5+2x8 (either shape), area:25 (any rectangle of at most 25 px), 2*5 (two patches)"

MASK_FORMATS = ("PNG", "BMP", "GIF", "JPEG", "TIFF", "WEBP")
ORIENTATION_TAG = 0x0112
MAX_MASK_BYTES = 1 << 29
MAX_MASK_PIXELS = 100_000_000
"""A mask has the size of an image, so its limits are those of `bagcert.data.photo`."""

MOST_PATCHES, MOST_TERMS, MOST_DIGITS = 64, 256, 20
"""Of a notation: rectangles at once, shapes in a set, digits in a number."""

MOST_PIXELS = 2**22  # of a mask searched at a time, which bounds memory

_SQUARE = re.compile(r"(\d+)")
_RECTANGLE = re.compile(r"(\d+)x(\d+)")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
_AREA = re.compile(r"area:(\d+)")
_PATCHES = re.compile(r"(\d+)\*(.+)")


@dataclass(frozen=True, eq=False)
class PatchThreatModel:
    """An attacker who replaces the pixels under `patches` rectangles of an image, and nothing else.

    Each rectangle fits inside one of `shapes` (height_px, width_px), lies inside the image, and, when `allowed`
    is given, wholly inside its True part. The content is unrestricted. A sticker of any form inside such a
    rectangle is covered too.

    It is enough to look at the maximal rectangles, those that lie in no other the attacker may use. Anywhere in
    an image they have the `shapes` themselves. Under a mask they may be smaller, so whoever goes through placements
    takes `maximal_shapes` and `corners`, which hold with and without a mask.

    Source: docs/method.md, "Threat model"; Metzen & Yatsura, ICLR 2021, section 3.

    Attributes:
        image_size: (height_px, width_px) of the image.
        shapes: the largest shapes of a patch, ascending; those inside another are left out.
        patches: how many rectangles at once, at most 64.
        allowed: boolean [height, width], or None for everywhere. The array is copied; the copy is read-only.
        notation: the text this was parsed from, for tables and records.

    Raises:
        UsageError: a shape is 0 or larger than the image, too many patches, or no pixel is allowed.
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
            allowed = np.array(self.allowed, dtype=bool, order="C")  # a copy, which nobody else can change
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
            raise UsageError(f"the mask of allowed placements has no room for any patch of {self.notation}")

    @classmethod
    def parse(
        cls,
        text: "str | int | tuple[int, int] | PatchThreatModel",
        image_size: tuple[int, int],
        allowed: "np.ndarray | str | Path | None" = None,
    ) -> "PatchThreatModel":
        """Reads the patch notation, the one spelling used by the command line, recipes and the API.

        Args:
            text: `5`, `2x8` (height x width), `2%` (square of that share of the image), `5+2x8` (a set),
                `area:25` (every rectangle of at most 25 px), `2*5` (two patches); or an int, a (height, width)
                pair, or a threat model for the same image size, which is returned as it is.
            image_size: (height_px, width_px).
            allowed: a boolean [height, width] array, or an image file whose white part (>= 50 %) is where
                patches may lie.

        Raises:
            UsageError: the text is not in the notation, or the patch does not fit.

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
        """Every top row of a patch of `shape`: int [H - h + 1], the last one included."""
        return np.arange(self.image_size[0] - shape[0] + 1)

    def lefts(self, shape: tuple[int, int]) -> np.ndarray:
        """Every left column of a patch of `shape`: int [W - w + 1], the last one included."""
        return np.arange(self.image_size[1] - shape[1] + 1)

    @property
    def maximal_shapes(self) -> tuple[tuple[int, int], ...]:
        """The shapes of the maximal rectangles, ascending; without a mask these are `shapes`."""
        return self.shapes if self.allowed is None else tuple(self._maximal)

    def corners(self, shape: tuple[int, int]) -> np.ndarray:
        """Top and left of every maximal rectangle of one of `maximal_shapes`: int [rectangles, 2], ascending."""
        if self.allowed is None:
            return np.argwhere(self.placements(shape))
        return np.stack(np.divmod(self._maximal[shape], self.image_size[1]), 1)

    @cached_property
    def _maximal(self) -> dict[tuple[int, int], np.ndarray]:
        """By shape, ascending: the index of the first pixel of every maximal rectangle in the white part."""
        assert self.allowed is not None
        return maximal_rectangles(self.shapes, self.allowed)

    def allows(self, top: int, left: int, height: int, width: int) -> bool:
        """May a patch be exactly this rectangle?"""
        fits = any(height <= h and width <= w for h, w in self.shapes)
        inside = top >= 0 and left >= 0 and top + height <= self.image_size[0] and left + width <= self.image_size[1]
        white = self.allowed is None or bool(self.allowed[top : top + height, left : left + width].all())
        return min(height, width) >= 1 and fits and inside and white

    def placements(self, shape: tuple[int, int]) -> np.ndarray:
        """Boolean [tops, lefts]: is a rectangle of `shape` inside the image and the white part there?"""
        h, w = shape
        if self.allowed is None:
            return np.ones((self.image_size[0] - h + 1, self.image_size[1] - w + 1), dtype=bool)
        # Count forbidden pixels under each placement by an integral image.
        integral = np.zeros((self.image_size[0] + 1, self.image_size[1] + 1), dtype=np.int64)
        integral[1:, 1:] = (~self.allowed).cumsum(0).cumsum(1)
        return (integral[h:, w:] - integral[:-h, w:] - integral[h:, :-w] + integral[:-h, :-w]) == 0

    @cached_property
    def patch(self) -> tuple[int, int] | None:
        """(height_px, width_px) if the threat is one patch of one shape anywhere, else None."""
        single = len(self.shapes) == 1 and self.patches == 1 and self.allowed is None
        return self.shapes[0] if single else None

    @cached_property
    def _key(self) -> tuple:
        mask = None if self.allowed is None else self.allowed.tobytes()
        return (self.image_size, self.shapes, self.patches, mask)

    def __eq__(self, other: object) -> bool:
        """Equal when the same attacks are possible, however they were written."""
        return isinstance(other, PatchThreatModel) and self._key == other._key

    def __hash__(self) -> int:
        """By what it allows, so that geometry can be cached per threat."""
        return hash(self._key)

    def __str__(self) -> str:
        """The notation, and whether placements are restricted."""
        return self.notation + ("" if self.allowed is None else " within the allowed placements")


PatchLike = int | str | tuple[int, int] | PatchThreatModel
"""What `PatchThreatModel.parse` takes."""


def check_notation(text: str) -> None:
    """Says whether a text is in the patch notation at all, whatever the image.

    Raises:
        UsageError: it is not.
    """
    _read_notation(text, (1, 1))


def _read_notation(text: str, image_size: tuple[int, int]) -> tuple[int, list[tuple[int, int]], str]:
    """How many patches, their shapes, and the text in its plain form."""
    notation = text.strip().lower().replace(" ", "")
    if any(len(number) > MOST_DIGITS for number in re.findall(r"\d+", notation)):
        raise UsageError(f"a number in a patch has at most {MOST_DIGITS} digits; got {shown(notation, 60)!r}")
    patches, shapes_text = 1, notation
    if match := _PATCHES.fullmatch(notation):
        patches, shapes_text = int(match[1]), match[2]
    terms = shapes_text.split("+")
    if len(terms) > MOST_TERMS:
        raise UsageError(f"a set has at most {MOST_TERMS} shapes, got {len(terms):,}")
    return patches, [shape for term in terms for shape in _shapes(term, notation, image_size)], notation


def _digits(value: object) -> str:
    """A number or text as text; Python itself refuses to write integers of thousands of digits."""
    if isinstance(value, int) and abs(value) >= 10**MOST_DIGITS:
        raise UsageError(f"a number in a patch has at most {MOST_DIGITS} digits")
    return str(value)


def _undominated(shapes: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending shapes without those that lie inside another."""
    kept: list[tuple[int, int]] = []
    widest = 0
    for shape in reversed(shapes):  # from the tallest on, a shape must be wider than all before it
        if shape[1] > widest:
            kept.append(shape)
            widest = shape[1]
    return kept[::-1]


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def _shapes(part: str, notation: str, image_size: tuple[int, int]) -> list[tuple[int, int]]:
    """The shapes one term of the notation stands for."""
    height, width = image_size
    if match := _SQUARE.fullmatch(part):
        return [(int(match[1]), int(match[1]))]
    if match := _RECTANGLE.fullmatch(part):
        return [(int(match[1]), int(match[2]))]
    if match := _PERCENT.fullmatch(part):
        share = Fraction(match[1]) * height * width / 100
        side = isqrt(ceil(share))
        side += side**2 < share  # the smallest side whose square has the share
        return [(side, side)]
    if match := _AREA.fullmatch(part):
        area = int(match[1])
        fitting = [(h, min(width, area // h)) for h in range(1, min(height, area) + 1) if area // h >= 1]
        if not fitting:
            raise UsageError(f"no rectangle of at most {area} px fits into the image; an area must be at least 1 px")
        return fitting
    raise UsageError(f"a patch is written {NOTATION}; got {shown(notation, 60)!r}")


def _read_mask(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with open_regular(path, MAX_MASK_BYTES) as file, Image.open(file, formats=MASK_FORMATS) as image:
            if image.size[0] * image.size[1] > MAX_MASK_PIXELS:
                raise ValueError(f"it has more than {MAX_MASK_PIXELS:,} pixels")
            if image.format == "TIFF" and image.getexif().get(ORIENTATION_TAG, 1) != 1:
                # Pillow would turn the pixels, and the mask is one of pixels as stored.
                raise ValueError("it is a TIFF with an orientation tag; save it without one")
            return _white(image)
    except FileNotFoundError:
        raise UnreadableError(f"there is no mask image {path}") from None
    except Exception as error:  # decoders raise whatever they trip over in a broken file
        reason = shown(getattr(error, "strerror", None) or error or type(error).__name__)
        raise UnreadableError(f"the mask {path} cannot be read as an image: {reason}") from error


def _white(image: "Image.Image") -> np.ndarray:
    """Boolean [height, width]: is a pixel at least half white?"""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers; save it with 8 or 16 bits")
    if not image.mode.startswith("I"):
        return np.asarray(image.convert("L")) >= 2**7
    values = np.asarray(image)  # 16 bits
    if values.min() < 0 or values.max() >= 2**16:
        raise ValueError("its pixels have more than 16 bits; save it with 8 or 16 bits")
    return values >= 2**15


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
