"""The threat model: which rectangles of pixels an attacker may replace, and where.

This is the only module that knows placements. Everything is in pixels of the image the user has.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bagcert.errors import UnreadableError, UsageError, shown
from bagcert.files import open_regular

NOTATION = "5, 2x8, 2%, 5+2x8 (either shape), area:25 (any rectangle of at most 25 px), 2*5 (two patches)"

MASK_FORMATS = ("PNG", "BMP", "GIF", "JPEG", "TIFF", "WEBP")
MAX_MASK_BYTES = 1 << 29
MAX_MASK_PIXELS = 100_000_000
"""A mask has the size of an image, so its limits are those of `bagcert.images`."""

_SQUARE = re.compile(r"(\d+)")
_RECTANGLE = re.compile(r"(\d+)x(\d+)")
_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")
_AREA = re.compile(r"area:(\d+)")
_PATCHES = re.compile(r"(\d+)\*(.+)")


@dataclass(frozen=True, eq=False)
class PatchThreatModel:
    """An attacker who replaces the pixels under `patches` rectangles of an image, and nothing else.

    Each rectangle has one of `shapes` (height_px, width_px), lies inside the image, and, when `allowed` is
    given, wholly inside its True part. The content is unrestricted. A certificate against a shape also
    covers every smaller patch, and a sticker of any form inside the rectangle.

    Source: METHOD section 1 of the design notes; Metzen & Yatsura, ICLR 2021, section 3.

    Attributes:
        image_size: (height_px, width_px) of the image.
        shapes: the shapes the attacker may choose from, ascending, none inside another unless `allowed` is given.
        patches: how many rectangles at once.
        allowed: boolean [height, width], or None for everywhere.
        notation: the text this was parsed from, for tables and records.

    Raises:
        UsageError: a shape is 0 or larger than the image, or no placement is allowed.
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
        if self.patches < 1:
            raise UsageError(f"the number of patches must be at least 1, got {self.patches}")
        if self.allowed is None:
            # Inside an image every placement of a smaller shape lies in one of the larger; under a mask it may not.
            shapes = _undominated(shapes)
        else:
            allowed = np.ascontiguousarray(self.allowed, dtype=bool)
            if allowed.shape != (height, width):
                found = "x".join(map(str, allowed.shape))
                raise UsageError(
                    f"the mask of allowed placements must be {height}x{width} px like the image, got {found}"
                )
            object.__setattr__(self, "allowed", allowed)
        object.__setattr__(self, "shapes", tuple(shapes))
        if not self.notation:
            text = "+".join(f"{h}x{w}" for h, w in shapes)
            object.__setattr__(self, "notation", f"{self.patches}*{text}" if self.patches > 1 else text)
        if self.allowed is not None and not any(self.placements(shape).any() for shape in shapes):
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
            text = f"{text[0]}x{text[1]}"
        patches, shapes, notation = _read_notation(str(text), image_size)
        if isinstance(allowed, str | Path):
            allowed = _read_mask(Path(allowed))
        return cls((image_size[0], image_size[1]), tuple(shapes), patches, allowed, notation)

    def tops(self, shape: tuple[int, int]) -> np.ndarray:
        """Every top row of a patch of `shape`: int [H - h + 1], the last one included."""
        return np.arange(self.image_size[0] - shape[0] + 1)

    def lefts(self, shape: tuple[int, int]) -> np.ndarray:
        """Every left column of a patch of `shape`: int [W - w + 1], the last one included."""
        return np.arange(self.image_size[1] - shape[1] + 1)

    def placements(self, shape: tuple[int, int]) -> np.ndarray:
        """Boolean [tops, lefts]: may a patch of `shape` lie there?"""
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
    patches, shapes_text = 1, notation
    if match := _PATCHES.fullmatch(notation):
        patches, shapes_text = int(match[1]), match[2]
    return patches, [s for part in shapes_text.split("+") for s in _shapes(part, notation, image_size)], notation


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
        # Rounding guards against 2 % of 2,500 px becoming 50.00000000000001 and the side one px too large.
        share = round(float(match[1]) / 100 * height * width, 6)
        side = math.ceil(round(math.sqrt(share), 9))
        return [(side, side)]
    if match := _AREA.fullmatch(part):
        area = int(match[1])
        fitting = [(h, min(width, area // h)) for h in range(1, min(height, area) + 1) if area // h >= 1]
        if not fitting:
            raise UsageError(f"no rectangle of at most {area} px fits into the image; an area must be at least 1 px")
        return fitting
    raise UsageError(f"a patch is written {NOTATION}; got {notation!r}")


def _read_mask(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with open_regular(path, MAX_MASK_BYTES) as file, Image.open(file, formats=MASK_FORMATS) as image:
            if image.size[0] * image.size[1] > MAX_MASK_PIXELS:
                raise ValueError(f"it has more than {MAX_MASK_PIXELS:,} pixels")
            return np.asarray(image.convert("L")) >= 128
    except FileNotFoundError:
        raise UnreadableError(f"there is no mask image {path}") from None
    except Exception as error:  # decoders raise whatever they trip over in a broken file
        reason = shown(getattr(error, "strerror", None) or error or type(error).__name__)
        raise UnreadableError(f"the mask {path} cannot be read as an image: {reason}") from error
