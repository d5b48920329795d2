"""Files behind an address that fsspec knows: `s3://`, `gs://`, `hf://`, `https://`."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from bagcert.errors import BagcertError, UnreadableError, UsageError, shown
from bagcert.io.optional import require

EXTRAS = {"s3": ("s3fs", "s3"), "s3a": ("s3fs", "s3")}
"""What a protocol needs: the library and the extra that brings it."""


def is_address(spec: Any) -> bool:
    """`s3://bucket/train-*.tar` and the like."""
    return isinstance(spec, str) and "://" in spec


def file_system(address: str) -> tuple[Any, str]:
    """The file system of an address, kept by fsspec from call to call, and the name in it.

    Raises:
        UsageError: no address of a known kind, or a library for its kind is missing.
    """
    from fsspec.core import url_to_fs

    protocol = address.partition("://")[0]
    if protocol in EXTRAS:
        library, extra = EXTRAS[protocol]
        require(library, extra, f"reading from {protocol}://")
    try:
        return url_to_fs(address)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{address} cannot be opened: {shown(error)}") from None


@contextmanager
def translate_store_errors(address: str) -> Iterator[None]:
    """Says in a sentence why a store refuses; each has errors of its own.

    Raises:
        UnreadableError: there is no such file, or it may not be read.
        BagcertError: anything else, which may be different in a minute.
    """
    try:
        yield
    except BagcertError:
        raise
    except FileNotFoundError:
        raise UnreadableError(f"there is no {address}") from None
    except PermissionError as error:
        raise UnreadableError(f"{address} may not be read: {shown(error)}") from None
    except Exception as error:
        raise BagcertError(f"{address} cannot be reached: {shown(error) or type(error).__name__}") from None


def etag(details: Mapping[str, Any]) -> str:
    """What a store marks a version of a file with, and where it marks none, when it was changed; or nothing."""
    names = ("ETag", "etag", "md5Hash", "blob_id", "LastModified", "last_modified", "mtime")
    return str(next((details[name] for name in names if details.get(name)), "")).strip('"')
