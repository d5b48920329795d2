"""Reading and writing lines of a record file: strict JSON with a version and a hash. Format: docs/records.md."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bagcert.errors import UnreadableError
from bagcert.io.files import open_regular

RECORD_VERSIONS = (1, 2, 3)
"""Supported record versions.

Version 2 is used for restricted placements; version 1 records with a mask left out smaller patches within it. Version 3
is used for attention pooling: records contain `evidence` instead of `scores` and refer to a readout on a separate line.
"""
READOUT_VERSION = 1

MOST_LINE_BYTES = 2**26
FIELDS = {
    "record": "record_version source image network model geometry threat rule scores locality verdict environment "
    "sha256",
    "image": "size_px exif_orientation pixels_sha256",
    "network": "size_px fit pixels_sha256",
    "model": "name weights_sha256 head scale",
    "geometry": "rows cols",
    "threat": "notation shapes patches allowed",
    "scores": "shape low high data slack",
    "verdict": "prediction class_name certified margin worst_placement",
    "environment": "device backend dtype threads versions",
}
POOLING_FIELDS = {
    **{name: fields for name, fields in FIELDS.items() if name != "scores"},
    "record": FIELDS["record"].replace("scores", "evidence"),
    "evidence": "shape readout_sha256 products weights",
}
"""Fields of version 3 records."""
LIMIT = "masks_per_axis"
"""Field of the geometry of a model whose windows per axis are limited."""
READOUT_FIELDS = "readout_version values heads hidden classes first first_bias second skip bias sha256"

TEXTS = (("network", "fit"), ("environment", "dtype"), ("verdict", "class_name"), ("threat", "notation"))


def seal(record: dict[str, Any]) -> dict[str, Any]:
    """Add the SHA-256 of the canonical JSON of a record: sorted keys, no spaces, ASCII, without the `sha256` field."""
    body = {name: value for name, value in record.items() if name != "sha256"}
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return {**body, "sha256": hashlib.sha256(canonical.encode("ascii")).hexdigest()}


def to_line(record: dict[str, Any]) -> bytes:
    """Serialize a record or readout to one line of JSONL."""
    return (json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n").encode("ascii")


def from_line(line: bytes) -> dict[str, Any]:
    """Parse a line into a record or a readout and check its form, but not its claims.

    A readout has the field `readout_version` and applies to the records after it.

    Raises:
        ValueError: the line is longer than 64 MiB, is not JSON, has a duplicate key, NaN, an unknown version, missing
            or unknown fields, or a record whose SHA-256 does not match its content.
    """
    content = _object(line)
    if "readout_version" in content:
        _check_readout(content)
    else:
        _check_record(content)
    return content


def _object(line: bytes) -> dict[str, Any]:
    if len(line) > MOST_LINE_BYTES:
        raise ValueError(f"it has more than {MOST_LINE_BYTES:,} bytes")
    try:
        content = json.loads(line.decode(), object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON, or is cut short ({error})") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text ({error.reason} at byte {error.start})") from None
    if not isinstance(content, dict):
        raise ValueError("it is not a JSON object")
    return content


def _check_readout(readout: dict[str, Any]) -> None:
    version = readout["readout_version"]
    if version != READOUT_VERSION or type(version) is not int:
        raise ValueError(f"its readout_version is {version!r}; this reads {READOUT_VERSION}")
    _check_fields(readout, READOUT_FIELDS, "it")
    if not isinstance(readout["sha256"], str):
        raise ValueError("its sha256 is not text")


def _check_record(record: dict[str, Any]) -> None:
    if "record_version" not in record:
        raise ValueError("it has no record_version, so it is not a certificate record")
    version = record["record_version"]
    if version not in RECORD_VERSIONS or type(version) is not int:
        raise ValueError(f"its record_version is {version!r}; this reads 1, 2 and 3")
    for name, fields in (FIELDS if version < 3 else POOLING_FIELDS).items():
        if name == "record":
            _check_fields(record, fields, "it")
        else:
            limited = name == "geometry" and isinstance(record[name], dict) and LIMIT in record[name]
            _check_fields(record[name], f"{fields} {LIMIT}" if limited else fields, f"its {name}")
    for name, inner in TEXTS:
        if not isinstance(record[name][inner], str):
            raise ValueError(f"its {name}.{inner} is not text")
    if not isinstance(record["source"], str) or not isinstance(record["environment"]["versions"], dict):
        raise ValueError("its source is not text, or its environment.versions are not an object")
    if version == 3 and not isinstance(record["evidence"]["readout_sha256"], str):
        raise ValueError("its evidence.readout_sha256 is not text")
    try:
        same = seal(record)["sha256"] == record["sha256"]
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not same:
        raise ValueError("its SHA-256 does not match its content; it was damaged or altered")


def _check_fields(part: Any, fields: str, what: str) -> None:
    if not isinstance(part, dict):
        raise ValueError(f"{what} is not a JSON object")
    if lacking := sorted(set(fields.split()) - part.keys()):
        raise ValueError(f"{what} lacks {lacking[0]!r}")
    if unknown := sorted(part.keys() - set(fields.split())):
        raise ValueError(f"{what} has the unknown field {unknown[0]!r}")


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file with their line ends. Stops after a line longer than the limit, which is truncated.

    Raises:
        UnreadableError: the file cannot be read.
    """
    try:
        with open_regular(path) as file:
            while line := file.readline(MOST_LINE_BYTES + 1):
                yield line
                if len(line) > MOST_LINE_BYTES:
                    return
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} occurs twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")
