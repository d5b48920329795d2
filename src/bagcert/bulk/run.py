"""Certification of a whole data source into a folder, from which an interrupted run can be resumed."""

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from bagcert.bulk.parts import Part, list_work
from bagcert.bulk.results import ResultFolder, run_identity, summarize
from bagcert.bulk.worker import CertifyJob, Worker
from bagcert.data.storage import absolute
from bagcert.defenses.bagcert import dtype_name, load
from bagcert.errors import UsageError
from bagcert.rules import get_rule
from bagcert.threat import check_notation

if TYPE_CHECKING:
    import torch

PartTables = Generator[tuple[int, pa.Table], None, None]

PART_SIZE = 1000
"""Images per part: the number recomputed after an interruption at most; some seconds of work for one core."""
BATCH_SIZE = 100


def run_here(job: CertifyJob, parts: Sequence[Part], workers: int | None) -> PartTables:
    """Certifies parts in this process, with all its threads, and iterates over (index, rows) of each."""
    if workers not in (None, 1):
        raise UsageError(f"the local engine is one worker, got {workers}; --engine ray takes more")
    yield from enumerate(Worker(job).certify(parts))


def run_on_ray(job: CertifyJob, parts: Sequence[Part], workers: int | None) -> PartTables:
    """Certifies parts with Ray Data and iterates over (index, rows) of each, in order of completion."""
    from bagcert.bulk.ray import run_parts

    return run_parts(job, parts, workers)


ENGINES: dict[str, Callable[[CertifyJob, Sequence[Part], int | None], PartTables]] = {
    "local": run_here,
    "ray": run_on_ray,
}
"""Engines: (job, parts, number of workers) -> (index, rows) of each part, in any order."""


def certify_many(
    data: str,
    out: Path,
    model: str = "default",
    patches: Sequence[str] = (),
    rules: Sequence[str] = (),
    engine: str = "local",
    limit: int | None = None,
    workers: int | None = None,
    placements: str | None = None,
    fit: str = "squash",
    batch_size: int = BATCH_SIZE,
    part_size: int = PART_SIZE,
    device: str = "auto",
    dtype: "str | torch.dtype" = "float32",
    portable: bool = False,
    backend: str = "torch",
    masks_per_axis: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Certifies every image of `data` that is not yet in `out`.

    Args:
        data: a folder, file, glob or URL of images or Parquet files.
        out: a folder for `_run.json` and one Parquet file per part, with rows as in `bagcert.bulk.worker.SCHEMA`.
        model, device, dtype, portable, backend, masks_per_axis: as for `load`.
        patches, rules: by default those of the model; sizes in pixels of each image as stored.
        workers: number of workers; by default one, and on Ray one per core or GPU of the cluster.
        placements, fit: as for `bagcert.bulk.files.certify_files`.
        on_progress: called with (images done, images in all).

    Returns:
        `summarize(out)` with `engine`, `certified_now`, `seconds` and `images_per_second` of this call.

    Raises:
        UsageError: an unknown engine, rule or patch; `out` holds another run.
        UnreadableError: the data cannot be read at all. Unreadable images are rows with an error.
        BagcertError: a store does not respond, workers died repeatedly, or `out` cannot be written. Finished parts are
            kept, and the same call resumes the run.
    """
    if engine not in ENGINES:
        raise UsageError(f"an engine is {' or '.join(ENGINES)}, got {engine!r}")
    if batch_size < 1 or (workers is not None and workers < 1):
        raise UsageError(f"a batch size and a number of workers must be at least 1, got {batch_size} and {workers}")
    for rule in rules:
        get_rule(rule)
    for patch in patches:
        check_notation(patch)
    data, model = absolute(data), absolute(model) if os.path.isdir(model) else model
    loaded = load(model, "cpu", checked=False, masks_per_axis=masks_per_axis)
    job = CertifyJob(
        model,
        loaded.weights_sha256,
        tuple(patches) or (str(loaded.patch),),
        tuple(rules) or (loaded.rule,),
        None if placements is None else absolute(placements),
        fit,
        batch_size,
        device,
        dtype_name(dtype),
        portable,
        backend,
        masks_per_axis,
    )
    work = list_work(data, part_size, limit)
    results = ResultFolder(out, run_identity(loaded, job, work, data=data, limit=limit, part_size=part_size))
    missing = [part for part in work.parts if not results.holds(part)]
    done = len(work) - sum(map(len, missing))
    on_progress(done, len(work))
    started = time.perf_counter()
    now = 0
    if missing:
        with closing(ENGINES[engine](job, missing, workers)) as found:
            for index, table in found:
                results.write(missing[index], table)
                now += len(table)
                on_progress(done + now, len(work))
    seconds = time.perf_counter() - started
    return {
        **summarize(out),
        "engine": engine,
        "certified_now": now,
        "seconds": round(seconds, 3),
        "images_per_second": round(now / seconds, 1) if now else None,
    }
