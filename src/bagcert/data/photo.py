"""Safe reading of image files, and conversion of arrays to network input.

A `Photo` holds the pixels as stored in the file and the EXIF orientation, because certificates refer to stored
pixels. `as_batch` converts arrays and tensors to the input format of the networks.
"""

import io
import os
import threading
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, cast

import numpy as np
import torch
from jaxtyping import Float, UInt8
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from bagcert.errors import UnreadableError, UsageError, sanitize
from bagcert.io.files import open_regular

Images = np.ndarray | Tensor
"""A batch of images: uint8 [batch, height, width, 3], or float [batch, 3, height, width] in [0, 1]."""

MAX_IMAGE_PIXELS = 100_000_000
"""Images of more pixels are refused before they are decoded (100 Mpx, 300 MB of RGB): a file of a few hundred bytes
may claim any number."""

MAX_IMAGE_BYTES = 1 << 29
"""Larger files are refused before they are read: some decoders take in the whole file, and a file with holes takes no
room on the disk. The largest image that is not refused, uncompressed, has 300 MB."""

LARGE_IMAGE_PIXELS = 12_000_000
"""Larger images are decoded one at a time, so that memory does not grow with the number of threads."""

STRIP_PIXELS = 1 << 21
"""Pixels whose mode is changed at a time, so that a change of mode needs little more memory than its result."""

# Other formats Pillow knows run programs (EPS) or have no signature of their own (TGA).
_FORMATS = ("WEBP", "PNG", "JPEG", "BMP", "GIF", "TIFF", "PPM", "MPO", "JPEG2000", "AVIF", "ICO")
_ORIENTATION_TAG = 0x0112
_PHOTOMETRIC_TAG, _YCBCR = 0x0106, 6
_PLANAR_TAG = 0x011C

# Stored axes swapped, stored rows reversed, stored columns reversed, for each EXIF orientation.
_TURNS = {
    1: (False, False, False),
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, True, False),
    7: (True, True, True),
    8: (True, False, True),
}

_warnings_lock = threading.Lock()
_large_lock = threading.Lock()


@dataclass(frozen=True, eq=False)
class Photo:
    """One image as stored in its file.

    Attributes:
        pixels: uint8 [height, width, 3], RGB, without the EXIF rotation applied.
        orientation: the EXIF orientation, 1 (upright) to 8.
        source: file name or description, for messages and records.

    Raises:
        UsageError: not uint8 [height, width, 3], or an orientation outside 1..8.
    """

    pixels: UInt8[np.ndarray, "height width rgb"]
    orientation: int = 1
    source: str = "image"

    def __post_init__(self) -> None:
        if self.pixels.dtype != np.uint8 or self.pixels.ndim != 3 or self.pixels.shape[2] != 3 or not self.pixels.size:
            raise UsageError(
                f"{self.source}: pixels must be uint8 [height, width, 3], got {self.pixels.dtype} "
                f"{list(self.pixels.shape)}"
            )
        if self.orientation not in _TURNS:
            raise UsageError(f"{self.source}: an EXIF orientation is 1 to 8, got {self.orientation}")

    @property
    def stored_size(self) -> tuple[int, int]:
        """(height_px, width_px) as stored in the file."""
        return self.pixels.shape[0], self.pixels.shape[1]

    def upright(self) -> UInt8[np.ndarray, "height width rgb"]:
        """Returns the pixels with the EXIF orientation applied, as an image viewer shows them."""
        swapped, rows_reversed, cols_reversed = turn(self.orientation)
        pixels = self.pixels[:: -1 if rows_reversed else 1, :: -1 if cols_reversed else 1]
        return np.ascontiguousarray(pixels.swapaxes(0, 1) if swapped else pixels)


def turn(orientation: int) -> tuple[bool, bool, bool]:
    """Decomposes an EXIF orientation into (axes swapped, stored rows reversed, stored columns reversed).

    The reversals are applied first, on the stored axes, then the swap.

    >>> turn(6)
    (True, True, False)
    """
    if orientation not in _TURNS:
        raise UsageError(f"an EXIF orientation is 1 to 8, got {orientation}")
    return _TURNS[orientation]


def read_image(image: str | Path | bytes | io.IOBase, name: str | None = None) -> Photo:
    """Reads one image file of any common format and mode, without executing external programs.

    Grayscale, palette, CMYK and 1-bit images are converted to RGB. 16-bit values keep their upper 8 bits. Transparent
    pixels are blended with white. Only the first frame of an animation is read. A broken EXIF block counts as
    orientation 1, except in a TIFF, which is then refused.

    Args:
        image: a path, the bytes of a file, or an open binary file.
        name: name of the image in messages; by default the path.

    Raises:
        UnreadableError: missing, empty, truncated, not an image, a folder, a pipe or device, of floating-point
            pixels, of more than MAX_IMAGE_PIXELS pixels or MAX_IMAGE_BYTES bytes.
    """
    if isinstance(image, str | Path):
        name = name or str(image)
        with _open_file(image, name) as file:
            return _decode(file, name)
    if isinstance(image, bytes):
        name = name or f"image of {len(image)} bytes"
        if not image:
            raise UnreadableError(f"{name} is empty (0 bytes)")
        image = io.BytesIO(image)
    name = name or str(getattr(image, "name", "image"))
    if image.seekable():
        _check_size(image.seek(0, os.SEEK_END), name)
        image.seek(0)
    return _decode(image, name)


def as_batch(images: Images) -> Float[Tensor, "batch 3 height width"]:
    """Converts images to network input: float32 [batch, 3, height, width] in [0, 1].

    Args:
        images: numpy or torch; uint8 [batch, height, width, 3] in 0..255, or float [batch, 3, height, width] in
            [0, 1]. A single image without the batch axis is a batch of one. Tensors stay on their device.

    Raises:
        UsageError: another type, dtype or layout, an empty batch or image, or values that are NaN or outside [0, 1].
    """
    images = with_batch_axis(images)
    if isinstance(images, np.ndarray):
        if images.dtype.kind not in "uf" or images.dtype.itemsize > 8:
            raise UsageError(f"images must be uint8 or floating-point of at most 64 bits, got {images.dtype}")
        if images.dtype.kind == "u" and images.dtype != np.uint8:
            raise UsageError(f"integer images must be uint8, got {images.dtype}")
        # torch warns of read-only memory and refuses negative strides and foreign byte orders.
        native = np.ascontiguousarray(images, dtype=images.dtype.newbyteorder("="))
        images = torch.from_numpy(native if native.flags.writeable else native.copy())
    if images.dtype == torch.uint8:
        _check_layout(images, channels=3, expected="uint8 images must be [batch, height, width, 3] with values 0..255")
        return images.permute(0, 3, 1, 2).float().div(255)
    if not images.dtype.is_floating_point:
        raise UsageError(f"images must be uint8 or floating-point, got {images.dtype}")
    _check_layout(images, channels=1, expected="float images must be [batch, 3, height, width] with values in [0, 1]")
    images = images.float()
    low, high = float(images.min()), float(images.max())
    if not (low >= 0 and high <= 1):  # false for NaN too
        found = "NaN" if low != low or high != high else f"values from {low:g} to {high:g}"
        raise UsageError(
            f"float images must lie in [0, 1], found {found}; normalization is the network's first layer, leave it out"
        )
    return images


def with_batch_axis(images: object) -> Images:
    """Adds the batch axis to a single image; returns a batch unchanged.

    Raises:
        UsageError: not a numpy array or torch tensor, or a tensor that is sparse, nested or on the meta device.
    """
    if isinstance(images, Tensor):
        if images.is_nested or images.layout != torch.strided:
            kind = "nested" if images.is_nested else str(images.layout).removeprefix("torch.")
            raise UsageError(f"images must be a dense tensor, got a {kind} one")
        if images.is_meta:
            raise UsageError("images must have values, got a tensor on the meta device")
    elif not isinstance(images, np.ndarray):
        raise UsageError(f"images must be a numpy array or a torch tensor, got {type(images).__name__}")
    return images[None] if images.ndim == 3 else images


def _check_layout(images: Tensor, channels: int, expected: str) -> None:
    if images.ndim != 4 or images.shape[channels] != 3 or not images.numel():
        raise UsageError(f"{expected}, got {list(images.shape)}")


def _open_file(path: str | Path, name: str) -> io.BufferedReader:
    try:
        file = open_regular(path)
    except FileNotFoundError:
        raise UnreadableError(f"there is no file {name}") from None
    except IsADirectoryError:
        raise UnreadableError(f"{name} is a folder, not an image file") from None
    except OSError as error:
        raise UnreadableError(f"{name} cannot be opened: {error.strerror or error}") from error
    size = os.fstat(file.fileno()).st_size
    if not size or size > MAX_IMAGE_BYTES:
        file.close()
        _check_size(size, name)
        raise UnreadableError(f"{name} is empty (0 bytes)")
    return file


def _check_size(size: int, name: str) -> None:
    if size > MAX_IMAGE_BYTES:
        raise UnreadableError(f"{name} has {size:,} bytes and is refused; an image has at most {MAX_IMAGE_BYTES:,}")


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(known for known in _FORMATS if known in Image.OPEN)


def _decode(file: io.IOBase, name: str) -> Photo:
    try:
        # Pillow warns of large images below our limit; the lock is there because filters are global.
        with _warnings_lock, warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(cast(IO[bytes], file), formats=_formats())
        with image:
            pixels = _checked_pixels(image)
            with _large_lock if pixels > LARGE_IMAGE_PIXELS else nullcontext():
                orientation = _orientation(image)
                if image.format == "TIFF":
                    _check_turn(image, orientation, name)
                image.load()
                _checked_pixels(image)  # an icon holds an image that may be larger than the icon said
                stored = _rgb(image, name)
                if orientation is None:
                    orientation = 1
                elif _orientation(image) != orientation:  # Pillow turns a TIFF upright and then drops the tag
                    stored = _turned_back(stored, orientation)
                return Photo(stored, orientation, name)
    except UnreadableError:
        raise
    except UnidentifiedImageError:
        raise UnreadableError(f"{name} is not an image ({', '.join(_formats())} can be read) or is cut short") from None
    except Image.DecompressionBombError:
        raise UnreadableError(f"{name} has more than {MAX_IMAGE_PIXELS:,} pixels and is refused") from None
    except Exception as error:  # decoders raise whatever they trip over in a broken file
        reason = sanitize(error) or type(error).__name__
        raise UnreadableError(f"{name} cannot be decoded: {reason}") from error


def _checked_pixels(image: Image.Image) -> int:
    pixels = image.size[0] * image.size[1]
    if pixels > MAX_IMAGE_PIXELS:
        raise Image.DecompressionBombError
    return pixels


def _rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode == "F":
        raise UnreadableError(f"{name} has floating-point pixels, whose range is not known; save it with 8 or 16 bits")
    if image.mode == "RGB" and not image.has_transparency_data:
        return np.array(image)
    width, height = image.size
    pixels = np.empty((height, width, 3), dtype=np.uint8)
    rows = max(1, STRIP_PIXELS // width)
    for top in range(0, height, rows):
        strip = image.crop((0, top, width, min(top + rows, height)))
        pixels[top : top + rows] = _strip(strip, image.has_transparency_data, name)
    return pixels


def _strip(strip: Image.Image, transparent: bool, name: str) -> np.ndarray:
    """Converts rows of an image to uint8 [rows, width, 3], or [rows, width, 1] for grayscale."""
    if strip.mode.startswith("I"):  # I;16, I;16B; older Pillow opens 16-bit PNG as I
        values = np.asarray(strip)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise UnreadableError(f"{name} has pixels of more than 16 bits; save it with 8 or 16 bits")
        return (values >> 8).astype(np.uint8)[:, :, None]
    if transparent:
        strip = strip.convert("RGBA")
        strip = Image.alpha_composite(Image.new("RGBA", strip.size, "white"), strip)
    return np.asarray(strip.convert("RGB"))


def _orientation(image: Image.Image) -> int | None:
    """Returns the EXIF orientation of an image; 1 if it has none, None if the metadata is broken."""
    try:
        orientation = int(image.getexif().get(_ORIENTATION_TAG, 1))
    except Exception:  # decoders raise whatever they trip over
        return None
    return orientation if orientation in _TURNS else 1


def _check_turn(image: Image.Image, orientation: int | None, name: str) -> None:
    """Refuses a TIFF if it is unknown how Pillow rotates it during loading."""
    if orientation is None:
        raise UnreadableError(f"{name} has an orientation that cannot be read; save it again without one")
    compression, tags = image.info.get("compression"), image.getexif()
    ycbcr = tags.get(_PHOTOMETRIC_TAG) == _YCBCR or compression == "tiff_jpeg"
    by_pillow = compression == "raw" or (compression == "jpeg" and tags.get(_PLANAR_TAG, 1) == 1)
    if orientation != 1 and ycbcr and not by_pillow:  # libtiff makes RGB of it; with older Pillow it also turns it
        raise UnreadableError(f"{name} is a YCbCr TIFF with EXIF orientation {orientation}; save it again as RGB")


def _turned_back(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Recovers the stored pixels of an upright image: the inverse of `Photo.upright`."""
    swapped, rows_reversed, cols_reversed = turn(orientation)
    stored = pixels.swapaxes(0, 1) if swapped else pixels
    return np.ascontiguousarray(stored[:: -1 if rows_reversed else 1, :: -1 if cols_reversed else 1])
