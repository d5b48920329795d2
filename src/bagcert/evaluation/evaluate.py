"""Clean and certified accuracy of a model on a labeled data set, and one record per image."""

import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.data.preprocess import Preprocessing
from bagcert.defenses.bagcert import BagCert
from bagcert.devices import device_name, dtype_name, peak_memory_mib
from bagcert.errors import UnreadableError, UsageError
from bagcert.evaluation.gallery import make_gallery
from bagcert.evaluation.gallery_file import Gallery, gallery_bytes, gallery_path
from bagcert.evaluation.journal import EvaluationLog, described_mask, log_path, run_identity
from bagcert.evaluation.passes import Found, Job, RulePatch, first_pass, timed_pass
from bagcert.io.files import remove_leftovers, write_atomically
from bagcert.records import ImageRecord, Row, RunInfo, wilson_interval
from bagcert.rules import get_rule
from bagcert.rules.largest import VOTING_RULES

LIBRARIES = ("bagcert", "torch", "numpy", "pillow")


@dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation: summary, one record per image, and the errors of unreadable images.

    `gallery` holds pictures of some images; None if they were not requested.
    """

    info: RunInfo
    records: list[ImageRecord]
    errors: list[str]
    gallery: Gallery | None = None


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
        data: a data set, or its name as in `bagcert.data.load_dataset`.
        patches, rules: by default those of the model. Sizes are in pixels of the data set's images.
        limit: maximum number of images, see `ImageSet.take`.
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
    settings = [RulePatch(rule, patch) for patch in patches for rule in rules]
    for setting in settings:
        get_rule(setting.rule)
    job = Job(model, images, labels, settings, preprocessing, placements, batch_size, largest)
    journal = None if log is None else EvaluationLog(log, _identity(job, patches, rules, limit), resume)

    def report(before: int) -> Callable[[int], None]:
        return lambda done: on_progress(before + done, repeat * len(images))

    with closing(journal) if journal else nullcontext():
        found = first_pass(job, journal, report(0))
        passes = [found.seconds, *(timed_pass(job, report(number * len(images))) for number in range(1, repeat))]
    if not found.records:
        raise UnreadableError(f"no image of {images.name} can be read; the first: {found.errors[0]}")
    info = _summary(job, found, passes, load_seconds + found.waited, limit, mask)
    pictures = None
    if gallery:
        pictures = make_gallery(model, images, found.records, placements, fit, deployed=info.deployed)
    return Evaluation(info, found.records, [found.errors[number] for number in sorted(found.errors)], pictures)


def _identity(job: Job, patches: Sequence[str], rules: Sequence[str], limit: int | None) -> dict[str, Any]:
    """All that the records depend on; a run is resumed only with the same."""
    return run_identity(
        job.model,
        job.images,
        job.placements,
        patches=list(patches),
        rules=list(rules),
        limit=limit,
        fit=job.preprocessing.fit,
        batch_size=job.batch_size,
        device=device_name(job.model.scorer.device),
        threads=torch.get_num_threads(),
        backend=job.model.backend,
        versions=versions(job.model),
        **({"largest": True} if job.largest else {}),
    )


def _summary(
    job: Job,
    found: Found,
    passes: Sequence[Sequence[float]],
    load_seconds: float,
    limit: int | None,
    mask: dict[str, str] | None,
) -> RunInfo:
    """The figures of a run, from its records, and what it ran on."""
    model, images = job.model, job.images
    forward, *each = (statistics.median(column) for column in zip(*passes, strict=True))
    rows = [_row(setting, found.records, column, each[column]) for column, setting in enumerate(job.settings)]
    own = next((t.threat for t in rows if (t.rule, t.threat.partition(" ")[0]) == (model.rule, str(model.patch))), None)
    return RunInfo(
        model=model.name,
        weights_sha256=model.weights_sha256,
        data=images.name,
        split=images.split,
        images=len(found.records),
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
        unreadable=len(found.errors),
        repeat=len(passes),
        batch_size=job.batch_size,
        peak_memory_mib=peak_memory_mib(),
        placements=mask,
        pixels="of the photo" if found.resized else f"at {model.image_size[0]}x{model.image_size[1]}",
        masks_per_axis=model.masks_per_axis,
        deployed=[model.rule, own or str(model.patch)],
        notes=[*images.notes, *_remarks(model, rows)],
    )


def _remarks(model: BagCert, rows: Sequence[Row]) -> list[str]:
    """Why a rule certifies nothing, where that follows from the head of the model."""
    votes = dict.fromkeys(row.rule for row in rows if row.rule in VOTING_RULES and row.certified_share == 0)
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


def _row(setting: RulePatch, records: Sequence[ImageRecord], column: int, seconds: float) -> Row:
    """The figures of one setting, from the records alone."""
    results = [record.results[column] for record in records]
    # A patch in percent has a different size in px in images of different sizes.
    sizes = {tuple(result.patch) if result.patch else None for result in results}
    single = sizes.pop() if len(sizes) == 1 else None
    count = len(records)
    right = [result.prediction == record.label for result, record in zip(results, records, strict=True)]
    clean = sum(right)
    proved = sum(good and result.certified for good, result in zip(right, results, strict=True))
    return Row(
        rule=setting.rule,
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
