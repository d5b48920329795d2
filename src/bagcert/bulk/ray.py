"""Certifying parts on Ray Data: a pool of actors, each with one loaded model.

Rows come back to the process that asked, which alone writes files; so workers need to see the data and the model, and
nothing else. What a killed worker had begun is done again by another, and each part is taken once.
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
from bagcert.errors import BagcertError, UnreadableError, UnsoundError, UsageError, shown
from bagcert.io.optional import require

MOST_BLOCKS = 10_000
"""Above as many parts, several go to a worker at a time, so that Ray keeps no list of millions."""
OBJECT_STORE_BYTES = 1 << 28
"""Parts and rows are small; a third of the memory, which Ray would take, is not needed."""
MOST_RETRIES = 5
"""So often is a part tried again after its worker died: one that kills every worker must come to an end."""

_ERRORS = {kind.__name__: kind for kind in (BagcertError, UnreadableError, UnsoundError, UsageError)}


class _Actor:
    """A `Worker` for Ray Data, which hands over columns; errors come back as rows, for Ray would print them."""

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
                (table,) = self._worker.certify([pickle.loads(part)])  # of our own making, further below
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
    """(index, rows) of each part, as they come.

    Uses the Ray that this process is connected to, or else the cluster in RAY_ADDRESS, or else starts one here and
    ends it afterwards.

    Raises:
        UsageError: Ray is not installed; more workers than the cluster can hold.
        BagcertError: what a worker raised, or a part whose workers die again and again.
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
            raise BagcertError(f"the Ray cluster {os.environ['RAY_ADDRESS']} cannot be used: {shown(error)}") from None
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
        raise BagcertError(f"Ray gave up: {shown(error)}; the same command goes on") from None
