"""Reader of the records of an evaluation, one line per image, as written by `bagcert evaluate --out`."""

from itertools import pairwise
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from bagcert.errors import UnreadableError
from bagcert.io.files import open_regular
from bagcert.records import ImageRecord

MAX_LINE_BYTES = 1 << 24  # limit on the length of a line, enough for about 50,000 verdicts on one image

_RECORD = TypeAdapter(ImageRecord)


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
