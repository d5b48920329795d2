"""Readers of what `bagcert evaluate --out` writes: results, and records with one line per image."""

from itertools import pairwise
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bagcert.errors import UnreadableError, sanitize
from bagcert.io.files import open_regular, read_input
from bagcert.records import SCHEMA_VERSION, ImageRecord, RunInfo

RESULTS = "results.json"
"""The results of a model, next to its weights."""
MAX_LINE_BYTES = 1 << 24  # limit on the length of a line, enough for about 50,000 verdicts on one image

_RECORD, _RUN = TypeAdapter(ImageRecord), TypeAdapter(RunInfo)


def read_results(path: Path, limit_bytes: int) -> RunInfo:
    """Reads a results file of at most `limit_bytes`. It may hold no rows.

    Raises:
        UnreadableError: the file cannot be read, or is not what `bagcert evaluate --out` writes.
    """
    text = read_input(path, limit_bytes)
    try:
        run = _RUN.validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = sanitize(".".join(map(str, first["loc"])) or "the file")
        raise UnreadableError(
            f"{path} is not the JSON of an evaluation: {where}: {sanitize(first['msg'].lower())}"
        ) from None
    if run.schema_version != SCHEMA_VERSION:
        raise UnreadableError(f"{path} has schema version {run.schema_version}, expected {SCHEMA_VERSION}")
    for row in run.results:
        intervals = [row.interval95.get(name, []) for name in ("clean_accuracy", "certified_accuracy")]
        if any(len(bounds) != 2 for bounds in intervals):
            raise UnreadableError(f"{path}: the row against {sanitize(row.threat)} has no 95 % intervals")
        shares = (row.clean_accuracy, row.certified_accuracy, *intervals[0], *intervals[1])
        if not all(0 <= share <= 1 for share in shares):  # NaN is not, either
            raise UnreadableError(f"{path}: the row against {sanitize(row.threat)} has shares outside 0 to 1")
        if row.patch is not None and (len(row.patch) != 2 or min(row.patch) < 1):
            raise UnreadableError(f"{path}: a patch is [height, width], got {sanitize(row.patch)}")
    return run


def read_image_records(path: Path) -> list[ImageRecord]:
    """Reads a `*.records.jsonl` file, in the order of the data set.

    Raises:
        UnreadableError: the file cannot be read, a line is damaged, or its images are out of order.
    """
    records: list[ImageRecord] = []
    try:
        with open_regular(path) as file:
            while line := file.readline(MAX_LINE_BYTES):
                records.append(_RECORD.validate_json(line, strict=True))
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValidationError, RecursionError):
        raise UnreadableError(f"line {len(records) + 1} of {path} is not the record of an image") from None
    if not records:
        raise UnreadableError(f"{path} holds no records")
    asked = [[(row.rule, row.threat) for row in record.results] for record in records]
    if any(other != asked[0] for other in asked) or not asked[0]:
        raise UnreadableError(f"the records in {path} do not all answer the same questions")
    if any(a.index >= b.index for a, b in pairwise(records)):
        raise UnreadableError(f"the images of {path} do not follow one another")
    return records
