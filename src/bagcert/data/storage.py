"""Local files and objects in object stores: list, inspect and open them by path or URL, without copying.

Local paths use the hardened reads of `bagcert.io.files`; URLs (`s3://bucket/key`) use fsspec.
"""

import glob
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bagcert.data.folder import EXTENSIONS, images_below
from bagcert.data.photo import MAX_IMAGE_BYTES, Photo, read_image
from bagcert.data.remote import etag, file_system, is_address, translate_store_errors
from bagcert.errors import CONTROL, UnreadableError
from bagcert.io.files import open_regular

PARQUET = ".parquet"


@dataclass(frozen=True, order=True)
class Stored:
    """A listed file."""

    path: str
    state: str

    @property
    def is_shard(self) -> bool:
        """Returns whether the file holds many images."""
        return self.path.endswith(PARQUET)


def absolute(path: str) -> str:
    """Returns a path that is also valid in processes with another working directory."""
    return path if is_address(path) else os.path.abspath(os.path.expanduser(path))


def list_files(data: str) -> list[Stored]:
    """Lists the image files and Parquet files of `data`, sorted by name.

    Args:
        data: a folder, which is searched recursively; a file; or a glob such as `s3://bucket/*.parquet`. Hidden files
            and folders are skipped.

    Raises:
        UnreadableError: no files, or a folder that cannot be listed.
        UsageError: the library for this protocol is not installed.
    """
    found = _listed_remote(data) if is_address(data) else _listed_here(absolute(data))
    if not found:
        raise UnreadableError(f"{data} holds no images and no Parquet files")
    odd = next((stored.path for stored in found if CONTROL.search(stored.path)), None)
    if odd is not None:
        raise UnreadableError(f"{data} holds a file whose name is no text: {odd!r}")
    return found


def read_photo(path: str) -> Photo:
    """Reads an image from a file or object.

    Raises:
        UnreadableError: the image cannot be read, and a retry would not help.
        BagcertError: the store does not respond.
    """
    if not is_address(path):
        return read_image(path)
    files, name = file_system(path)
    with translate_store_errors(path), files.open(name, "rb") as file:
        if file.size > MAX_IMAGE_BYTES:
            raise UnreadableError(
                f"{path} has {file.size:,} bytes and is refused; an image has at most {MAX_IMAGE_BYTES:,}"
            )
        content = file.read()
    return read_image(content, path)


@contextmanager
def opened(path: str) -> Iterator[io.IOBase]:
    """Opens a file or object for random-access reading.

    Raises:
        OSError: as for `open_regular`, or an error of the store.
    """
    if is_address(path):
        files, name = file_system(path)
        with files.open(name, "rb") as file:
            yield file
    else:
        with open_regular(path) as file:
            yield file


def state_of(path: str) -> str:
    """Returns the current state of a file, as in `Stored`.

    Raises:
        UnreadableError: the file no longer exists.
        BagcertError: the store does not respond.
    """
    if not is_address(path):
        try:
            return _state_here(path)
        except OSError as error:
            raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None
    files, name = file_system(path)
    with translate_store_errors(path):
        files.invalidate_cache()  # a listing kept from before would hide a change
        return _state_there(files.info(name))


def _listed_here(data: str) -> list[Stored]:
    if os.path.isdir(data):
        found = [str(path) for path in images_below(Path(data), (*EXTENSIONS, PARQUET))]
    elif os.path.exists(data):
        found = [data]
    elif glob.has_magic(data):
        found = sorted(path for path in glob.glob(data, recursive=True) if not os.path.isdir(path))
    else:
        raise UnreadableError(f"there is no file or folder {data}")
    listed = []
    for path in found:
        try:
            listed.append(Stored(path, _state_here(path)))
        except OSError:  # a link to nowhere: it is told when it is read
            listed.append(Stored(path, "missing"))
    return listed


def _listed_remote(url: str) -> list[Stored]:
    files, root = file_system(url)
    with translate_store_errors(url):
        single = not glob.has_magic(root) and root.lower().endswith((*EXTENSIONS, PARQUET)) and files.isfile(root)
        if single:
            found: dict[str, Any] = {root: files.info(root)}
        else:
            found = files.glob(root, detail=True) if glob.has_magic(root) else files.find(root, detail=True)
    start = "" if single or glob.has_magic(root) else root
    return [
        Stored(str(files.unstrip_protocol(name)), _state_there(found[name]))
        for name in sorted(found)
        if name.lower().endswith((*EXTENSIONS, PARQUET))
        and not any(part.startswith(".") for part in name.removeprefix(start).split("/"))
        and found[name].get("type") != "directory"
    ]


def _state_here(path: str) -> str:
    found = os.stat(path)
    return f"{found.st_size} {found.st_mtime_ns}"


def _state_there(info: dict[str, Any]) -> str:
    return f"{info.get('size')} {etag(info)}"
