"""Certification of parts with Ray Data: a pool of actors, each with one loaded model.

Rows are returned to the calling process, which is the only one to write files. Workers only need access to the data and
the model. The unfinished part of a killed worker is repeated by another one, and each part is used once.
"""

import logging
import os
import pickle
import warnings
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa

from bagcert.bulk.parts import Part
from bagcert.bulk.worker import CertifyJob, Worker
from bagcert.errors import BagcertError, UnreadableError, UnsoundError, UsageError, sanitize
from bagcert.io.optional import require

MOST_BLOCKS = 10_000
"""Above this number of parts, a worker gets several at a time, so that Ray does not track millions of tasks."""
OBJECT_STORE_BYTES = 1 << 28  # parts and rows are small, so this is less than Ray's default of a third of the memory
MOST_RETRIES = 5
"""Number of retries of a part after its worker died: a part that kills every worker must not run forever."""

_ERRORS = {kind.__name__: kind for kind in (BagcertError, UnreadableError, UnsoundError, UsageError)}


class _Actor:
    """A `Worker` for Ray Data, which passes columns. Errors are returned as rows, because Ray would print them."""

    def __init__(self, job: CertifyJob) -> None:
        self._job = job
        self._worker: Worker | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        found: dict[str, list[Any]] = {"index": [], "rows": [], "error": [], "kind": []}
        for index, part in zip(batch["index"], batch["part"], strict=True):
            rows, error, kind = b"", "", ""
            try:
                if self._worker is None:
                    self._worker = Worker(self._job)
                sink = pa.BufferOutputStream()
                (table,) = self._worker.certify([pickle.loads(part)])  # raised by this package, see below
                with pa.ipc.new_stream(sink, table.schema) as stream:
                    stream.write_table(table)
                rows = sink.getvalue().to_pybytes()
            except BagcertError as problem:
                error, kind = str(problem), type(problem).__name__
            for name, value in (("index", int(index)), ("rows", rows), ("error", error), ("kind", kind)):
                found[name].append(value)
        return found


def run_parts(
    job: CertifyJob, parts: Sequence[Part], workers: int | None
) -> Generator[tuple[int, pa.Table], None, None]:
    """Certifies parts on Ray and iterates over (index, rows) of each part, in order of completion.

    Uses the current Ray connection of this process, else the cluster in RAY_ADDRESS, else a local Ray that is started
    and shut down by this function.

    Raises:
        UsageError: Ray is not installed, or more workers than the cluster has room for.
        BagcertError: an error of a worker, or a part whose workers die repeatedly.
    """
    ray = require("ray", "ray", "--engine ray")
    require("ray.data", "ray", "--engine ray")
    started = _start(ray, workers)
    try:
        yield from _stream(ray, job, parts, workers)
    finally:
        if started:
            ray.shutdown()


def _start(ray: Any, workers: int | None) -> bool:
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is to be told to anybody
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if os.environ.get("RAY_ADDRESS"):
        try:
            ray.init(**quiet)
        except Exception as error:  # of gRPC, of the address, of another version there
            raise BagcertError(
                f"the Ray cluster {os.environ['RAY_ADDRESS']} cannot be used: {sanitize(error)}"
            ) from None
        return True
    ray.init(
        include_dashboard=False,
        object_store_memory=OBJECT_STORE_BYTES,
        num_cpus=None if workers is None else max(workers, os.cpu_count() or 1),
        **quiet,
    )
    return True


def _stream(ray: Any, job: CertifyJob, parts: Sequence[Part], workers: int | None) -> Iterator[tuple[int, pa.Table]]:
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    resources = ray.cluster_resources()
    on_gpu = job.device.startswith("cuda") or (job.device == "auto" and resources.get("GPU", 0) >= 1)
    room = int(resources.get("GPU" if on_gpu else "CPU", 0))
    count = min(workers or room, len(parts))
    if not 1 <= count <= room:
        raise UsageError(f"{count} workers were asked for, but Ray has {room} {'GPUs' if on_gpu else 'cores'}")
    items = [{"index": index, "part": pickle.dumps(part)} for index, part in enumerate(parts)]
    source = ray.data.from_items(items, override_num_blocks=min(len(items), MOST_BLOCKS))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the last two, which have no successor yet
        found = source.map_batches(
            _Actor,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=count),
            num_cpus=1,
            num_gpus=1 if on_gpu else 0,
            max_restarts=-1,
            max_task_retries=MOST_RETRIES,
        )
    try:
        for row in found.iter_rows():
            if row["kind"]:
                raise _ERRORS.get(row["kind"], BagcertError)(row["error"])
            yield int(row["index"]), pa.ipc.open_stream(row["rows"]).read_all()
    except ray.exceptions.RayError as error:
        raise BagcertError(f"Ray failed: {sanitize(error)}; rerun the same command to resume") from None
