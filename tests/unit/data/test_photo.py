"""Reading images: every mode, and every way a file can be broken."""

import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps, TiffImagePlugin

from bagcert.data.photo import MAX_IMAGE_BYTES, MAX_IMAGE_PIXELS, Photo, as_batch, read_image, with_batch_axis
from bagcert.errors import UnreadableError, UsageError
from tests import refused, tiny


def _pixels(height: int = 7, width: int = 5) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def _encode(image: Image.Image, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def _png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds a few bytes."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_keep_every_pixel(format: str, tmp_path: Path) -> None:
    encoded = _encode(Image.fromarray(_pixels()), format)
    path = tmp_path / f"image.{format.lower()}"
    path.write_bytes(encoded)
    for source in (path, str(path), encoded, io.BytesIO(encoded)):
        photo = read_image(source)
        np.testing.assert_array_equal(photo.pixels, _pixels())
        assert photo.orientation == 1
    assert read_image(path).source == str(path)
    assert read_image(encoded, name="row 3").source == "row 3"


@pytest.mark.parametrize("mode", ["1", "L", "P", "LA", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I"])
def test_every_mode_becomes_rgb(mode: str) -> None:
    image = Image.fromarray(_pixels())
    image = image.convert("L").convert("I").convert(mode) if mode.startswith("I") else image.convert(mode)
    format = "TIFF" if mode in ("CMYK", "YCbCr", "LAB", "I") else "PNG"
    photo = read_image(_encode(image, format))
    assert photo.pixels.shape == (7, 5, 3)
    assert photo.pixels.dtype == np.uint8


def test_sixteen_bits_keep_the_upper_eight() -> None:
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        photo = read_image(_encode(Image.fromarray(values), format))
        np.testing.assert_array_equal(photo.pixels[:, :, 0], [[0, 0, 1], [128, 254, 255]])
        np.testing.assert_array_equal(photo.pixels[:, :, 0], photo.pixels[:, :, 2])


def test_transparent_pixels_are_laid_over_white() -> None:
    rgba = np.zeros((1, 3, 4), dtype=np.uint8)
    rgba[0, :, 3] = 0, 255, 128
    photo = read_image(_encode(Image.fromarray(rgba)))
    np.testing.assert_array_equal(photo.pixels[0, :, 0], [255, 0, 127])
    palette = Image.fromarray(np.array([[0, 1]], dtype=np.uint8), "P")
    palette.putpalette([9, 9, 9, 7, 7, 7])
    np.testing.assert_array_equal(read_image(_encode(palette, transparency=0)).pixels[0, :, 0], [255, 7])
    gray = Image.fromarray(np.array([[3, 4]], dtype=np.uint8))
    np.testing.assert_array_equal(read_image(_encode(gray, transparency=3)).pixels[0, :, 0], [255, 4])


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_of_an_animation_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    encoded = _encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    np.testing.assert_array_equal(read_image(encoded).pixels[0, 0], [255, 0, 0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    encoded = _encode(Image.fromarray(_pixels()), exif=exif)
    photo = read_image(encoded)
    assert photo.orientation == orientation
    np.testing.assert_array_equal(photo.pixels, _pixels())
    np.testing.assert_array_equal(photo.upright(), np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))))


def _tiff(orientation: object, mode: str = "RGB", **options: object) -> bytes:
    return _encode(Image.fromarray(_pixels()).convert(mode), "TIFF", tiffinfo={0x0112: orientation}, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_tiff_keeps_stored_pixels(orientation: int, compression: str | None) -> None:
    encoded = _tiff(orientation, compression=compression)
    photo = read_image(encoded)
    assert photo.orientation == orientation
    np.testing.assert_array_equal(photo.pixels, _pixels())
    np.testing.assert_array_equal(photo.upright(), np.asarray(Image.open(io.BytesIO(encoded))))
    gray = read_image(_tiff(orientation, "L", compression=compression))
    np.testing.assert_array_equal(gray.pixels[:, :, 0], np.asarray(Image.fromarray(_pixels()).convert("L")))


@pytest.mark.parametrize("format", ["TIFF", "PNG", "JPEG", "WEBP"])
def test_orientation_in_xmp_alone(format: str) -> None:
    packet = b'<rdf:Description tiff:Orientation="6"/>'
    name = "tiffinfo" if format == "TIFF" else "xmp"
    image = Image.fromarray(_pixels(16, 24))
    plain = np.asarray(Image.open(io.BytesIO(_encode(image, format))).convert("RGB"))
    photo = read_image(_encode(image, format, **{name: {700: packet} if format == "TIFF" else packet}))
    np.testing.assert_array_equal(photo.pixels, plain)
    assert photo.orientation in ((1, 6) if format == "PNG" else (6,))


def test_tiff_turned_twice_refused() -> None:
    for compression in ("tiff_lzw", "tiff_adobe_deflate", "packbits"):
        with pytest.raises(UnreadableError, match="is a YCbCr TIFF with EXIF orientation 3; save it again as RGB"):
            read_image(_tiff(3, "YCbCr", compression=compression))
        assert read_image(_tiff(1, "YCbCr", compression=compression)).stored_size == (7, 5)
    assert read_image(_tiff(6, compression="jpeg")).stored_size == (7, 5)


def test_tiff_orientation_unreadable_refused() -> None:
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags.tagtype[700] = 2  # XMP as a text, at which Pillow raises an error
    tags[700] = "no bytes"
    with pytest.raises(UnreadableError, match="orientation that cannot be read"):
        read_image(_encode(Image.fromarray(_pixels()), "TIFF", tiffinfo=tags))
    for odd in (0, 9, 600):  # Pillow turns by no such number
        photo = read_image(_tiff(odd))
        assert photo.orientation == 1
        np.testing.assert_array_equal(photo.pixels, _pixels())


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize("exif", [b"Exif\x00\x00garbage", b"Exif\x00\x00II*\x00\xff\xff\xff\xff", 77])
def test_broken_exif_counts_as_upright(exif: bytes | int) -> None:
    if isinstance(exif, int):  # no orientation has this number
        found = Image.Exif()
        found[0x0112] = exif
        exif = found.tobytes()
    assert read_image(_encode(Image.fromarray(_pixels(8, 8)), "JPEG", exif=exif)).orientation == 1


def _write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


_PICTURE = _encode(Image.fromarray(_pixels(40, 40)))
_JPEG = _encode(Image.fromarray(_pixels(40, 40)), "JPEG")
_EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"

BROKEN = {
    "empty": (b"", "is empty"),
    "text": (b"hello, world", "is not an image"),
    "zeros": (bytes(1000), "is not an image"),
    "truncated.png": (_PICTURE[: len(_PICTURE) // 2], "cannot be decoded: .*truncated"),
    "truncated.jpg": (_JPEG[: len(_JPEG) // 2], "cannot be decoded: .*truncated"),
    "header.png": (_PICTURE[:20], "is not an image|cannot be decoded"),
    "header.jpg": (_JPEG[:30], "is not an image|cannot be decoded"),
    "bomb.png": (_png_header(60_000, 60_000), "more than 100,000,000 pixels"),
    "large.png": (_png_header(10_001, 10_000), "more than 100,000,000 pixels"),
    "short.png": (_png_header(9_999, 9_500), "cannot be decoded"),
    "program.eps": (_EPS, "is not an image"),
    "float.tif": (_encode(Image.fromarray(np.ones((3, 3), np.float32)), "TIFF"), "floating-point"),
    "wide.tif": (_encode(Image.fromarray(np.full((3, 3), 1 << 20, np.int32)), "TIFF"), "more than 16 bits"),
    "svg.svg": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "is not an image"),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_refused(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    path = _write(tmp_path / name, content)
    said = refused(UnreadableError, message, read_image, path)
    assert str(path) in said
    refused(UnreadableError, f"some name.*({message})", read_image, content, name="some name")


@pytest.mark.filterwarnings("error")
def test_pixel_limit() -> None:
    assert MAX_IMAGE_PIXELS == 100_000_000
    with pytest.raises(UnreadableError, match="cannot be decoded"):  # 95 Mpx: over Pillow's limit, under ours
        read_image(_png_header(10_000, 9_500))


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    loop = tmp_path / "loop.png"
    loop.symlink_to(loop)
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    for name, message in (
        ("missing.png", r"there is no file .*missing\.png"),
        (".", "is a folder"),
        ("loop.png", r"loop\.png cannot be opened"),
        ("nul\0.png", "cannot be opened"),
        ("pipe.png", "not a regular file"),
        ("zeros.png", "not a regular file"),
    ):
        with pytest.raises(UnreadableError, match=message):
            read_image(f"{tmp_path}/{name}")
        if "\0" not in name:
            refused(UnreadableError, message, read_image, tmp_path / name)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_random_damage() -> None:
    random = np.random.default_rng(1)
    seeds = [_PICTURE, _JPEG, *(_encode(Image.fromarray(_pixels(9, 9)), f) for f in ("GIF", "TIFF", "BMP", "WEBP"))]
    for encoded in seeds:
        for _ in range(60):
            damaged = np.frombuffer(encoded, np.uint8).copy()
            damaged[random.integers(0, len(damaged), 4)] = random.integers(0, 256, 4)
            with contextlib.suppress(UnreadableError):
                assert read_image(damaged.tobytes()).pixels.dtype == np.uint8


def test_photo_refuses_other_arrays() -> None:
    refused(UsageError, "orientation is 1 to 8, got 9", Photo, _pixels(), 9)
    for pixels in (np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8)):
        refused(UsageError, "uint8", Photo, pixels)


@pytest.mark.parametrize("wrap", [np.asarray, torch.as_tensor])
def test_batches_of_bytes(wrap: type) -> None:
    pixels = np.stack([_pixels(), _pixels()[::-1]])
    batch = as_batch(wrap(pixels))
    assert batch.dtype == torch.float32
    assert batch.shape == (2, 3, 7, 5)
    np.testing.assert_array_equal(batch.numpy(), (pixels.transpose(0, 3, 1, 2) / np.float32(255)).astype(np.float32))
    assert torch.equal(as_batch(wrap(pixels[0])), batch[:1])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_batches_of_floats(dtype: str) -> None:
    values = np.random.default_rng(0).random((2, 3, 4, 5)).astype(dtype)
    batch = as_batch(values)
    assert batch.dtype == torch.float32
    np.testing.assert_array_equal(batch.numpy(), values.astype(np.float32))
    assert torch.equal(as_batch(values[0]), batch[:1])


@pytest.mark.filterwarnings("error")
def test_read_only_and_reversed_arrays_are_taken() -> None:
    pixels = _pixels()[None]
    pixels.flags.writeable = False
    assert as_batch(pixels).shape == (1, 3, 7, 5)
    assert torch.equal(as_batch(pixels[:, ::-1]), as_batch(pixels).flip(2))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 4, 4), np.uint8), r"uint8 images must be \[batch, height, width, 3\].*\[1, 3, 4, 4\]"),
        (np.zeros((1, 4, 4, 3), np.float32), r"float images must be \[batch, 3, height, width\].*\[1, 4, 4, 3\]"),
        (np.zeros((4, 4), np.uint8), r"got \[4, 4\]"),
        (np.zeros((0, 4, 4, 3), np.uint8), r"got \[0, 4, 4, 3\]"),
        (np.zeros((1, 3, 0, 4), np.float32), r"got \[1, 3, 0, 4\]"),
        (np.zeros((1, 4, 4, 3), np.int64), "got int64"),
        (np.zeros((1, 4, 4, 3), np.uint16), "uint8, got uint16"),
        (torch.zeros((1, 4, 4, 3), dtype=torch.int32), "got torch.int32"),
        (np.zeros((1, 4, 4, 3), bool), "got bool"),
        (np.zeros((1, 4, 4, 3), object), "got object"),
        (np.full((1, 3, 4, 4), 255.0), r"\[0, 1\], found values from 255 to 255"),
        (np.full((1, 3, 4, 4), -0.5), "found values from -0.5"),
        (np.array([[[[0.5, np.nan]]] * 3]).reshape(1, 3, 1, 2), "found NaN"),
        (np.full((1, 3, 4, 4), np.inf), "found values from inf"),
    ],
)
def test_other_arrays_are_refused(images: np.ndarray, message: str) -> None:
    refused(UsageError, message, as_batch, images)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda zeros: zeros.to_sparse(), "must be a dense tensor, got a sparse_coo one"),
        (lambda zeros: zeros[0].to_sparse(), "must be a dense tensor, got a sparse_coo one"),
        (lambda zeros: zeros.to_mkldnn(), "must be a dense tensor, got a _mkldnn one"),
        (lambda zeros: torch.nested.nested_tensor([zeros[0]]), "must be a dense tensor, got a nested one"),
        (lambda zeros: torch.nested.nested_tensor([zeros[0]], layout=torch.jagged), "got a nested one"),
        (lambda zeros: zeros.to("meta"), "must have values, got a tensor on the meta device"),
        (lambda zeros: zeros[0].to("meta"), "must have values, got a tensor on the meta device"),
    ],
)
@pytest.mark.parametrize("take", [as_batch, tiny.color_model().score_map, tiny.color_model().certify])
def test_tensors_of_other_kinds_are_refused(take: Callable, make: Callable, message: str) -> None:
    refused(UsageError, message, take, make(torch.zeros(1, 3, 8, 8)))


def test_what_torch_has_no_numbers_for_is_refused() -> None:
    wide = np.zeros((1, 3, 8, 8), np.longdouble)
    if wide.itemsize > 8:  # it is another name of float64 elsewhere
        refused(UsageError, "at most 64 bits, got float", as_batch, wide)
    refused(UsageError, "must be a numpy array or a torch tensor, got list", with_batch_axis, [[0.0]])


def _hollow(path: Path, head: bytes, size: int) -> Path:
    """A file of that size with a head and nothing but a hole behind it, which takes no room on the disk."""
    path.write_bytes(head)
    os.truncate(path, size)
    return path


@pytest.mark.parametrize("head", [b"RIFF\xf8\xff\xff\xffWEBPVP8 ", _PICTURE, b"BM", b"II*\x00"])
def test_files_too_large_for_an_image_are_refused_unread(head: bytes, tmp_path: Path) -> None:
    path = _hollow(tmp_path / "large", head, MAX_IMAGE_BYTES + 1)
    refused(UnreadableError, "has 536,870,913 bytes and is refused", read_image, path)
    with open(path, "rb") as file, pytest.raises(UnreadableError, match="has 536,870,913 bytes and is refused"):
        read_image(file)


def test_icon_too_large_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    icon = bytearray(_encode(Image.fromarray(_pixels(40, 40)), "ICO", sizes=[(40, 40)]))
    assert read_image(bytes(icon)).stored_size == (40, 40)
    icon[6:8] = 16, 16  # it says it is smaller
    monkeypatch.setattr("bagcert.data.photo.MAX_IMAGE_PIXELS", 1000)
    with (
        pytest.warns(UserWarning, match="not the expected size"),
        pytest.raises(UnreadableError, match="more than 1,000 pixels"),
    ):
        read_image(bytes(icon))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16"])
def test_strips_join_without_a_seam(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(_pixels(50, 9))
    if mode == "I;16":
        image = Image.fromarray(np.arange(450, dtype=np.uint16).reshape(50, 9) * 145)
    elif mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        image.putalpha(Image.fromarray(np.arange(450, dtype=np.uint16).reshape(50, 9).astype(np.uint8)))
    encoded = _encode(image if mode == "I;16" else image.convert(mode), "TIFF" if mode == "CMYK" else "PNG")
    whole = read_image(encoded).pixels
    monkeypatch.setattr("bagcert.data.photo.STRIP_PIXELS", 70)
    np.testing.assert_array_equal(read_image(encoded).pixels, whole)


MEMORY = """
import io, resource, sys
from PIL import Image
from bagcert.data.photo import read_image
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
small, large = io.BytesIO(), io.BytesIO()
Image.new("RGBA", (64, 64), (1, 2, 3, 4)).save(small, "PNG")
Image.new("RGBA", (5000, 4000), (1, 2, 3, 4)).save(large, "PNG", compress_level=1)
before = peak()
read_image(small.getvalue())
read_image(large.getvalue())
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory has other units elsewhere")
def test_memory_is_bounded_by_the_pixels() -> None:
    """20 Mpx need 80 MB as RGBA, which Image.new above held as well, and 60 MB as RGB; no third copy is made."""
    found = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, timeout=200)
    assert float(found.stdout) < 100
