"""Clean and certified accuracy of a model on a labeled data set, and one record per image."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, field, replace
from importlib import metadata
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch

from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.data.prefetch import one_ahead
from bagcert.data.preprocess import Preprocessing, StoredShape
from bagcert.defenses.bagcert import BagCert
from bagcert.devices import device_name, dtype_name, peak_memory_mib
from bagcert.errors import UnreadableError, UsageError
from bagcert.evaluation.gallery import VOTES, make_gallery
from bagcert.evaluation.gallery_file import Gallery, gallery_bytes, gallery_path
from bagcert.evaluation.journal import Batch, EvaluationLog, described, described_mask, log_path
from bagcert.io.files import remove_leftovers, write_atomically
from bagcert.records import ImageRecord, Record, Row, RunInfo, wilson_interval
from bagcert.rules import get_rule
from bagcert.rules.largest import largest_certifiable_px
from bagcert.rules.together import certify_together
from bagcert.threat import PatchThreatModel

LIBRARIES = ("bagcert", "torch", "numpy", "pillow")
READ_AT_ONCE = 64  # photos decoded side by side
MOST_SIZES = 1024  # of images whose threats are kept


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: summary, one record per image, and the errors of unreadable images.

    `gallery` holds pictures of some images; None if they were not requested.
    """

    info: RunInfo
    records: list[ImageRecord]
    errors: list[str]
    gallery: Gallery | None = None


@dataclass
class _Tally:
    """One rule against one patch. The threat is parsed once for each image size."""

    rule: str
    notation: str
    threats: dict[tuple[int, int], PatchThreatModel] = field(default_factory=dict)

    def threat(self, size: tuple[int, int], placements: str | Path | None) -> PatchThreatModel:
        """Returns the threat model for images of this size."""
        if size not in self.threats:
            if len(self.threats) >= MOST_SIZES:
                self.threats.clear()
            self.threats[size] = PatchThreatModel.parse(self.notation, size, placements)
        return self.threats[size]


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
    largest: bool = False,
) -> Evaluation:
    """Evaluates every rule against every patch with one forward pass per image.

    An image that cannot be read is skipped, counted in `RunInfo.unreadable` and named in `Evaluation.errors`.

    Args:
        model: a loaded defense.
        data: a data set, or its name as in `bagcert.data.load_dataset`.
        patches, rules: by default those of the model. Sizes are in pixels of the data set's images.
        limit: maximum number of images, see `ImageSet.take`.
        batch_size: images per forward pass.
        placements: a mask image of allowed placements.
        fit: resizing mode for images of other sizes, "squash" or "center-crop".
        repeat: number of passes over the data; reported seconds are medians.
        model_seconds: time for loading the model, added to `seconds.load`.
        on_progress: called with (images done, images in total).
        log: a file to which the records of each batch are appended, see `bagcert.evaluation.journal`.
        resume: resume after the last complete batch in `log`. Results, records and seconds are those of an
            uninterrupted run.
        largest: also find the largest certifiable square patch of each image, see `ImageRecord`.
        gallery: also keep pictures of some images, which are read again at the end.

    Raises:
        UsageError: a class of the data that the model does not know, a patch that does not fit, or a `log` of another
            run.
        UnreadableError: the data set, all of its images, or the mask cannot be read.
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
    resized = False
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
            **({"largest": True} if largest else {}),
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
                    resized |= batch.resized
                    seconds = [sum(pair) for pair in zip(seconds, batch.seconds, strict=True)]
                done = records[-1].index + 1 if records else 0
            clock = time.perf_counter()
            batches = _batches(images, preprocessing, batch_size, lost, done)
            if model.scorer.device.type != "cpu":  # on a CPU, prefetching would compete with the computation
                batches = one_ahead(batches)
            for indices, pixels, shapes, sources in batches:
                load_seconds += time.perf_counter() - clock if run == 0 else 0.0
                found, sides, laps = _certify(model, tallies, preprocessing, pixels, shapes, placements, largest)
                seconds = [sum(pair) for pair in zip(seconds, laps, strict=True)]
                if run == 0:
                    lines = [
                        ImageRecord(i, int(labels[i]), line, source, side)
                        for i, line, source, side in zip(indices, found, sources, sides, strict=True)
                    ]
                    others = any(shape != (model.image_size, 1) for shape in shapes)
                    resized |= others
                    # A copy: prefetching may add errors concurrently.
                    passed = [(i, sentence) for i, sentence in list(lost.items()) if done <= i < indices[-1]]
                    if journal:
                        journal.append(Batch(lines, passed, laps, others))
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
    rows = [_row(tally, records, column, each[column]) for column, tally in enumerate(tallies)]
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
        results=rows,
        unreadable=len(errors),
        repeat=repeat,
        batch_size=batch_size,
        peak_memory_mib=peak_memory_mib(),
        placements=mask,
        pixels="of the photo" if resized else f"at {model.image_size[0]}x{model.image_size[1]}",
    )
    own = next((t.threat for t in rows if (t.rule, t.threat.partition(" ")[0]) == (model.rule, str(model.patch))), None)
    info = replace(info, deployed=[model.rule, own or str(model.patch)], notes=[*images.notes, *_remarks(model, rows)])
    pictures = make_gallery(model, images, records, placements, fit, deployed=info.deployed) if gallery else None
    return Evaluation(info, records, [errors[number] for number in sorted(errors)], pictures)


def _remarks(model: BagCert, rows: Sequence[Row]) -> list[str]:
    """Explains why a rule certifies no image, if the head of the model is the reason."""
    votes = dict.fromkeys(row.rule for row in rows if row.rule in VOTES and row.certified_share == 0)
    if not votes or model.scorer.head != "fixed-point":
        return []
    return [
        f"{' and '.join(votes)} certified no image: scores of the fixed-point head are so large that the regions under "
        "one patch can outvote all others; use double-masking, or train with the binary head"
    ]


def write_evaluation(evaluation: Evaluation, path: Path) -> None:
    """Writes the JSON file, and next to it `*.csv`, `*.records.jsonl` and `*.gallery.npz`.

    These hold the rows as a table, one line per image, and pictures of some images. Each file is written atomically. An
    older gallery is removed if there is no new one. Finally the log of the run is removed.

    Raises:
        BagcertError: a file cannot be written.
    """
    records = "".join(record.to_json() + "\n" for record in evaluation.records)
    contents = {path.with_suffix(".records.jsonl"): records.encode()}
    if evaluation.gallery is not None:
        contents[gallery_path(path)] = gallery_bytes(evaluation.gallery)
    contents[path.with_suffix(".csv")] = evaluation.info.to_csv().encode()
    contents[path] = (json.dumps(evaluation.info.to_dict(), indent=2) + "\n").encode()
    for target, content in contents.items():
        remove_leftovers(target)
        write_atomically(target, content)
    if evaluation.gallery is None:
        gallery_path(path).unlink(missing_ok=True)
    log_path(path).unlink(missing_ok=True)


def labels_for(model: BagCert, images: ImageSet) -> np.ndarray:
    """Converts the labels of a data set to class indices of the model, by name, or by number if the data has no names.

    If the model has display names, the names of the class folders that it was trained on match as well.

    Raises:
        UsageError: a class the model does not know.
    """
    if images.class_names == model.class_names:
        return images.labels
    index = {name: i for i, name in enumerate(model.class_names)}
    config = getattr(model, "config", None)
    folders = config.provenance.get("class_folders") if config else None
    if isinstance(folders, list) and len(folders) == len(model.class_names):
        index = {**{name: i for i, name in enumerate(folders) if isinstance(name, str)}, **index}
    unknown = [name for name in images.class_names if name not in index]
    numbered = images.class_names == tuple(map(str, range(len(images.class_names))))
    if unknown and numbered and len(images.class_names) <= len(model.class_names):
        return images.labels
    if unknown:
        way_out = ""
        if len(images.class_names) == 1:
            way_out = f"; {images.name}/{unknown[0]} must be the folder of a class, named as the model names it"
        known = ", ".join(model.class_names[:10]) + (", ..." if len(model.class_names) > 10 else "")
        raise UsageError(
            f"{images.name} has the class {unknown[0]!r}, which {model.name} does not know; it knows {known}{way_out}"
        )
    return np.array([index[name] for name in images.class_names])[images.labels]


def versions(model: BagCert | None = None) -> dict[str, str]:
    """Returns the versions of libraries that results depend on, including those of the model's backend."""
    own = {"python": platform.python_version(), **{name: metadata.version(name) for name in LIBRARIES}}
    runner = None if model is None else model.scorer.runner
    return own if runner is None else {**own, **runner.versions()}


def _batches(
    images: ImageSet, preprocessing: Preprocessing, batch_size: int, errors: dict[int, str], first: int
) -> Iterator[tuple[list[int], np.ndarray, list[StoredShape], list[str]]]:
    """Iterates over batches: image numbers, network inputs uint8 [batch, h, w, 3], stored shapes and sources.

    Starts with the image `first`. Errors of unreadable images are stored in `errors` by image number.
    """

    def sized(photo: Photo) -> tuple[np.ndarray, StoredShape, str]:
        return preprocessing.apply(photo), (photo.stored_size, photo.orientation), images.named(photo)

    def prepared() -> Iterator[tuple[int, np.ndarray, StoredShape, str]]:
        for start in range(first, len(images), READ_AT_ONCE):
            numbers = range(start, min(start + READ_AT_ONCE, len(images)))
            for number, found in zip(numbers, images.prepare_each(numbers, sized), strict=True):
                if isinstance(found, UnreadableError):
                    errors[number] = str(found)
                else:
                    yield number, *found

    each = prepared()
    while batch := list(islice(each, batch_size)):
        numbers, pixels, shapes, sources = (list(column) for column in zip(*batch, strict=True))
        yield numbers, np.stack(pixels), shapes, sources


def _certify(
    model: BagCert,
    tallies: Sequence[_Tally],
    preprocessing: Preprocessing,
    pixels: np.ndarray,
    shapes: Sequence[StoredShape],
    placements: str | Path | None,
    largest: bool,
) -> tuple[list[list[Record]], list[int | None], list[float]]:
    """Certifies a batch; returns a verdict per image and tally, the largest certifiable sides if asked for, and times.

    The seconds are those of the forward pass and of each tally. Photos of all sizes share the forward pass, and photos
    with the same windows are certified together.
    """
    clock = time.perf_counter()
    scores = model.score_map(pixels)
    divided = preprocessing.score_maps(scores, shapes)
    laps = [_lap(clock, model)]
    lines: list[list[Record]] = [[] for _ in shapes]
    for tally in tallies:
        threats = [tally.threat(size, placements) for (size, _), _, _ in divided]
        clock = time.perf_counter()
        certificates = certify_together(tally.rule, [score_map for _, _, score_map in divided], threats)
        laps.append(_lap(clock, model))
        for (_, chosen, _), certificate in zip(divided, certificates, strict=True):
            for number, record in zip(chosen, Record.each(certificate), strict=True):
                lines[number].append(record)
    sides: list[int | None] = [None] * len(shapes)
    for _, chosen, score_map in divided if largest else ():
        label = torch.tensor([lines[number][0].prediction for number in chosen], device=score_map.scores.device)
        for number, side in zip(chosen, largest_certifiable_px(score_map, label).tolist(), strict=True):
            sides[number] = side
    return lines, sides, laps


def _lap(clock: float, model: BagCert) -> float:
    if model.scorer.device.type == "cuda":
        torch.cuda.synchronize(model.scorer.device)
    return time.perf_counter() - clock


def _row(tally: _Tally, records: Sequence[ImageRecord], column: int, seconds: float) -> Row:
    """Computes the results of one tally from the records."""
    results = [record.results[column] for record in records]
    # A patch in percent has a different size in px in images of different sizes.
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
