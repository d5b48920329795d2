"""OpenVINO on the CPU, in float32 or bfloat16.

It reads the ONNX graph itself: its own converter from torch reports its use to its makers, which this package does not.
"""

from functools import cache
from typing import Any

import numpy as np

from bagcert.errors import UsageError
from bagcert.nets.runtimes.base import Runner, Session
from bagcert.nets.runtimes.onnx_graph import LIBRARIES, graph_of


class OpenVinoRunner(Runner):
    """A network through OpenVINO."""

    name = "openvino"
    libraries = ("openvino", *LIBRARIES)
    extra = "openvino"

    def require_dtype(self) -> None:
        """Bfloat16 only where the processor has it."""
        if self.dtype is not None and "BF16" not in core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise UsageError("this processor has no bfloat16 arithmetic for the backend openvino; use float32")

    def start(self, image: tuple[int, int, int], threads: int) -> Session:
        """A compiled model for any number of images at once."""
        model = compiled(graph_of(self.net, image, self.folder), threads, "f32" if self.dtype is None else "bf16")
        request = model.create_infer_request()

        def scores(images: np.ndarray) -> np.ndarray:
            return np.array(request.infer([images])[0], dtype=np.float32)  # copied: the request keeps its buffer

        return scores


@cache
def core() -> Any:
    """The one core of this process, which is never let go.

    OpenVINO gives the thread that first uses it another stack for signals, and takes it back with its last object. If
    another thread drops that one, the first is left without: its next signal, a Ctrl-C even, would end the process.
    """
    import openvino

    return openvino.Core()


def compiled(model: Any, threads: int, precision: str = "f32") -> Any:
    """A model (ONNX bytes, a file, or one that is read) compiled for the CPU.

    The precision is always asked for: on some processors the default is bfloat16.
    """
    return core().compile_model(
        core().read_model(model) if isinstance(model, bytes | str) else model,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": precision,
            "INFERENCE_NUM_THREADS": threads,
            "PERFORMANCE_HINT": "LATENCY",  # all threads work on one batch
        },
    )
