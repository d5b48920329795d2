"""The result folder of a run over many images: a description of the run, and one Parquet file per finished part."""

import hashlib
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bagcert.bulk.parts import Part, Work
from bagcert.bulk.worker import CertifyJob
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.io.files import RANDOM_LETTERS, open_regular, read_input, write_atomically
from bagcert.records import wilson_interval
from bagcert.threat import MAX_MASK_BYTES

RUN = "_run.json"  # the underscore makes readers of Parquet folders ignore the file
OLD_RUN = "run.json"  # its name in an older version
RUN_VERSION = 1
MAX_RUN_BYTES = 1 << 24
KEY = b"bagcert"


def run_identity(model: BagCert, job: CertifyJob, work: Work, **choices: Any) -> dict[str, Any]:
    """Describes everything that the rows of a run depend on: hashes of model, data and mask, and all options."""
    mask = None
    if job.placements:
        content = read_input(job.placements, MAX_MASK_BYTES, f"the mask {job.placements}")
        mask = hashlib.sha256(content).hexdigest()
    return {
        "schema_version": RUN_VERSION,
        "model": model.name,
        "weights_sha256": job.weights_sha256,
        "class_names": list(model.class_names),
        "patches": list(job.patches),
        "rules": list(job.rules),
        "placements_sha256": mask,
        "fit": job.fit,
        "dtype": job.dtype,
        "portable": job.portable,
        "backend": job.backend,
        "device": job.device,
        "batch_size": job.batch_size,
        **({} if model.masks_per_axis is None else {"masks_per_axis": model.masks_per_axis}),
        **choices,
        "images": len(work),
        "parts": len(work.parts),
        "label_names": list(work.class_names),
        "data_sha256": work.fingerprint,
    }


class ResultFolder:
    """The result folder of a run. Only one process may write to it.

    Args:
        folder: a new or empty folder, or the folder of the same run.

    Raises:
        UsageError: the folder holds another run or other files.
        BagcertError: the folder cannot be written.
    """

    def __init__(self, folder: Path, run: dict[str, Any]) -> None:
        self.folder = folder
        self.run = run
        self._mark = _mark(run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            names = [entry.name for entry in folder.iterdir()]
            if OLD_RUN in names and RUN not in names:
                (folder / OLD_RUN).rename(folder / RUN)
                names = [RUN if name == OLD_RUN else name for name in names]
        except OSError as error:
            raise BagcertError(f"the folder {folder} cannot be used: {error.strerror or error}") from None
        if RUN in names:
            there = read_run(folder)
            for name in (*run, *there):  # name the first difference: later ones may follow from it
                if there.get(name) != run.get(name):
                    raise UsageError(
                        f"{folder} holds the results of another run: its {_words(name)} "
                        f"{_short(there.get(name))}, here {_short(run.get(name))}; choose another --out"
                    )
        elif any(not name.startswith(".") for name in names):
            raise UsageError(f"the folder {folder} holds other files and no {RUN}; choose another --out")
        else:
            write_atomically(folder / RUN, (json.dumps(run, indent=2) + "\n").encode())
        for name in names:  # left by a run that was killed while writing
            stem, _, letters = name.rpartition(".")
            if stem.startswith(".part-") and stem.endswith(".parquet") and len(letters) == RANDOM_LETTERS:
                (folder / name).unlink(missing_ok=True)

    def path(self, part: Part) -> Path:
        """Returns the file for the rows of a part."""
        return self.folder / _file_name(part.number)

    def holds(self, part: Part) -> bool:
        """Returns whether the folder holds all rows of this part of this run."""
        try:
            with open_regular(self.path(part)) as raw, pq.ParquetFile(raw) as file:
                if not _is_of(file, self._mark) or file.metadata.num_rows != len(part):
                    return False
                return file.read(["number"])["number"].to_pylist() == _numbers(part)
        except (OSError, KeyError, pa.ArrowException):
            return False

    def write(self, part: Part, table: pa.Table) -> None:
        """Writes the rows of a part atomically.

        Raises:
            BagcertError: the rows cannot be written, or are not exactly one per image of the part.
        """
        numbers = table["number"].to_pylist()
        if numbers != _numbers(part):
            raise BagcertError(f"part {part.number} came back with {len(numbers)} rows that are not its {len(part)}")
        buffer = io.BytesIO()
        pq.write_table(
            table.replace_schema_metadata({KEY: self._mark}), buffer, compression="zstd", write_page_checksum=True
        )
        write_atomically(self.path(part), buffer.getvalue())


def read_run(folder: Path) -> dict[str, Any]:
    """Reads the description of a run.

    Raises:
        UnreadableError: there is no run in the folder, or its description is damaged.
    """
    if not (folder / RUN).exists() and (folder / OLD_RUN).exists():
        return _read(folder / OLD_RUN)
    return _read(folder / RUN)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(read_input(path, MAX_RUN_BYTES))
    except (ValueError, RecursionError):
        raise UnreadableError(f"{path} is damaged; it is not the description of a run") from None
    if not isinstance(found, dict) or found.get("schema_version") != RUN_VERSION or type(found.get("parts")) is not int:
        raise UnreadableError(f"{path} is no description of a run that this version knows")
    return found


def read_rows(folder: Path, columns: Sequence[str] | None = None) -> Iterator[pa.Table]:
    """Iterates over the rows of a run, part by part, in the order of the data. Skips other files in the folder.

    Raises:
        UnreadableError: as for `read_run`, or a file of rows is damaged or out of sequence.
    """
    run = read_run(folder)
    mark, last = _mark(run), -1
    for path in sorted(folder.glob("part-*.parquet"), key=lambda path: (len(path.name), path.name)):
        digits = path.stem.removeprefix("part-")
        if not digits.isdecimal() or path.name != _file_name(int(digits)) or int(digits) >= run["parts"]:
            continue
        try:
            with open_regular(path) as raw, pq.ParquetFile(raw, page_checksum_verification=True) as file:
                if not _is_of(file, mark):
                    continue
                numbers = file.read(["number"])["number"].to_pylist()
                table = file.read(columns)
        except (OSError, KeyError, pa.ArrowException) as error:
            raise UnreadableError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from None
        if any(after <= before for before, after in pairwise([last, *numbers])):
            raise UnreadableError(f"{path} holds images that do not follow those of the parts before it")
        last = max([last, *numbers])
        yield table


@dataclass
class PatchSummary:
    """Counts for one rule and one patch. The accuracies are None without labels."""

    rule: str
    patch: str
    certified: int = 0
    certified_share: float = 0.0
    certified_interval95: list[float] | None = None
    clean_accuracy: float | None = None
    certified_accuracy: float | None = None


def summarize(folder: Path) -> dict[str, Any]:
    """Summarizes a run from its files.

    Shares are relative to the images without an error. Accuracies are computed if every image has a label, and the data
    has the model's class names or none.
    """
    run = read_run(folder)
    rows = [PatchSummary(rule, patch) for rule in run["rules"] for patch in run["patches"]]
    right, proved = [0] * len(rows), [0] * len(rows)
    images = errors = labeled = 0
    for table in read_rows(folder, ["label", "error", "results"]):
        images += len(table)
        for label, error, results in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
            if error is not None:
                errors += 1
                continue
            labeled += label is not None
            for column, result in enumerate(results):
                good = result["prediction"] == label
                rows[column].certified += result["certified"]
                right[column] += good
                proved[column] += good and result["certified"]
    count = images - errors
    same_names = run["label_names"] in ([], run["class_names"])
    for column, row in enumerate(rows if count else ()):
        row.certified_share = row.certified / count
        row.certified_interval95 = wilson_interval(row.certified, count)
        if labeled == count and same_names:
            row.clean_accuracy, row.certified_accuracy = right[column] / count, proved[column] / count
    return {
        "schema_version": RUN_VERSION,
        "model": run["model"],
        "weights_sha256": run["weights_sha256"],
        "data": run["data"],
        "images": images,
        "missing": run["images"] - images,
        "errors": errors,
        "results": [asdict(row) for row in rows],
    }


def _mark(run: dict[str, Any]) -> bytes:
    """Returns the metadata that identifies the parts of a run."""
    return hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest().encode()


def _is_of(file: pq.ParquetFile, mark: bytes) -> bool:
    return (file.schema_arrow.metadata or {}).get(KEY) == mark


def _file_name(number: int) -> str:
    return f"part-{number:08}.parquet"


def _numbers(part: Part) -> list[int]:
    return list(range(part.first, part.first + len(part)))


def _words(name: str) -> str:
    return {"data_sha256": "data has the hash", "data": "data is"}.get(name, f"{name.replace('_', ' ')} is")


def _short(value: Any) -> str:
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) <= 100 else text[:100] + " ..."
