"""The log of a running evaluation: one line per batch, from which an interrupted run is resumed.

The first line describes the evaluation; only a run with the same description can be resumed. Lines are appended, so a
killed process leaves at most one incomplete line, which is dropped.
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
from bagcert.io.files import open_regular, read_input
from bagcert.nets.cost import update_with_weights
from bagcert.records import ImageRecord
from bagcert.threat import MAX_MASK_BYTES

FORMAT = 1
MAX_LINE_BYTES = 1 << 28  # limit on the length of a line, enough for a batch of 100,000 images with ten verdicts each


@dataclass(frozen=True)
class Batch:
    """The results of one forward pass.

    Attributes:
        records: records of consecutive images of the data, at least one.
        errors: (image number, message) of the unreadable images before the last of these.
        seconds: time of the forward pass, then of each rule and patch.
        resized: whether the size of some images differs from the network's input.
    """

    records: list[ImageRecord]
    errors: list[tuple[int, str]]
    seconds: list[float]
    resized: bool = True


_BATCH = TypeAdapter(Batch)


def log_path(path: Path) -> Path:
    """Returns the path of the log that belongs to the results file `path`."""
    return path.with_suffix(".records.jsonl.partial")


def run_identity(model: BagCert, images: ImageSet, placements: str | Path | None, **choices: Any) -> dict[str, Any]:
    """Describes everything that the records depend on: hashes of model, data and mask, and all options."""
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
        **({} if model.masks_per_axis is None else {"masks_per_axis": model.masks_per_axis}),
        **choices,
    }


def described_mask(placements: str | Path | None) -> dict[str, str] | None:
    """Returns the name and the hash of a mask image; None without one."""
    if placements is None:
        return None
    content = read_input(placements, MAX_MASK_BYTES, f"the mask {placements}")
    return {"file": Path(placements).name, "sha256": hashlib.sha256(content).hexdigest()}


class EvaluationLog:
    """The log file of an evaluation, to which batches are appended.

    Args:
        run: description of everything the records depend on, as plain data, including `patches` and `rules`.

    Attributes:
        batches: complete batches of an earlier run, in order.

    Raises:
        UsageError: the file exists without `resume`, or it belongs to another run.
        UnreadableError: the file is damaged other than by an incomplete last line.
        BagcertError: the file cannot be written.
    """

    def __init__(self, path: Path, run: dict[str, Any], resume: bool) -> None:
        self.path = path
        self.batches: list[Batch] = []
        header = json.loads(json.dumps({"format": FORMAT, **run}))
        self._head = _line(header)  # written with the first batch, so that a run that fails earlier leaves no file
        self._file: io.FileIO | None = None
        if os.path.lexists(path):
            if not resume:
                raise UsageError(
                    f"{path} holds an unfinished evaluation; go on with --resume, or remove it to start over"
                )
            self._open(self._read(header))

    def append(self, batch: Batch) -> None:
        """Appends a batch.

        Raises:
            BagcertError: the batch cannot be written. The file stays valid.
        """
        file = self._file or self._open(0)
        rest = self._head + _line(asdict(batch))
        self._head = b""
        try:
            while rest:  # a full disk may accept only a part
                rest = rest[file.write(rest) :]
        except OSError as error:
            raise self._unwritable(error) from None

    def close(self) -> None:
        """Closes the file. It is kept until the results of the evaluation are written."""
        if self._file:
            self._file.close()

    def _open(self, whole: int) -> io.FileIO:
        """Opens the file and truncates it to its complete lines."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered, so that closing does not retry a failed write.
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
        """Reads the batches of an earlier run; returns the length of the complete lines in bytes."""
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
        """Adds a batch of an earlier run, if it continues the earlier ones."""
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
