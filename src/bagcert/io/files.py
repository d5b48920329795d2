"""Hardened reads of untrusted files, and atomic writes that survive crashes, full disks and kills."""

import errno
import io
import os
import stat
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from bagcert.errors import BagcertError, UnreadableError

RANDOM_LETTERS = 8  # of `tempfile`, at the end of a temporary name
PREVIOUS = "previous"  # as many letters


def open_regular(path: str | Path, limit_bytes: int | None = None) -> io.BufferedReader:
    """Opens a regular file of at most `limit_bytes` for reading.

    The checks run on the open file, so that the file cannot be swapped between check and read. Opening a pipe does not
    block, and a device is never read.

    Raises:
        OSError: missing, not a regular file, too large; `strerror` says which.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:
        raise OSError(errno.EINVAL, f"its name is no file name ({error})") from None
    file = os.fdopen(descriptor, "rb") if not stat.S_ISDIR(os.fstat(descriptor).st_mode) else None
    if file is None:
        os.close(descriptor)
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        file.close()
        raise OSError(errno.EINVAL, "it is not a regular file")
    if limit_bytes is not None and found.st_size > limit_bytes:
        file.close()
        raise OSError(errno.EFBIG, f"it has {found.st_size:,} bytes, more than the limit of {limit_bytes:,}")
    return file


def read_regular(path: str | Path, limit_bytes: int) -> bytes:
    """Reads a regular file. The file may grow while it is read, but not beyond the limit."""
    with open_regular(path, limit_bytes) as file:
        parts, rest = [], limit_bytes + 1
        while rest and (part := file.read(min(rest, 1 << 24))):  # memory is set aside for as much as is asked for
            parts.append(part)
            rest -= len(part)
    if not rest:
        raise OSError(errno.EFBIG, f"it grew beyond the limit of {limit_bytes:,} bytes")
    return b"".join(parts)


def read_input(path: str | Path, limit_bytes: int, name: str = "") -> bytes:
    """Reads a regular file that the user named.

    Raises:
        UnreadableError: the file cannot be read. The sentence begins with `name`, by default the path.
    """
    try:
        return read_regular(path, limit_bytes)
    except OSError as error:
        raise UnreadableError(f"{name or path} cannot be read: {error.strerror or error}") from None


def read_lines(path: Path, limit_bytes: int, name: str) -> list[str]:
    """Reads the lines of a text file in UTF-8 as `read_input`; `name` is a plural."""
    try:
        return read_input(path, limit_bytes, name).decode("utf-8-sig").splitlines()
    except UnicodeDecodeError:
        raise UnreadableError(f"{name} are not text in UTF-8") from None


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file atomically: after a crash, the file is either complete or absent."""
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Writes files that are only valid together, each one atomically.

    All contents are on disk before the first file is renamed. An older version of the last file is removed first, so
    that it never exists next to new versions of the others, even if the process is killed.

    Raises:
        BagcertError: a file cannot be written. No partial file is left.
    """
    staged: list[tuple[Path, Path]] = []
    path = last = list(contents)[-1]
    aside = last.with_name(f".{last.name}.{PREVIOUS}")
    replaced = 0
    try:
        for path, content in contents.items():
            staged.append((_stage(path, content), path))
        if len(staged) > 1 and last.exists():
            os.replace(last, aside)
        for temporary, path in staged:
            os.replace(temporary, path)
            replaced += 1
    except BaseException as error:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
        if not replaced and len(staged) > 1 and aside.exists():
            os.replace(aside, last)
        if isinstance(error, OSError):
            raise BagcertError(f"{path} cannot be written: {error.strerror or error}") from None
        raise
    if len(staged) > 1:
        aside.unlink(missing_ok=True)


def _stage(path: Path, content: bytes) -> Path:
    """Writes the content to a hidden temporary file next to `path` and flushes it to disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
    except BaseException:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise
    return temporary


def remove_leftovers(path: Path) -> None:
    """Removes temporary files that a killed `write_atomically` to this path left behind.

    Only for paths that no other process is writing to.
    """
    prefix = f".{path.name}."
    with suppress(OSError):
        for entry in list(os.scandir(path.parent)):
            if entry.name.startswith(prefix) and len(entry.name) == len(prefix) + RANDOM_LETTERS:
                os.unlink(entry.path)


def require_writable(path: Path) -> None:
    """Checks that a file can be written at `path`, without leaving one. Call it before long computations."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BagcertError(f"{path} cannot be written: {error.strerror or error}") from None
