"""Backends: runtimes for the forward pass. They compute real-valued scores; heads and rules always run in this package.

To add a backend, add a module and an entry in `RUNNERS`.
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

RUNNERS: dict[str, type[Runner]] = {"onnxruntime": OnnxRuntimeRunner}  # backends other than torch, by name

BACKENDS = ("torch", *RUNNERS)


def get_runner(name: str, scorer: Any, dtype: torch.dtype | None = None, folder: Path | None = None) -> Runner | None:
    """Returns the runner that computes the scores of a region scorer on a backend; None for torch.

    The weights are copied: later changes of the scorer do not affect the runner.

    Args:
        dtype: None is float32.
        folder: cache folder for graphs; None for no cache.
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
    """Returns the backends whose libraries are installed, torch first."""
    runners = [name for name, runner in RUNNERS.items() if installed(runner.libraries)]
    return ["torch", *runners]


def fastest_backend(device: str = "auto", dtype: str = "float32") -> str:
    """Returns the backend for `auto`: onnxruntime if it is installed, else torch.

    onnxruntime is only chosen for float32 on a machine without an accelerator. benchmarks/backends.py measures the
    speed, and checks that certificates do not change.
    """
    if dtype != "float32" or device not in ("auto", "cpu"):
        return "torch"
    if device == "auto" and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return "torch"
    return "onnxruntime" if "onnxruntime" in installed_backends() else "torch"
