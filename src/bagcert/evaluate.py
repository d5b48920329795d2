"""Certified and clean accuracy of a model on a data set: the one place that compares predictions with labels."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import psutil
import torch

from bagcert.certificate import Certificate
from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.defenses.bagcert import BagCert
from bagcert.devices import peak_memory_mib
from bagcert.errors import UnreadableError, UsageError
from bagcert.files import write_atomically
from bagcert.preprocess import PhotoGeometry, Preprocessing
from bagcert.records import ImageRecord, Record, Row, RunInfo, wilson_interval
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

LIBRARIES = ("bagcert", "torch", "numpy", "pillow")
READ_AT_ONCE = 64  # photos held at their stored size


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the summary, a record per image, and the images left out because they are damaged."""

    info: RunInfo
    records: list[ImageRecord]
    errors: list[str]


@dataclass
class _Tally:
    """One rule against one threat, filled batch by batch."""

    rule: str
    notation: str
    threat: PatchThreatModel | None
    seconds: list[float]
    certificates: list[Certificate]


def evaluate(
    model: BagCert,
    data: str | ImageSet,
    patches: Sequence[str] = (),
    rules: Sequence[str] = (),
    split: str = "test",
    limit: int | None = None,
    batch_size: int = 250,
    placements: str | Path | None = None,
    fit: str = "squash",
    repeat: int = 1,
    model_seconds: float = 0.0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """Evaluates every rule against every patch from one forward pass per image.

    An image that cannot be read is left out, counted in `RunInfo.unreadable` and named in `Evaluation.errors`.

    Args:
        model: a loaded defence.
        data: a data set, or its name as in `bagcert.data.load_dataset`.
        patches, rules: the model's own when empty. Sizes are in pixels of the data set's images.
        limit: the first so many images in data-set order.
        batch_size: images per forward pass.
        placements: a mask image of allowed placements.
        fit: how images of another size reach the network, "squash" or "center-crop".
        repeat: whole passes; reported seconds are medians.
        model_seconds: already spent on loading the model, counted under `seconds.load`.
        on_progress: called with (images done, images in all).

    Raises:
        UsageError: classes of the data that the model does not know; a patch that does not fit.
        UnreadableError: the data set as a whole, or every image in it, cannot be read.
    """
    if batch_size < 1 or repeat < 1:
        raise UsageError(f"batch size and repeat must be at least 1, got {batch_size} and {repeat}")
    started = time.perf_counter()
    images = data.take(limit) if isinstance(data, ImageSet) else load_dataset(data, split, limit)
    labels = labels_for(model, images)
    preprocessing = Preprocessing(model.image_size, fit)
    load_seconds = model_seconds + time.perf_counter() - started
    tallies = [
        _Tally(rule, patch, None, [], []) for patch in patches or (str(model.patch),) for rule in rules or (model.rule,)
    ]
    for tally in tallies:
        get_rule(tally.rule)
    forward: list[float] = []
    order: list[int] = []
    errors: dict[int, str] = {}
    for run in range(repeat):
        forward.append(0.0)
        for tally in tallies:
            tally.seconds.append(0.0)
            tally.certificates.clear()
        order.clear()
        clock = time.perf_counter()
        for indices, pixels, geometry in _batches(images, preprocessing, batch_size, errors):
            load_seconds += time.perf_counter() - clock if run == 0 else 0.0
            clock = time.perf_counter()
            score_map = geometry.score_map(model.score_map(pixels))
            forward[-1] += _lap(clock, model)
            for tally in tallies:
                threat = _threat(tally, score_map, placements)
                clock = time.perf_counter()
                tally.certificates.append(get_rule(tally.rule).certify(score_map, threat))
                tally.seconds[-1] += _lap(clock, model)
            order += indices
            on_progress(run * len(images) + len(order) + len(errors), repeat * len(images))
            clock = time.perf_counter()
    if not order:
        raise UnreadableError(f"no image of {images.name} can be read; the first: {errors[0]}")
    rows, columns = [], []
    for tally in tallies:
        row, records = _row(tally, labels[order])
        rows.append(row)
        columns.append(records)
    info = RunInfo(
        model=model.name,
        weights_sha256=model.weights_sha256,
        data=images.name,
        split=images.split,
        images=len(order),
        limit=limit,
        device=device_name(model),
        backend="torch",
        dtype=str(model.scorer.autocast_dtype or torch.float32).removeprefix("torch."),
        threads=torch.get_num_threads(),
        versions=versions(),
        seconds={
            "load": round(load_seconds, 3),
            "forward": round(statistics.median(forward), 3),
            "total": round(time.time() - psutil.Process().create_time(), 3),
        },
        results=rows,
        unreadable=len(errors),
        repeat=repeat,
        batch_size=batch_size,
        peak_memory_mib=peak_memory_mib(),
    )
    lines = zip(*columns, strict=True)
    images_found = [ImageRecord(i, int(labels[i]), list(line)) for i, line in zip(order, lines, strict=True)]
    return Evaluation(info, images_found, list(errors.values()))


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Writes the JSON, and beside it one line per image in `*.records.jsonl`; each whole or not at all.

    Raises:
        BagcertError: a file cannot be written.
    """
    records = "".join(record.to_json() + "\n" for record in evaluation.records)
    write_atomically(path.with_suffix(".records.jsonl"), records.encode())
    write_atomically(path, (json.dumps(evaluation.info.to_dict(), indent=2) + "\n").encode())


def labels_for(model: BagCert, images: ImageSet) -> np.ndarray:
    """The labels of a data set as the model's class indices, matched by name, or by number where data has no names.

    Raises:
        UsageError: a class the model does not know.
    """
    if images.class_names == model.class_names:
        return images.labels
    index = {name: i for i, name in enumerate(model.class_names)}
    unknown = [name for name in images.class_names if name not in index]
    numbered = images.class_names == tuple(map(str, range(len(images.class_names))))
    if unknown and numbered and len(images.class_names) <= len(model.class_names):
        return images.labels
    if unknown:
        known = ", ".join(model.class_names[:10]) + (", ..." if len(model.class_names) > 10 else "")
        raise UsageError(
            f"{images.name} has the class {unknown[0]!r}, which {model.name} does not know; it knows {known}"
        )
    return np.array([index[name] for name in images.class_names])[images.labels]


def versions() -> dict[str, str]:
    """The libraries a figure depends on."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}


def device_name(model: BagCert) -> str:
    """`cpu`, or the name of the accelerator."""
    device = model.scorer.device
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def _batches(
    images: ImageSet, preprocessing: Preprocessing, batch_size: int, errors: dict[int, str]
) -> Iterator[tuple[list[int], np.ndarray, PhotoGeometry]]:
    """Numbers and network inputs uint8 [batch, h, w, 3] of consecutive images of one stored size, and its geometry.

    What cannot be read goes into `errors` by its number.
    """

    def prepared() -> Iterator[tuple[tuple[tuple[int, int], int], int, np.ndarray]]:
        for start in range(0, len(images), READ_AT_ONCE):
            numbers = range(start, min(start + READ_AT_ONCE, len(images)))
            for number, photo in zip(numbers, images.read_each(numbers), strict=True):
                if isinstance(photo, UnreadableError):
                    errors[number] = str(photo)
                else:
                    yield (photo.stored_size, photo.orientation), number, preprocessing.apply(photo)

    for (size, orientation), group in groupby(prepared(), key=lambda item: item[0]):
        geometry = preprocessing.geometry(size, orientation)
        while batch := list(islice(group, batch_size)):
            yield [number for _, number, _ in batch], np.stack([pixels for _, _, pixels in batch]), geometry


def _threat(tally: _Tally, score_map: ScoreMap, placements: str | Path | None) -> PatchThreatModel:
    """The tally's threat for images of this size, parsed once per size."""
    size = score_map.grid.image_size
    if tally.threat is None or tally.threat.image_size != size:
        tally.threat = PatchThreatModel.parse(tally.notation, size, placements)
    return tally.threat


def _lap(clock: float, model: BagCert) -> float:
    if model.scorer.device.type == "cuda":
        torch.cuda.synchronize(model.scorer.device)
    return time.perf_counter() - clock


def _row(tally: _Tally, labels: np.ndarray) -> tuple[Row, list[Record]]:
    parts = tally.certificates
    prediction = torch.cat([part.prediction for part in parts]).cpu().numpy()
    certified = torch.cat([part.certified for part in parts]).cpu().numpy()
    # One patch size means the same in every image; a percentage does not where images differ in size.
    sizes = {part.threat.patch for part in parts}
    single = sizes.pop() if len(sizes) == 1 else None
    patch = list(single) if single else None
    threat = str(parts[0].threat)
    right = prediction == labels
    count = len(labels)
    clean, proved = int(right.sum()), int((right & certified).sum())
    row = Row(
        rule=tally.rule,
        patch=patch,
        threat=threat,
        clean_accuracy=clean / count,
        certified_accuracy=proved / count,
        certified_share=float(certified.mean()),
        interval95={
            "clean_accuracy": wilson_interval(clean, count),
            "certified_accuracy": wilson_interval(proved, count),
        },
        seconds=round(statistics.median(tally.seconds), 4),
    )
    records = [record for part in parts for record in Record.each(part)]
    return row, records
