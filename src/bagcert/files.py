"""Writing files so that a crash, a full disk or a kill never leaves half of one."""

import os
import tempfile
from pathlib import Path

from bagcert.errors import BagcertError


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file whole or not at all, also across a crash.

    Raises:
        BagcertError: it cannot be written; nothing half-written is left.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
            temporary = Path(file.name)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise BagcertError(f"{path} cannot be written: {error.strerror or error}") from None
        raise


def require_writable(path: Path) -> None:
    """Tries whether a file can be written at `path`, and leaves nothing there: ask before long work, not after.

    Raises:
        BagcertError: it cannot.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise BagcertError(f"{path} cannot be written: {error.strerror or error}") from None
