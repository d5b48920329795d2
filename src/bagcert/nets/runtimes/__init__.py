"""Backends: other runtimes for the forward pass. They turn images into real-valued scores; heads and rules stay ours.

Adding one is one file and one line in `RUNNERS`.
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
    """What computes the scores of a region scorer on a backend; None for torch, which is the scorer itself.

    The weights are copied: what happens to the scorer later does not reach the runner.

    Args:
        name: one of `BACKENDS`.
        scorer: a region scorer, on the CPU.
        dtype: None is float32.
        folder: where graphs are kept between processes; None keeps none.

    Raises:
        UsageError: no such backend; its libraries are not installed; another dtype than float32, or another device.
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
    """The backends whose libraries are there, torch first."""
    runners = [name for name, runner in RUNNERS.items() if installed(runner.libraries)]
    return ["torch", *runners]


def fastest_backend(device: str = "auto", dtype: str = "float32") -> str:
    """The backend to take where none is asked for: onnxruntime if it is installed, else torch.

    Only in float32 on a machine without an accelerator; elsewhere torch. benchmarks/backends.py measures the speed, and
    that certificates stay what they are.
    """
    if dtype != "float32" or device not in ("auto", "cpu"):
        return "torch"
    if device == "auto" and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        return "torch"
    return "onnxruntime" if "onnxruntime" in installed_backends() else "torch"
