"""Shard files, on this machine or behind an address that fsspec knows: `s3://`, `gs://`, `hf://`, `https://`."""

import glob
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bagcert.data.remote import etag, file_system, translate_store_errors
from bagcert.errors import BagcertError, UnreadableError, UsageError, shown
from bagcert.io.files import open_regular

Shard = Path | str
"""A file here, or the address of one elsewhere."""


def is_glob(path: Path) -> bool:
    """A pattern, unless there is a file of that very name."""
    return glob.has_magic(str(path)) and not path.exists()


def find_shards(path: Path, split: str, suffix: str) -> tuple[list[Shard], str]:
    """The files a path leads to, in the order of their names, and the split they are of.

    A file or a glob stands for all its images, the split "all". In a folder, files are named `<split>-*` or `<split>`.

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
    """Likewise for an address: of one file, with a glob, or of a folder.

    Raises:
        UnreadableError: nothing there, or it may not be read.
        UsageError: the folder has no such split, or a library for this kind of address is missing.
        BagcertError: it cannot be reached.
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
    """A shard, opened for reading at any place.

    Raises:
        OSError: it cannot be opened, or is no regular file here.
        UsageError, UnreadableError, BagcertError: as `find_addresses`.
    """
    if isinstance(path, Path):
        return open_regular(path)
    system, name = file_system(path)
    with translate_store_errors(path):
        return system.open(name, "rb")


def state_of(file: Any) -> tuple[int, int | str]:
    """What changes when a shard does: its size, and the time of its last change or what its store marks it with."""
    if isinstance(file, io.BufferedReader):
        found = os.fstat(file.fileno())
        return found.st_size, found.st_mtime_ns
    details = getattr(file, "details", None)
    return int(file.size), etag(details) if isinstance(details, dict) else ""


@contextmanager
def reading(path: Shard, form: str) -> Iterator[None]:
    """Whatever fails inside is an `UnreadableError` that names the file and the form it should have."""
    try:
        yield
    except BagcertError:
        raise
    except FileNotFoundError:
        raise UnreadableError(f"there is no file {path}") from None
    except Exception as error:  # names that are no text, types without a reader, stores: each fails in its own way
        reason = shown(getattr(error, "strerror", None) or error or type(error).__name__)
        raise UnreadableError(f"{path} cannot be read as {form}: {reason}") from error


def _of_split(files: list[Any], split: str, stem: Callable[[Any], str], folder: str) -> list[Shard]:
    splits = sorted({stem(file).split("-")[0] for file in files})
    if split not in splits:
        raise UsageError(f"{folder} has no split {split!r}; its shards are of the splits {', '.join(splits)}")
    return [file for file in files if stem(file).split("-")[0] == split]
