"""A file of certificate records that a kill at any moment leaves fit to be resumed."""

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
from bagcert.proofs.lines import from_line, lines, to_line
from bagcert.proofs.record import image_fields, model_fields, readout_fields, threat_fields
from bagcert.rules import get_rule
from bagcert.scores import require_sum
from bagcert.threat import PatchThreatModel, check_notation

_BEGINNING = b'{"record_version":'
_READOUT_BEGINNING = b'{"readout_version":'


class RecordFile:
    """Appends the records of one image at a time, in one write, flushed.

    What a kill cuts off is at most the end of the last image: `resume` keeps the records of all whole images, drops
    the rest, and `holds` says which need not be done again. The finished file is the same, byte for byte, as that of
    a run never interrupted, if the images are the same. If the model pools regions by attention, the first line is its
    readout.

    Args:
        path: the file; without `resume` there must be none.
        model, fit, environment: the same in every record.
        rules, patches: as asked for, at least one each; `placements` restricts all patches.
        resume: go on with what is there.

    Attributes:
        kept: how many images the file held from the beginning.
        held: how many of them `holds` was asked for.
        changed: the names that it was asked for and that the file has with other pixels only.

    Raises:
        UsageError: there is a file already, or it holds another model, readout, environment, rule or patch; an unknown
            rule, one that needs sums over regions where the model has none, or a patch outside the notation.
        UnreadableError: a line other than the last is damaged.
        BagcertError: it cannot be written.
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
        for rule, patch in self._asked:  # before there is a file
            if not get_rule(rule).pools:
                require_sum(readout, f"the rule {rule}", "use double-masking or detection")
            check_notation(patch)
        require_writable(path)
        if path.exists() and not resume and not (path.is_file() and path.stat().st_size == 0):
            raise UsageError(f"there is a file {path} already; go on with --resume or choose another --record")
        self.path = path
        self.environment = environment
        self.kept = 0
        self.held = 0
        self.changed: list[str] = []
        self._common = {"model": model_fields(model), "environment": environment, "fit": fit}
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
        """Is an image of this name and these very pixels done? Each call counts for one of them."""
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
        """Adds all records of one image.

        Raises:
            BagcertError: they cannot be written; `resume` drops what was.
        """
        try:
            self._write(b"".join(map(to_line, records)))
        except OSError as error:
            raise BagcertError(f"{self.path} cannot be written: {error.strerror or error}") from None

    def _write(self, content: bytes) -> None:
        rest = memoryview(content)
        while rest:  # a disk that fills up takes a part
            rest = rest[self._file.write(rest) :]

    def _read(self) -> int:
        """Counts the whole images into `_done`; returns where the last of them, or the readout, ends."""
        group: list[dict[str, Any]] = []
        whole = position = 0
        for number, line in enumerate(lines(self.path), 1):
            if not line.endswith(b"\n"):
                expected = _READOUT_BEGINNING if self._readout is not None and number == 1 else _BEGINNING
                if line[: len(expected)] != expected[: len(line)]:
                    raise UnreadableError(
                        f"the last line of {self.path} is no beginning of a record; is it another file?"
                    )
                break
            try:
                record = from_line(line)
            except ValueError as error:
                raise UnreadableError(f"line {number} of {self.path} is no whole record: {error}") from None
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
        """Refuses what is not this run's readout in the first line."""
        if "readout_version" not in content:
            raise UsageError(f"line {number} of {self.path} is no readout; this run's model pools regions by attention")
        if self._readout is None or number > 1 or content["sha256"] != self._readout["sha256"]:
            raise UsageError(f"line {number} of {self.path} is a readout that is not of this run's model")

    def _check(self, record: dict[str, Any], index: int, number: int) -> None:
        """Is this what the run would have written there?"""
        if record["threat"]["allowed"] is not None and record["record_version"] == 1:
            raise UsageError(
                f"line {number} of {self.path} is of version 1, which left out smaller patches within a mask; choose "
                "another --record"
            )
        for name, here in self._common.items():
            there = record["network"]["fit"] if name == "fit" else record[name]
            if there != here:
                raise UsageError(
                    f"line {number} of {self.path} has the {name} {_short(there)}, this run {_short(here)}"
                )
        rule, patch = self._asked[index]
        size = record["image"]["size_px"]
        try:
            threat = threat_fields(PatchThreatModel.parse(patch, (int(size[0]), int(size[1])), self._placements))
        except (ValueError, TypeError, LookupError):  # a size that this patch or mask does not fit
            threat = {}
        if record["rule"] != rule or record["threat"] != threat:
            there, here = f"{record['rule']} against {record['threat']['notation']}", f"{rule} against {patch}"
            same = " with other placements" if there == here else ""
            raise UsageError(f"line {number} of {self.path} is of {there}{same}, this run has {here} there")


def _key(source: str, image: dict[str, Any]) -> tuple[str, str]:
    return source, json.dumps(image, sort_keys=True)


def _short(value: Any) -> str:
    text = ", ".join(f"{name} {each}" for name, each in value.items()) if isinstance(value, dict) else str(value)
    return text if len(text) <= 300 else text[:300] + " ..."
