"""Append-only file of certificate records that can be resumed after an interruption at any time."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from bagcert.data.photo import Photo
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.io.files import require_writable
from bagcert.proofs.certificate_record import image_fields, model_fields, readout_fields, threat_fields
from bagcert.proofs.lines import from_line, lines, to_line
from bagcert.rules import get_rule
from bagcert.scores import require_sum
from bagcert.threat import PatchThreatModel, check_notation

_BEGINNING = b'{"record_version":'
_READOUT_BEGINNING = b'{"readout_version":'


class RecordFile:
    """Writes certificate records to a file; the records of one image are appended in a single unbuffered write.

    An interruption loses at most the records of the last image. With `resume`, the records of all complete images are
    kept, an incomplete end is removed, and `holds` tells which images are already done. For the same images, the
    finished file is byte-identical to that of an uninterrupted run. If the model pools regions by attention, the first
    line of the file is its readout.

    Args:
        path: path of the file; it must not exist unless `resume` is True.
        model: model of all records.
        rules, patches: requested rules and patches; the deployed ones if empty. There is one record per pair.
        environment: environment of all records.
        fit: resizing mode of all records.
        placements: mask of allowed placements for all patches.
        resume: continue an existing file.

    Attributes:
        kept: number of complete images in the file when it was opened.
        held: number of images that `holds` found in the file.
        changed: names passed to `holds` that the file contains only with different pixels.

    Raises:
        UsageError: the file exists already; it belongs to another model, readout, environment, rule or patch; a rule is
            unknown or needs sums over regions that the model does not have; a patch is not in the patch notation.
        UnreadableError: a line other than the last is damaged.
        BagcertError: the file cannot be written.
    """

    def __init__(
        self,
        path: Path,
        model: BagCert,
        rules: Sequence[str],
        patches: Sequence[str],
        environment: dict[str, Any],
        fit: str = "squash",
        placements: str | Path | None = None,
        resume: bool = False,
    ) -> None:
        self._asked = [(rule, patch) for rule in rules or (model.rule,) for patch in patches or (str(model.patch),)]
        readout = model.scorer.form.pooling
        for rule, patch in self._asked:  # check before creating the file
            if not get_rule(rule).pools:
                require_sum(readout, f"the rule {rule}", "use double-masking or detection")
            check_notation(patch)
        require_writable(path)
        if path.exists() and not resume and not (path.is_file() and path.stat().st_size == 0):
            raise UsageError(f"the file {path} already exists; use --resume to continue it or choose another --record")
        self.path = path
        self.environment = environment
        self.kept = 0
        self.held = 0
        self.changed: list[str] = []
        self._common = {
            "model": model_fields(model),
            "environment": environment,
            "fit": fit,
            "number of masks per axis": model.masks_per_axis,
        }
        self._readout = None if readout is None else readout_fields(readout)
        self._placements = placements
        self._done: Counter[tuple[str, str]] = Counter()
        self._names: set[str] = set()
        whole = self._read() if path.exists() else 0
        try:
            self._file: IO[bytes] = open(path, "ab", buffering=0)  # noqa: SIM115
            self._file.truncate(whole)
            if self._readout is not None and not whole:
                self._write(to_line(self._readout))
        except OSError as error:
            raise BagcertError(f"{path} cannot be written: {error.strerror or error}") from None

    def __enter__(self) -> "RecordFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def holds(self, photo: Photo) -> bool:
        """Whether the file contains the records of an image with this name and these pixels.

        Each call consumes one stored image, so that duplicate images are counted correctly.
        """
        if photo.source not in self._names:
            return False
        key = _key(photo.source, image_fields(photo))
        if key not in self._done:
            self.changed.append(photo.source)
            return False
        if not self._done[key]:
            return False
        self._done[key] -= 1
        self.held += 1
        return True

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Append all records of one image.

        Raises:
            BagcertError: the file cannot be written; `resume` removes partially written records.
        """
        try:
            self._write(b"".join(map(to_line, records)))
        except OSError as error:
            raise BagcertError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:  # a full disk can cause a partial write
            rest = rest[self._file.write(rest) :]

    def _read(self) -> int:
        """Count the complete images in `_done`; return the end offset of the last one, or of the readout."""
        group: list[dict[str, Any]] = []
        whole = position = 0
        for number, line in enumerate(lines(self.path), 1):
            if not line.endswith(b"\n"):
                expected = _READOUT_BEGINNING if self._readout is not None and number == 1 else _BEGINNING
                if line[: len(expected)] != expected[: len(line)]:
                    raise UnreadableError(
                        f"the last line of {self.path} is not the start of a record; is this a record file?"
                    )
                break
            try:
                record = from_line(line)
            except ValueError as error:
                raise UnreadableError(f"line {number} of {self.path} is not a valid record: {error}") from None
            if "readout_version" in record or (number == 1 and self._readout is not None):
                self._check_readout(record, number)
                position = whole = len(line)
                continue
            self._check(record, len(group), number)
            key = _key(record["source"], record["image"])
            if group and _key(group[0]["source"], group[0]["image"]) != key:
                raise UnreadableError(f"line {number} of {self.path} is of another image than the line before")
            group.append(record)
            position += len(line)
            if len(group) == len(self._asked):
                self._done[key] += 1
                self._names.add(record["source"])
                self.kept += 1
                whole = position
                group.clear()
        return whole

    def _check_readout(self, content: dict[str, Any], number: int) -> None:
        """Check that a readout is in the first line and belongs to this run's model."""
        if "readout_version" not in content:
            raise UsageError(f"line {number} of {self.path} is not a readout; the model pools regions by attention")
        if self._readout is None or number > 1 or content["sha256"] != self._readout["sha256"]:
            raise UsageError(f"line {number} of {self.path} is the readout of another model")

    def _check(self, record: dict[str, Any], index: int, number: int) -> None:
        """Check that a record is the one that this run would have written at this position."""
        if record["threat"]["allowed"] is not None and record["record_version"] == 1:
            raise UsageError(
                f"line {number} of {self.path} has record version 1, which left out smaller patches within a mask; "
                "choose another --record"
            )
        limit = record["geometry"].get("masks_per_axis")
        said = {**record, "fit": record["network"]["fit"], "number of masks per axis": limit}
        for name, here in self._common.items():
            if (there := said[name]) != here:
                raise UsageError(
                    f"line {number} of {self.path} has the {name} {_short(there)}; this run has {_short(here)}"
                )
        rule, patch = self._asked[index]
        size = record["image"]["size_px"]
        try:
            threat = threat_fields(PatchThreatModel.parse(patch, (int(size[0]), int(size[1])), self._placements))
        except (ValueError, TypeError, LookupError):  # the patch or the mask does not fit this image size
            threat = {}
        if record["rule"] != rule or record["threat"] != threat:
            there, here = f"{record['rule']} against {record['threat']['notation']}", f"{rule} against {patch}"
            same = " with other placements" if there == here else ""
            raise UsageError(f"line {number} of {self.path} is for {there}{same}; this run expects {here}")


def _key(source: str, image: dict[str, Any]) -> tuple[str, str]:
    return source, json.dumps(image, sort_keys=True)


def _short(value: Any) -> str:
    text = ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 300 else text[:300] + " ..."
