"""The records of an evaluation while it runs: a line per batch, so that a killed run goes on after the last whole one.

The first line says what is evaluated; a run goes on only with the same. Lines are appended, so a kill leaves
whole ones and at most one without its end, which is dropped.
"""

import hashlib
import io
import json
import os
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from bagcert.data.image_set import ImageSet
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.io.files import open_regular, read_regular
from bagcert.nets.cost import update_with_weights
from bagcert.records import ImageRecord
from bagcert.threat import MAX_MASK_BYTES

FORMAT = 1
MAX_LINE_BYTES = 1 << 28
"""A batch of 100,000 images with ten verdicts each; a longer line is no batch."""


@dataclass(frozen=True)
class Batch:
    """What one forward pass gave.

    Attributes:
        records: of consecutive images of the data, at least one.
        errors: (number, sentence) of the images before the last of these that could not be read.
        seconds: of the forward pass, then of each rule against each patch.
        resized: whether some of the images have another size than the network's input.
    """

    records: list[ImageRecord]
    errors: list[tuple[int, str]]
    seconds: list[float]
    resized: bool = True


_BATCH = TypeAdapter(Batch)


def log_path(path: Path) -> Path:
    """Where the records of an evaluation grow while it runs, for results that go to `path`."""
    return path.with_suffix(".records.jsonl.partial")


def run_identity(model: BagCert, images: ImageSet, placements: str | Path | None, **choices: Any) -> dict[str, Any]:
    """All that the records of an evaluation depend on: model, data and mask by their hashes, choices as they are.

    Raises:
        UnreadableError: the mask of allowed placements cannot be read.
    """
    mask = described_mask(placements)
    weights = hashlib.sha256()
    update_with_weights(weights, model.scorer)
    return {
        "model": model.name,
        "weights": weights.hexdigest(),
        "head": [model.scorer.head, model.scorer.scale, model.scorer.tolerance, str(model.scorer.autocast_dtype)],
        "classes": list(model.class_names),
        "data": images.name,
        "split": images.split,
        "images": len(images),
        "fingerprint": images.fingerprint(),
        "placements": "" if mask is None else mask["sha256"],
        **choices,
    }


def described_mask(placements: str | Path | None) -> dict[str, str] | None:
    """The name and the hash of a mask image; None without one.

    Raises:
        UnreadableError: it cannot be read.
    """
    if placements is None:
        return None
    try:
        content = read_regular(placements, MAX_MASK_BYTES)
    except OSError as error:
        raise UnreadableError(f"the mask {placements} cannot be read: {error.strerror or error}") from None
    return {"file": Path(placements).name, "sha256": hashlib.sha256(content).hexdigest()}


class EvaluationLog:
    """A file of batches that grows while an evaluation runs.

    Args:
        path: of the file.
        run: what is evaluated, and how: all that the records depend on, as plain data; `patches` and `rules` among it.
        resume: go on with a file that is there, if one is.

    Attributes:
        batches: those of an earlier run, whole and in order.

    Raises:
        UsageError: a file is there and `resume` was not asked for, or it belongs to another run.
        UnreadableError: the file is damaged otherwise than by a missing end.
        BagcertError: it cannot be written.
    """

    def __init__(self, path: Path, run: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.batches: list[Batch] = []
        header = json.loads(json.dumps({"format": FORMAT, **run}))
        self._head = _line(header)  # goes with the first batch: a run that fails before it leaves no file
        self._file: io.FileIO | None = None
        if os.path.lexists(path):
            if not resume:
                raise UsageError(
                    f"{path} holds an unfinished evaluation; go on with --resume, or remove it to start over"
                )
            self._open(self._read(header))

    def append(self, batch: Batch) -> None:
        """Adds a batch.

        Raises:
            BagcertError: it cannot be written; what is there stays whole.
        """
        file = self._file or self._open(0)
        rest = self._head + _line(asdict(batch))
        self._head = b""
        try:
            while rest:  # a disk that fills up takes a part
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Ends the writing; the file stays until the evaluation has been written as a whole."""
        if self._file:
            self._file.close()

    def _open(self, whole: int) -> io.FileIO:
        """The file, cut to its whole lines."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: what could not be written must not be tried again on closing.
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  # closed by `close`
            self._file.truncate(whole)
        except OSError as error:
            raise self._unwritable(error) from None
        if whole:
            self._head = b""
        return self._file

    def _unwritable(self, error: OSError) -> BagcertError:
        return BagcertError(f"{self.path} cannot be written: {error.strerror or error}")

    def _read(self, header: dict[str, Any]) -> int:
        """Takes the batches of an earlier run; gives the length of the whole lines in bytes."""
        whole, number = 0, 0
        try:
            with open_regular(self.path) as file:
                while (line := file.readline(MAX_LINE_BYTES)).endswith(b"\n"):
                    if number == 0:
                        self._check_run(json.loads(line), header)
                    else:
                        self._take(_BATCH.validate_json(line, strict=True), header)
                    whole, number = whole + len(line), number + 1
                if len(line) == MAX_LINE_BYTES:
                    raise ValueError("it is too long")
        except UsageError:
            raise
        except OSError as error:
            raise UnreadableError(f"{self.path} cannot be read: {error.strerror or error}") from None
        except (ValueError, RecursionError) as error:
            reason = "it is not a batch of records" if isinstance(error, ValidationError) else str(error)
            raise UnreadableError(
                f"line {number + 1} of {self.path} is damaged, {reason}; remove the file to start over"
            ) from None
        return whole

    def _check_run(self, found: Any, expected: dict[str, Any]) -> None:
        if not isinstance(found, dict):
            raise ValueError("it does not say what was evaluated")
        for key in expected:
            if key not in found or found[key] != expected[key]:
                raise UsageError(
                    f"{self.path} was started with another value of {key}; give what it was started with, or remove "
                    "it to start over"
                )

    def _take(self, batch: Batch, header: dict[str, Any]) -> None:
        """Adds a batch if it may follow those before it."""
        last = self.batches[-1].records[-1].index if self.batches else -1
        numbers = [record.index for record in batch.records]
        if not numbers or not all(a < b for a, b in pairwise([last, *numbers, header["images"]])):
            raise ValueError("its images do not follow those before it")
        verdicts = len(header["patches"]) * len(header["rules"])
        if len(batch.seconds) != verdicts + 1 or any(len(record.results) != verdicts for record in batch.records):
            raise ValueError("it has other verdicts than were asked for")
        self.batches.append(batch)


def _line(value: dict[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode() + b"\n"
