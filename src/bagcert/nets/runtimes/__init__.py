"""Backends: alternative runtimes for the forward pass, from images to real-valued scores.

Heads and rules do not depend on the backend. To add a backend, add a module and a line in `RUNNERS`.
"""

from pathlib import Path
from typing import Any

import torch

from bagcert.errors import UsageError, nearest
from bagcert.io.optional import installed
from bagcert.nets.runtimes.base import Runner
from bagcert.nets.runtimes.onnx_graph import inference_copy
from bagcert.nets.runtimes.onnxruntime import OnnxRuntimeRunner

__all__ = ["BACKENDS", "RUNNERS", "Runner", "fastest_backend", "get_runner", "installed_backends"]

RUNNERS: dict[str, type[Runner]] = {"onnxruntime": OnnxRuntimeRunner}
"""Backends other than torch, by name."""

BACKENDS = ("torch", *RUNNERS)


def get_runner(name: str, scorer: Any, dtype: torch.dtype | None = None, folder: Path | None = None) -> Runner | None:
    """Create the runner of a region scorer for a backend; None for torch, which needs no runner.

    The weights are copied, so later changes of the scorer do not affect the runner.

    Args:
        name: one of `BACKENDS`.
        scorer: a region scorer on the CPU.
        dtype: must be None (float32) except for torch.
        folder: folder in which graphs are cached between processes; None disables the cache.

    Raises:
        UsageError: unknown backend, missing libraries, or an unsupported dtype or device.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown backend {name!r}{nearest(name, BACKENDS)}")
    if name == "torch":
        return None
    if scorer.device.type != "cpu":
        raise UsageError(f"the backend {name} runs on the CPU, got the device {scorer.device}")
    if dtype is not None:
        raise UsageError(f"the backend {name} computes in float32; torch has bfloat16")
    return RUNNERS[name](inference_copy(scorer), folder)


def installed_backends() -> list[str]:
    """List the backends whose libraries are installed, torch first."""
    runners = [name for name, runner in RUNNERS.items() if installed(runner.libraries)]
    return ["torch", *runners]


def fastest_backend(device: str = "auto", dtype: str = "float32") -> str:
    """Fastest installed backend: onnxruntime for float32 on the CPU if installed, otherwise torch.

    The device "auto" counts as CPU only if there is no accelerator. benchmarks/backends.py measures the speed and
    compares the certificates.
    """
    if dtype != "float32" or device not in ("auto", "cpu"):
        return "torch"
    if device == "auto" and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return "torch"
    return "onnxruntime" if "onnxruntime" in installed_backends() else "torch"
