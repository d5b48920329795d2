"""Shard files, local or remote through fsspec: `s3://`, `gs://`, `hf://`, `https://`."""

import glob
import io
import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bagcert.data.remote import etag, file_system, translate_store_errors
from bagcert.errors import BagcertError, UnreadableError, UsageError, sanitize
from bagcert.io.files import open_regular

Shard = Path | str  # a local path, or a URL


def is_glob(path: Path) -> bool:
    """Returns whether a path is a glob pattern and not the name of an existing file."""
    return glob.has_magic(str(path)) and not path.exists()


class CachingSource(ABC):
    """Base class of image sources that read blocks of images from shards and cache them.

    The cache holds at most `cache_bytes`, but always the block in use. It is not pickled.
    """

    def __init__(self, cache_bytes: int) -> None:
        self.cache_bytes = cache_bytes
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _lock=threading.Lock())

    @abstractmethod
    def read_block(self, block: int) -> Any:
        """Reads a block from its shard."""

    def size_of(self, content: Any) -> int:
        """Returns the size of a block in bytes."""
        return len(content)

    def cached_block(self, block: int) -> Any:
        """Returns the content of a block, from the cache if possible."""
        with self._lock:
            if block not in self._kept:
                self._kept[block] = self.read_block(block)
                while len(self._kept) > 1 and sum(map(self.size_of, self._kept.values())) > self.cache_bytes:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(block)
            return self._kept[block]


def find_shards(path: Path, split: str, suffix: str) -> tuple[list[Shard], str]:
    """Lists the shard files of a path, sorted by name, and their split.

    A file or a glob has the split "all". In a folder, files are named `<split>-*` or `<split>`.

    Raises:
        UnreadableError: no file matches.
        UsageError: the folder has no such split.
    """
    if path.is_dir():
        found = sorted(file for file in path.glob(f"*{suffix}") if not file.name.startswith("."))
        return _of_split(found, split, lambda file: file.stem, str(path)), split
    if not is_glob(path):
        return [path], "all"
    found = sorted(Path(each) for each in glob.glob(str(path)))
    if not found:
        raise UnreadableError(f"no file matches {path}")
    return list(found), "all"


def find_addresses(spec: str, split: str) -> tuple[list[Shard], str]:
    """Lists the shard files of a URL of a file, a glob or a folder, and their split.

    Raises:
        UnreadableError: no such file, or no permission to read it.
        UsageError: the folder has no such split, or a library for the protocol is missing.
        BagcertError: the store cannot be reached.
    """
    system, path = file_system(spec)
    with translate_store_errors(spec):
        whole = not glob.has_magic(path) and system.isdir(path)
        found = sorted(system.glob(f"{path.rstrip('/')}/*" if whole else path))
        files = [system.unstrip_protocol(each) for each in found]
    files = [file for file in files if file.endswith((".parquet", ".tar"))]
    if not files:
        raise UnreadableError(f"{spec} leads to no .parquet or .tar file")
    if not whole:
        return list(files), "all"
    return _of_split(files, split, lambda file: file.rsplit("/", 1)[1].rsplit(".", 1)[0], spec), split


def open_shard(path: Shard) -> Any:
    """Opens a shard for random-access reading.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
        UsageError, UnreadableError, BagcertError: as `find_addresses`.
    """
    if isinstance(path, Path):
        return open_regular(path)
    system, name = file_system(path)
    with translate_store_errors(path):
        return system.open(name, "rb")


def state_of(file: Any) -> tuple[int, int | str]:
    """Returns the size of a shard and its modification time or version mark, to detect changes."""
    if isinstance(file, io.BufferedReader):
        found = os.fstat(file.fileno())
        return found.st_size, found.st_mtime_ns
    details = getattr(file, "details", None)
    return int(file.size), etag(details) if isinstance(details, dict) else ""


@contextmanager
def reading(path: Shard, form: str) -> Iterator[None]:
    """Context manager that converts any error to an `UnreadableError` with the file name and expected format."""
    try:
        yield
    except BagcertError:
        raise
    except FileNotFoundError:
        raise UnreadableError(f"there is no file {path}") from None
    except Exception as error:  # invalid names, unsupported types and remote stores raise different errors
        reason = sanitize(getattr(error, "strerror", None) or error or type(error).__name__)
        raise UnreadableError(f"{path} cannot be read as {form}: {reason}") from error


def _of_split(files: list[Any], split: str, stem: Callable[[Any], str], folder: str) -> list[Shard]:
    splits = sorted({stem(file).split("-")[0] for file in files})
    if split not in splits:
        raise UsageError(f"{folder} has no split {split!r}; its shards are of the splits {', '.join(splits)}")
    return [file for file in files if stem(file).split("-")[0] == split]
