"""Cache of locality reports in the user's cache folder, per model, machine and configuration.

The cache only saves time. If an entry is damaged, invalid or for another model, the measurement is repeated. If the
folder is not writable, the model is measured at every load. Entries are checked against accidental damage only: a user
with write access to the cache could also change the weights of the model.
"""

import hashlib
import json
import os
import platform
import sys
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError

from bagcert.devices import product_precision
from bagcert.errors import BagcertError
from bagcert.io.files import read_regular, write_atomically
from bagcert.locality.measurement import measure, shapes_for
from bagcert.locality.report import LocalityReport
from bagcert.nets.cost import update_with_weights
from bagcert.nets.receptive_field.module_state import is_told_by_text
from bagcert.nets.region_scorer import RegionScorer

VERSION = 2  # version of the measurement; increase it to invalidate old entries
MOST_BYTES = 2**18
_REPORT = TypeAdapter(LocalityReport)


def cached_report(model: Any, thorough: bool = False) -> LocalityReport:
    """Return the report of `measure` for a model and its deployed patch, from the cache if possible.

    A thorough report in the cache, for example from `bagcert doctor`, replaces a short one. Refusals are not cached,
    nor are reports on networks with custom layers, whose behavior is not determined by their text and weights.
    """
    folder = cache_folder()
    if folder is None or not _described(model):
        return measure(model, thorough=thorough)
    key = report_key(model)
    path = folder / "locality" / f"{key}.json"
    kept = _read(path, key)
    if kept is not None and (kept.thorough or not thorough):
        return kept
    report = measure(model, thorough=thorough)
    keep(model, report)
    return report


def keep(model: Any, report: LocalityReport) -> None:
    """Write a report to the cache atomically; does nothing if the folder is not writable."""
    folder = cache_folder()
    if folder is None or report.consequence == "refused" or not _described(model):
        return
    key = report_key(model)
    body = json.dumps({"key": key, "report": asdict(report)}, sort_keys=True)
    with suppress(BagcertError, OSError, ValueError):
        write_atomically(folder / "locality" / f"{key}.json", f"{_digest(body.encode())}\n{body}\n".encode())


def cache_folder() -> Path | None:
    """The cache folder: $BAGCERT_CACHE, or `bagcert` in the platform's cache folder; None without a home folder."""
    if own := os.environ.get("BAGCERT_CACHE"):
        return Path(own)
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        # The XDG specification says that relative paths must be ignored.
        if (base := os.environ.get(variable)) and os.path.isabs(base):
            return Path(base) / "bagcert"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home.joinpath(*(("Library", "Caches") if sys.platform == "darwin" else (".cache",)), "bagcert")


def report_key(model: Any) -> str:
    """Hash of everything a measurement depends on: weights, layers, geometry, head, device, arithmetic, libraries."""
    scorer: RegionScorer = getattr(model, "scorer", model)
    grid = scorer.grid()
    facts = {
        "version": VERSION,
        "layers": repr(scorer),
        "head": [scorer.head, scorer.scale, list(scorer.image_size)],
        "patches": shapes_for(model, None, scorer.image_size),
        "name": getattr(model, "name", ""),
        "backend": [scorer.backend, {} if scorer.runner is None else scorer.runner.versions()],
        "device": str(scorer.device),
        "dtype": str(scorer.autocast_dtype),
        "threads": torch.get_num_threads(),
        "arithmetic": _arithmetic(),
        "machine": _machine(scorer.device.type),
        "libraries": {name: metadata.version(name) for name in ("bagcert", "torch")},
    }
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
    digest.update(grid.rows_seen.tobytes() + grid.cols_seen.tobytes())
    update_with_weights(digest, scorer)
    return digest.hexdigest()


def _read(path: Path, key: str) -> LocalityReport | None:
    """Read a cached report; None if the file is missing, damaged, invalid or has another key."""
    try:
        digest, _, body = read_regular(path, MOST_BYTES).partition(b"\n")
        if digest.decode() != _digest(body.removesuffix(b"\n")):
            return None
        entry = json.loads(body)
        if entry["key"] != key:
            return None
        report = _REPORT.validate_python(entry["report"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError, ValidationError):
        return None
    plausible = report.probes and all(probe.largest_z >= 0 for probe in report.probes)
    return report if plausible and report.consequence != "refused" else None


def _described(model: Any) -> bool:
    return is_told_by_text(getattr(model, "scorer", model))


def _digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def _arithmetic() -> list[str]:
    """Torch settings that influence the choice of kernels."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    precisions = [*product_precision(), cudnn.conv.fp32_precision, mkldnn.conv.fp32_precision]
    settings = (*precisions, cudnn.benchmark, cudnn.deterministic)
    return [str(setting) for setting in (*settings, mkldnn.is_available(), getattr(mkldnn, "enabled", None))]


@cache
def _machine(device_type: str) -> list[str]:
    """Description of the processor, because home folders can be shared between machines that round differently."""
    found = [platform.machine(), torch.backends.cpu.get_cpu_capability(), platform.processor()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        found += [next((line for line in lines if line.startswith(kind)), "") for kind in ("model name", "flags")]
    if device_type == "cuda":
        found += [torch.cuda.get_device_name(), str(torch.version.cuda), str(torch.backends.cudnn.version())]
    return found
