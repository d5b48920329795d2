"""The data of a report: evaluations and training runs read from files, and statistics computed from them."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bagcert.errors import UnreadableError, UsageError, sanitize
from bagcert.evaluation.gallery_file import Gallery, gallery_path, read_gallery
from bagcert.evaluation.results_files import RESULTS, read_image_records, read_results
from bagcert.io.files import read_input
from bagcert.records import ImageRecord, RunInfo

CONFIG, METRICS = "config.json", "metrics.jsonl"
MAX_JSON_BYTES = 1 << 26
MAX_METRICS_BYTES = 1 << 26
KINDS = ("right and certified", "right, not certified", "wrong")


def patch_title(patches: Iterable[str]) -> str:
    """Returns the axis title for patches, with the unit if all share it.

    >>> patch_title(["5", "2x8"]), patch_title(["5", "1%"])
    ('patch, px', 'patch')
    """
    return "patch" if any("%" in patch for patch in patches) else "patch, px"


@dataclass(frozen=True)
class Run:
    """One evaluation: its results, and its records and gallery if they exist."""

    path: Path
    info: RunInfo
    records: list[ImageRecord] | None = None
    gallery: Gallery | None = None

    @property
    def headline(self) -> int:
        """Returns the index of the representative row, see `headline_column`."""
        rows = self.info.results
        asked = [[row.rule, row.threat] for row in rows]
        if self.info.deployed in asked:
            return asked.index(self.info.deployed)
        return next((column for column, row in enumerate(rows) if row.certified_share > 0), 0)

    def class_name(self, index: int) -> str:
        """Returns the name of a class from the gallery; without a gallery, its number."""
        names = self.gallery.class_names if self.gallery else ()
        return names[index] if index < len(names) else str(index)


@dataclass(frozen=True)
class Training:
    """A training run: its name, recipe, and a dictionary of metrics for each validation."""

    path: Path
    name: str
    recipe: dict[str, Any]
    points: list[dict[str, float]]

    def curve(self, key: str, share: bool = False) -> list[tuple[float, float]]:
        """Returns (epoch, value) of a metric for all epochs that have it; in percent with `share`."""
        return [
            (point["epoch"], point[key] * (100 if share else 1))
            for point in self.points
            if "epoch" in point and key in point
        ]


@dataclass(frozen=True)
class Inputs:
    """The inputs of a report, in the given order."""

    runs: list[Run]
    trainings: list[Training]


def read_inputs(paths: Sequence[Path]) -> Inputs:
    """Reads results files, and the metrics and `results.json` of run or model folders.

    Raises:
        UsageError: no path, or a folder that holds neither metrics nor results.
        UnreadableError: a file is missing, damaged or not what it should be.
    """
    if not paths:
        raise UsageError("a report needs results: a JSON file of bagcert evaluate --out, or a run folder")
    runs, trainings = [], []
    for path in paths:
        if not path.is_dir():
            runs.append(read_run(path))
            continue
        has_metrics, has_results = (path / METRICS).exists(), (path / RESULTS).exists()
        if not has_metrics and not has_results:
            raise UsageError(f"the folder {path} holds neither {METRICS} nor {RESULTS}; it is no run or model folder")
        if has_metrics:
            trainings.append(read_training(path))
        if has_results:
            runs.append(read_run(path / RESULTS))
    return Inputs(runs, trainings)


def read_run(path: Path) -> Run:
    """Reads the results of an evaluation, and its records and gallery if they exist."""
    info = read_results(path, MAX_JSON_BYTES)
    if not info.results or info.images < 1:
        raise UnreadableError(f"{path} holds no results")
    beside = path.with_suffix(".records.jsonl")
    records = read_image_records(beside) if beside.exists() else None
    gallery = read_gallery(gallery_path(path)) if records and gallery_path(path).exists() else None
    rows = [(row.rule, row.threat) for row in info.results]
    if records is not None:
        if len(records) != info.images or [(row.rule, row.threat) for row in records[0].results] != rows:
            raise UnreadableError(f"{beside} does not belong to {path}: it has other images, rules or patches")
        if any(min(record.label, *(row.prediction for row in record.results)) < 0 for record in records):
            raise UnreadableError(f"{beside} has a class below 0")
    if gallery is not None:
        known = {record.index for record in records or ()}
        if any(picture.index not in known for picture in gallery.pictures):
            raise UnreadableError(f"{gallery_path(path)} does not belong to {path}: it shows an image without a record")
    return Run(path, info, records, gallery)


def read_training(folder: Path) -> Training:
    """Reads the metrics of a run folder, and name and recipe from its config if training is finished."""
    path = folder / METRICS
    points = []
    for number, line in enumerate(read_input(path, MAX_METRICS_BYTES).splitlines(), 1):
        point = _json(line, f"line {number} of {path}")
        if not isinstance(point, dict):
            raise UnreadableError(f"line {number} of {path} is not an object of numbers")
        points.append({name: float(value) for name, value in point.items() if _is_finite(value)})
    name, recipe = folder.name, {}
    if (folder / CONFIG).exists():
        config = _json(read_input(folder / CONFIG, MAX_JSON_BYTES), str(folder / CONFIG))
        if not isinstance(config, dict) or not isinstance(config.get("name", name), str):
            raise UnreadableError(f"{folder / CONFIG} is not a model config")
        recipe = config.get("recipe", {})
        name = config.get("name", name)
    return Training(folder, name, recipe if isinstance(recipe, dict) else {}, points)


def per_class(run: Run, column: int) -> list[dict[str, Any]]:
    """Counts for each class the images, the correct ones, and the correct and certified ones, in one row."""
    found: dict[int, list[int]] = {}
    for record in run.records or ():
        verdict, counts = record.results[column], found.setdefault(record.label, [0, 0, 0])
        right = verdict.prediction == record.label
        counts[0] += 1
        counts[1] += right
        counts[2] += right and verdict.certified
    names = ("images", "clean", "certified")
    return [{"label": label, **dict(zip(names, found[label], strict=True))} for label in sorted(found)]


def confusion(run: Run, column: int) -> tuple[list[int], np.ndarray]:
    """Computes the confusion matrix: the classes that occur, and the counts [label, prediction]."""
    pairs = [(record.label, record.results[column].prediction) for record in run.records or ()]
    classes = sorted({each for pair in pairs for each in pair})
    place = {label: i for i, label in enumerate(classes)}
    counts = np.zeros((len(classes), len(classes)), dtype=np.int64)
    for label, prediction in pairs:
        counts[place[label], place[prediction]] += 1
    return classes, counts


def kind_of(record: ImageRecord, column: int) -> str:
    """Returns the kind of an image in one row, one of `KINDS`."""
    verdict = record.results[column]
    if verdict.prediction != record.label:
        return KINDS[2]
    return KINDS[0] if verdict.certified else KINDS[1]


def margins(run: Run, column: int, bins: int = 30) -> tuple[list[float], dict[str, list[int]]]:
    """Computes a histogram of the margins for each of `KINDS`: bin edges (one of which is 0) and counts."""
    values: dict[str, list[int]] = {kind: [] for kind in KINDS}
    for record in run.records or ():
        values[kind_of(record, column)].append(record.results[column].margin)
    every = [margin for group in values.values() for margin in group]
    if not every:
        return [0.0, 1.0], {kind: [0] for kind in KINDS}
    width = max(1, -(-(max(every) - min(every) + 1) // bins))
    low, high = min(0, min(every)) // width, max(0, max(every)) // width + 1
    edges = [float(i * width) for i in range(low, high + 1)]
    return edges, {kind: np.histogram(group, edges)[0].tolist() for kind, group in values.items()}


def largest_patches(run: Run, bins: int = 30) -> tuple[list[float], dict[str, list[int]]]:
    """Computes a histogram of `largest_px`: bin edges, and counts of correctly and wrongly classified images."""
    values: dict[str, list[int]] = {"right": [], "wrong": []}
    for record in run.records or ():
        if record.largest_px is not None:
            values["right" if record.results[0].prediction == record.label else "wrong"].append(record.largest_px)
    most = max(map(max, filter(None, values.values())))
    width = -(-(most + 1) // bins)
    edges = [float(i * width) for i in range(most // width + 2)]
    return edges, {name: np.histogram(group, edges)[0].tolist() for name, group in values.items()}


def patch_curves(runs: Sequence[Run]) -> tuple[list[str], dict[str, dict[str, tuple[float, float, float]]]]:
    """Returns the patches, and for each model and rule: patch -> certified accuracy and its interval, in percent.

    Patches with a fixed size in pixels come first, sorted by area. A later run with the same model, rule, patch and
    data replaces an earlier one.
    """
    area: dict[str, tuple[int, int]] = {}
    curves: dict[str, dict[str, tuple[float, float, float]]] = {}
    several = len({run.info.model for run in runs}) > 1
    where = len({(run.info.data, run.info.split) for run in runs}) > 1
    for run in runs:
        for row in run.info.results:
            size = (0, row.patch[0] * row.patch[1]) if row.patch else (1, len(area))
            area.setdefault(row.threat, size)
            name = f"{run.info.model}, {row.rule}" if several else row.rule
            name += f", {run.info.data} {run.info.split}" if where else ""
            low, high = row.interval95["certified_accuracy"]
            curves.setdefault(name, {})[row.threat] = (100 * row.certified_accuracy, 100 * low, 100 * high)
    return sorted(area, key=lambda threat: area[threat]), curves


def _json(text: bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UnreadableError(f"{what} is not JSON: {sanitize(error)}") from None


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 2.0**63
