"""Clean and certified accuracy of a model on a labeled data set, and one record per image."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from importlib import metadata
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import psutil
import torch

from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.data.prefetch import one_ahead
from bagcert.data.preprocess import PhotoGeometry, Preprocessing
from bagcert.defenses.bagcert import BagCert
from bagcert.devices import device_name, dtype_name, peak_memory_mib
from bagcert.errors import UnreadableError, UsageError
from bagcert.evaluation.gallery import make_gallery
from bagcert.evaluation.gallery_file import Gallery, gallery_bytes, gallery_path
from bagcert.evaluation.journal import Batch, EvaluationLog, described, described_mask, log_path
from bagcert.io.files import remove_leftovers, write_atomically
from bagcert.records import ImageRecord, Record, Row, RunInfo, wilson_interval
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

LIBRARIES = ("bagcert", "torch", "numpy", "pillow")
READ_AT_ONCE = 64  # photos decoded side by side


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found: the summary, a record per image, and the images left out because they are damaged.

    `gallery` holds pictures of some images, None where none were asked for.
    """

    info: RunInfo
    records: list[ImageRecord]
    errors: list[str]
    gallery: Gallery | None = None


@dataclass
class _Tally:
    """One rule against one patch; the threat is parsed for the size of the images at hand."""

    rule: str
    notation: str
    threat: PatchThreatModel | None = None


def evaluate(
    model: BagCert,
    data: str | ImageSet,
    *,
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
    log: Path | None = None,
    resume: bool = False,
    gallery: bool = False,
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
        log: a file for the records of each batch as soon as they are known, see `bagcert.evaluation.journal`.
        resume: go on after the last whole batch in `log`; figures and records are those of a run that was never
            interrupted, and so are the seconds, which are kept with each batch.
        gallery: also keep pictures of some images, which are read once more in the end.

    Raises:
        UsageError: classes of the data that the model does not know; a patch that does not fit; a `log` of another run.
        UnreadableError: the data set as a whole, or every image in it, or the mask, cannot be read.
    """
    if batch_size < 1 or repeat < 1:
        raise UsageError(f"batch size and repeat must be at least 1, got {batch_size} and {repeat}")
    started = time.perf_counter()
    images = data.take(limit) if isinstance(data, ImageSet) else load_dataset(data, split, limit)
    labels, mask = labels_for(model, images), described_mask(placements)
    preprocessing = Preprocessing(model.image_size, fit)
    load_seconds = model_seconds + time.perf_counter() - started
    patches, rules = patches or (str(model.patch),), rules or (model.rule,)
    tallies = [_Tally(rule, patch) for patch in patches for rule in rules]
    for tally in tallies:
        get_rule(tally.rule)
    records: list[ImageRecord] = []
    errors: dict[int, str] = {}
    passes: list[list[float]] = []
    journal = None
    if log is not None:
        run_now = described(
            model,
            images,
            placements,
            patches=list(patches),
            rules=list(rules),
            limit=limit,
            fit=fit,
            batch_size=batch_size,
            device=device_name(model.scorer.device),
            threads=torch.get_num_threads(),
            backend=model.backend,
            versions=versions(model),
        )
        journal = EvaluationLog(log, run_now, resume)
    with closing(journal) if journal else nullcontext():
        for run in range(repeat):
            lost: dict[int, str] = {}
            seconds, done = [0.0] * (1 + len(tallies)), 0
            if run == 0 and journal:
                for batch in journal.batches:
                    records += batch.records
                    errors |= dict(batch.errors)
                    seconds = [sum(pair) for pair in zip(seconds, batch.seconds, strict=True)]
                done = records[-1].index + 1 if records else 0
            clock = time.perf_counter()
            batches = _batches(images, preprocessing, batch_size, lost, done)
            if model.scorer.device.type != "cpu":  # a processor that computes has no time to read beside it
                batches = one_ahead(batches)
            for indices, pixels, geometry in batches:
                load_seconds += time.perf_counter() - clock if run == 0 else 0.0
                found, laps = _certify(model, tallies, pixels, geometry, placements)
                seconds = [sum(pair) for pair in zip(seconds, laps, strict=True)]
                if run == 0:
                    lines = [ImageRecord(i, int(labels[i]), line) for i, line in zip(indices, found, strict=True)]
                    # A copy: images that are read ahead may add to it meanwhile.
                    passed = [(i, sentence) for i, sentence in list(lost.items()) if done <= i < indices[-1]]
                    if journal:
                        journal.append(Batch(lines, passed, laps))
                    records += lines
                done = indices[-1] + 1
                on_progress(run * len(images) + done, repeat * len(images))
                clock = time.perf_counter()
            if run == 0:
                errors |= lost
            passes.append(seconds)
    if not records:
        raise UnreadableError(f"no image of {images.name} can be read; the first: {errors[0]}")
    forward, *each = (statistics.median(column) for column in zip(*passes, strict=True))
    info = RunInfo(
        model=model.name,
        weights_sha256=model.weights_sha256,
        data=images.name,
        split=images.split,
        images=len(records),
        limit=limit,
        device=device_name(model.scorer.device),
        backend=model.backend,
        dtype=dtype_name(model.scorer.autocast_dtype),
        threads=torch.get_num_threads(),
        versions=versions(model),
        seconds={
            "load": round(load_seconds, 3),
            "forward": round(forward, 3),
            "total": round(time.time() - psutil.Process().create_time(), 3),
        },
        results=[_row(tally, records, column, each[column]) for column, tally in enumerate(tallies)],
        unreadable=len(errors),
        repeat=repeat,
        batch_size=batch_size,
        peak_memory_mib=peak_memory_mib(),
        placements=mask,
    )
    pictures = make_gallery(model, images, records, placements, fit) if gallery else None
    return Evaluation(info, records, [errors[number] for number in sorted(errors)], pictures)


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Writes the JSON, and beside it one line per image in `*.records.jsonl` and pictures of some in `*.gallery.npz`.

    Each is written whole or not at all; an older gallery is removed where there is none now.

    The log of the run has then done its work and is removed, last of all.

    Raises:
        BagcertError: a file cannot be written.
    """
    records = "".join(record.to_json() + "\n" for record in evaluation.records)
    contents = {path.with_suffix(".records.jsonl"): records.encode()}
    if evaluation.gallery is not None:
        contents[gallery_path(path)] = gallery_bytes(evaluation.gallery)
    contents[path] = (json.dumps(evaluation.info.to_dict(), indent=2) + "\n").encode()
    for target, content in contents.items():
        remove_leftovers(target)
        write_atomically(target, content)
    if evaluation.gallery is None:
        gallery_path(path).unlink(missing_ok=True)
    log_path(path).unlink(missing_ok=True)


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


def versions(model: BagCert | None = None) -> dict[str, str]:
    """The libraries a figure depends on; those of the model's backend among them."""
    own = {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}
    runner = None if model is None else model.scorer.runner
    return own if runner is None else {**own, **runner.versions()}


def _batches(
    images: ImageSet, preprocessing: Preprocessing, batch_size: int, errors: dict[int, str], first: int
) -> Iterator[tuple[list[int], np.ndarray, PhotoGeometry]]:
    """Numbers and network inputs uint8 [batch, h, w, 3] of consecutive images of one stored size, and its geometry.

    They begin with the image `first`. What cannot be read goes into `errors` by its number.
    """

    def sized(photo: Photo) -> tuple[tuple[int, int], int, np.ndarray]:
        return photo.stored_size, photo.orientation, preprocessing.apply(photo)

    def prepared() -> Iterator[tuple[tuple[tuple[int, int], int], int, np.ndarray]]:
        for start in range(first, len(images), READ_AT_ONCE):
            numbers = range(start, min(start + READ_AT_ONCE, len(images)))
            for number, found in zip(numbers, images.prepare_each(numbers, sized), strict=True):
                if isinstance(found, UnreadableError):
                    errors[number] = str(found)
                else:
                    size, orientation, pixels = found
                    yield (size, orientation), number, pixels

    for (size, orientation), group in groupby(prepared(), key=lambda item: item[0]):
        geometry = preprocessing.geometry(size, orientation)
        while batch := list(islice(group, batch_size)):
            yield [number for _, number, _ in batch], np.stack([pixels for _, _, pixels in batch]), geometry


def _certify(
    model: BagCert,
    tallies: Sequence[_Tally],
    pixels: np.ndarray,
    geometry: PhotoGeometry,
    placements: str | Path | None,
) -> tuple[list[list[Record]], list[float]]:
    """The records of each image of a batch, a verdict per tally; seconds of the forward pass and of each tally."""
    clock = time.perf_counter()
    score_map = geometry.score_map(model.score_map(pixels))
    laps, columns = [_lap(clock, model)], []
    for tally in tallies:
        threat = _threat(tally, score_map, placements)
        clock = time.perf_counter()
        certificate = get_rule(tally.rule).certify(score_map, threat)
        laps.append(_lap(clock, model))
        columns.append(Record.each(certificate))
    return [list(line) for line in zip(*columns, strict=True)], laps


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


def _row(tally: _Tally, records: Sequence[ImageRecord], column: int, seconds: float) -> Row:
    """The figures of one tally, from the records alone."""
    results = [record.results[column] for record in records]
    # One patch size means the same in every image; a percentage does not where images differ in size.
    sizes = {tuple(result.patch) if result.patch else None for result in results}
    single = sizes.pop() if len(sizes) == 1 else None
    count = len(records)
    right = [result.prediction == record.label for result, record in zip(results, records, strict=True)]
    clean = sum(right)
    proved = sum(good and result.certified for good, result in zip(right, results, strict=True))
    return Row(
        rule=tally.rule,
        patch=list(single) if single else None,
        threat=results[0].threat,
        clean_accuracy=clean / count,
        certified_accuracy=proved / count,
        certified_share=sum(result.certified for result in results) / count,
        interval95={
            "clean_accuracy": wilson_interval(clean, count),
            "certified_accuracy": wilson_interval(proved, count),
        },
        seconds=round(seconds, 4),
    )
