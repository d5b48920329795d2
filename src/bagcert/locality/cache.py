"""Each model is measured once per machine and configuration; the result is kept in the user's cache folder.

The cache saves time and decides nothing: an entry that is damaged, of another model, or not what it should be is
measured again, and a folder that cannot be written costs a measurement at every load. Whoever can write there can
also write the model's weights, so entries are checked against accidents, not against their owner.
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

VERSION = 2  # of what is measured; another number makes old entries void
MOST_BYTES = 2**18
_REPORT = TypeAdapter(LocalityReport)


def cached_report(model: Any, thorough: bool = False) -> LocalityReport:
    """The report of `measure` on a model with its own patch, from the cache or measured now.

    A thorough report, which `bagcert doctor` leaves there, stands for a short one. Refusals are not kept, nor anything
    of nets with layers of the user's own, which may hold more than their weights and description say.

    Args:
        model: a defense.
        thorough: ask for a thorough one.
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
    """Writes a report into the cache, whole or not at all; a folder that cannot be written is no error."""
    folder = cache_folder()
    if folder is None or report.consequence == "refused" or not _described(model):
        return
    key = report_key(model)
    body = json.dumps({"key": key, "report": asdict(report)}, sort_keys=True)
    with suppress(BagcertError, OSError, ValueError):
        write_atomically(folder / "locality" / f"{key}.json", f"{_digest(body.encode())}\n{body}\n".encode())


def cache_folder() -> Path | None:
    """$BAGCERT_CACHE, or `bagcert` in the platform's folder for caches; None where there is no home."""
    if own := os.environ.get("BAGCERT_CACHE"):
        return Path(own)
    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        # A relative XDG folder is to be ignored, says its specification.
        if (base := os.environ.get(variable)) and os.path.isabs(base):
            return Path(base) / "bagcert"
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return home.joinpath(*(("Library", "Caches") if sys.platform == "darwin" else (".cache",)), "bagcert")


def report_key(model: Any) -> str:
    """The hash of all that a measurement depends on: weights, layers, geometry, head, device, arithmetic, libraries."""
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
    """The report kept there, if the file is whole, for this key, and says what a report can say."""
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
    """Settings of torch that choose kernels."""
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    precisions = [*product_precision(), cudnn.conv.fp32_precision, mkldnn.conv.fp32_precision]
    settings = (*precisions, cudnn.benchmark, cudnn.deterministic)
    return [str(setting) for setting in (*settings, mkldnn.is_available(), getattr(mkldnn, "enabled", None))]


@cache
def _machine(device_type: str) -> list[str]:
    """The processor: home folders are shared between machines that round otherwise."""
    found = [platform.machine(), torch.backends.cpu.get_cpu_capability(), platform.processor()]
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
        found += [next((line for line in lines if line.startswith(kind)), "") for kind in ("model name", "flags")]
    if device_type == "cuda":
        found += [torch.cuda.get_device_name(), str(torch.version.cuda), str(torch.backends.cudnn.version())]
    return found
