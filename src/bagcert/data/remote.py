"""Remote files through fsspec: `s3://`, `gs://`, `hf://`, `https://`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bagcert.errors import BagcertError, UnreadableError, UsageError, sanitize
from bagcert.io.optional import require

EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}  # protocol -> (library, extra that installs it)


def is_address(spec: Any) -> bool:
    """Returns whether a path is a URL, such as `s3://bucket/train-*.tar`."""
    return isinstance(spec, str) and "://" in spec


def file_system(address: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL (cached by fsspec) and the path in it."""
    from fsspec.core import url_to_fs

    protocol = address.partition("://")[0]
    if protocol in EXTRAS:
        library, extra = EXTRAS[protocol]
        require(library, extra, f"reading from {protocol}://")
    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{address} cannot be opened: {sanitize(error)}") from None


@contextmanager
def translate_store_errors(address: str) -> Iterator[None]:
    """Context manager that converts the errors of a store to one-sentence messages.

    Raises:
        UnreadableError: there is no such file, or no permission to read it.
        BagcertError: any other error, which may be temporary.
    """
    try:
        yield
    except BagcertError:
        raise
    except FileNotFoundError:
        raise UnreadableError(f"there is no {address}") from None
    except PermissionError as error:
        raise UnreadableError(f"{address} may not be read: {sanitize(error)}") from None
    except Exception as error:
        raise BagcertError(f"{address} cannot be reached: {sanitize(error) or type(error).__name__}") from None


def etag(details: Mapping[str, Any]) -> str:
    """Returns the version mark of a remote file (entity tag), else its modification time, else an empty string."""
    names = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "mtime")
    return str(next((details[name] for name in names if details.get(name)), "")).strip('"')
