"""Images in WebDataset shards: tar files in which the files of a sample are adjacent and share a name.

    000001.jpg  000001.cls  000002.jpg  000002.cls ...

The index of a shard (offsets and labels) is read once from the tar headers. Images are read later, in blocks of
neighbors. Nothing is unpacked, and no path in a shard is ever opened.

Source: A. Aizman, G. Maltby, T. Breuel, "High performance I/O for large scale deep learning", 2019 (the format).
"""

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64

from bagcert.data.folder import EXTENSIONS
from bagcert.data.image_set import ImageSet
from bagcert.data.parquet import MAX_CLASSES, MAX_ROWS
from bagcert.data.photo import MAX_IMAGE_BYTES, Photo, read_image
from bagcert.data.shards import CachingSource, Shard, find_shards, is_glob, open_shard, reading, state_of
from bagcert.errors import UnreadableError, sanitize

CACHE_BYTES = 1 << 28  # blocks are cached in memory up to this size. The block in use is always kept.
BLOCK_BYTES = 1 << 24  # size of a block of neighboring images that are read together, in bytes
MAX_LABEL_BYTES = 1 << 16  # limit on the size of labels and file names, checked before they are read
_BLOCK = tarfile.BLOCKSIZE
_LABELS = ("cls", "json")
_LONG_NAMES = (tarfile.XHDTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME)


def is_webdataset(path: Path) -> bool:
    """Returns whether a path is a tar file, a glob of tar files, or a folder with tar files."""
    return (path.suffix == ".tar" and (is_glob(path) or path.is_file())) or (path.is_dir() and any(path.glob("*.tar")))


def load_webdataset(path: Path, split: str = "test") -> ImageSet:
    """Loads images and labels of tar shards, in the order of the file names.

    A sample is an image file (`.jpg`, `.png`, ...) and its label: `.cls`, an integer as text, or `.json`, an object
    with an integer `label`. Other files of a sample are ignored. Classes are named "0", "1", ...

    Args:
        path: a folder with `<split>-*.tar`; or a file or a glob, whose images are all used for any split.

    Raises:
        UnreadableError: no such file, compressed, truncated, not a tar file, or a sample without image or label.
        UsageError: the folder has no such split.
    """
    files, split = find_shards(path, split, ".tar")
    return tar_images(str(path), split, files)


def tar_images(name: str, split: str, files: Sequence[Shard]) -> ImageSet:
    """Loads the images of local or remote tar shards, see `load_webdataset`."""
    source = _Tars(files)
    largest = int(source.labels.max(initial=0))
    if largest >= MAX_CLASSES:
        raise UnreadableError(f"{name} has the label {largest}; labels must be 0 to {MAX_CLASSES - 1:,}")
    return ImageSet(name, split, source.labels, tuple(str(label) for label in range(largest + 1)), source)


class _Tars(CachingSource):
    """Image source over several tar shards. Blocks of neighboring images are read on demand and cached."""

    def __init__(self, files: Sequence[Shard]) -> None:
        super().__init__(CACHE_BYTES)
        self._files = list(files)
        self._states = []
        samples: list[tuple[int, int, int, int]] = []
        for number, path in enumerate(files):
            with reading(path, "a tar file"), open_shard(path) as file:
                self._states.append(state_of(file))
                samples += ((number, *sample) for sample in _samples(file, path, self._states[-1][0]))
            if len(samples) > MAX_ROWS:
                raise UnreadableError(f"{path} makes the data more than {MAX_ROWS:,} images long")
        columns = np.asarray(samples, dtype=np.int64).reshape(-1, 4).T
        self._shard, self._start, self._size, self.labels = (column.copy() for column in columns)
        self._block = _blocks(self._shard, self._start, self._size)

    def __call__(self, row: int) -> Photo:
        """Returns the image with this number."""
        path = self._files[self._shard[row]]
        name = f"{path} byte {self._start[row]}"
        if self._size[row] > MAX_IMAGE_BYTES:
            raise UnreadableError(
                f"{name}: an image of {self._size[row]:,} bytes is refused; an image has at most {MAX_IMAGE_BYTES:,}"
            )
        block = int(self._block[row])
        first = int(np.searchsorted(self._block, block))
        start = int(self._start[row] - self._start[first])
        return read_image(self.cached_block(block)[start : start + int(self._size[row])], name)

    def block_of(self, rows: Int64[np.ndarray, " images"]) -> Int64[np.ndarray, " images"]:
        """Returns the block of each image."""
        return self._block[rows]

    def fingerprint(self) -> bytes:
        """Returns a hash of the names, sizes and modification times of the shards when they were opened."""
        names = (str(path).rsplit("/", 1)[-1] for path in self._files)
        return repr(list(zip(names, self._states, strict=True))).encode()

    def read_block(self, block: int) -> bytes:
        """Reads the bytes of a block of neighboring images."""
        first, end = np.searchsorted(self._block, [block, block + 1])
        number, last = int(self._shard[first]), int(end) - 1
        path = self._files[number]
        size = int(self._start[last] + self._size[last] - self._start[first])
        with reading(path, "a tar file"), open_shard(path) as file:
            if state_of(file) != self._states[number]:
                raise UnreadableError(f"{path} was changed while it was in use")
            file.seek(int(self._start[first]))
            content = file.read(size)
        if len(content) != size:
            raise UnreadableError(f"{path} is cut short")
        return content


def _blocks(shard: np.ndarray, start: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Assigns the images of a shard to blocks of at most BLOCK_BYTES, or of one larger image."""
    blocks = np.zeros(len(shard), dtype=np.int64)
    first, number = 0, 0
    for row in range(1, len(shard)):
        if shard[row] != shard[first] or start[row] + size[row] - start[first] > BLOCK_BYTES:
            first, number = row, number + 1
        blocks[row] = number
    return blocks


def _samples(file: Any, path: Shard, length: int) -> Iterator[tuple[int, int, int]]:
    """Iterates over the samples of a shard as (offset, size in bytes, label)."""
    current: str | None = None
    image: tuple[int, int] | None = None
    label: int | None = None
    for name, start, size in (*_members(file, path, length), ("", 0, 0)):
        folder, _, base = name.rpartition("/")
        stem, _, extension = base.partition(".")
        key = f"{folder}/{stem}"
        if key != current or not name:
            if image is not None and label is not None:
                yield *image, label
            elif image is not None or label is not None:
                missing = "label (.cls or .json)" if label is None else "image"
                raise UnreadableError(f"{path}: sample {sanitize(current)} has no {missing}")
            current, image, label = key, None, None
        if f".{extension.lower()}" in EXTENSIONS and image is None:
            image = (start, size)
        elif extension in _LABELS and label is None:
            label = _label(_read(file, path, start, size), extension, f"{path}: sample {sanitize(key)}")


def _label(content: bytes, kind: str, what: str) -> int | None:
    try:
        value = int(content.strip()) if kind == "cls" else json.loads(content).get("label")
    except (ValueError, AttributeError, RecursionError):
        value = None if kind == "json" else -1
    if kind == "json" and value is None:
        return None  # data about the image, without a label
    if type(value) is not int or not 0 <= value < MAX_CLASSES:
        raise UnreadableError(f"{what} has no label from 0 to {MAX_CLASSES - 1:,} in its .{kind}")
    return value


def _members(file: Any, path: Shard, length: int) -> Iterator[tuple[str, int, int]]:
    """Iterates over the regular files of an untrusted tar file as (name, offset, size in bytes).

    `tarfile.TarFile` ends without an error at a damaged header, and would drop all images behind it.
    """
    place, long_name, long_size = 0, None, None
    while place + _BLOCK <= length:
        file.seek(place)
        try:
            header = tarfile.TarInfo.frombuf(file.read(_BLOCK), "utf-8", "replace")
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]  # the stubs lack it
            return
        except (tarfile.HeaderError, ValueError) as error:
            compressed = "; a compressed one must be unpacked" if place == 0 else ""
            raise UnreadableError(f"{path} is no tar file, or damaged at byte {place} ({error}){compressed}") from None
        place += _BLOCK
        size = header.size if long_size is None or header.type in _LONG_NAMES else long_size
        if size < 0 or place + size > length:
            raise UnreadableError(f"{path} is cut short: {sanitize(header.name)} should have {size:,} bytes")
        if header.type in _LONG_NAMES:
            content = _read(file, path, place, size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode(errors="replace")
            else:
                long_name, long_size = _pax(content, path)
        else:
            if header.isreg():
                yield (header.name if long_name is None else long_name), place, size
            long_name = long_size = None
        place += -(-size // _BLOCK) * _BLOCK
    raise UnreadableError(f"{path} is cut short: the end of its list of files is missing")


def _pax(content: bytes, path: Shard) -> tuple[str | None, int | None]:
    """Parses the name and size in an extended header, lines `length key=value`, for the next file."""
    found: dict[bytes, bytes] = {}
    try:
        while content:
            digits, _, _ = content.partition(b" ")
            line, content = content[: int(digits)], content[int(digits) :]
            key, sign, value = line[len(digits) + 1 : -1].partition(b"=")
            if not sign or int(digits) <= len(digits):
                raise ValueError
            found[key] = value
        size = int(found[b"size"]) if b"size" in found else None
        if size is not None and size >= 1 << 63:
            raise ValueError
    except ValueError:
        raise UnreadableError(f"{path} has a damaged extended header") from None
    return (found[b"path"].decode(errors="replace") if b"path" in found else None), size


def _read(file: Any, path: Shard, start: int, size: int) -> bytes:
    if size > MAX_LABEL_BYTES:
        raise UnreadableError(f"{path}: a label or a name of {size:,} bytes is refused; at most {MAX_LABEL_BYTES:,}")
    file.seek(start)
    content: bytes = file.read(size)
    return content
