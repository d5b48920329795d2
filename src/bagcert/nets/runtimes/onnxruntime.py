"""The onnxruntime backend, on the CPU in float32."""

from typing import Any

import numpy as np

from bagcert.nets.runtimes.base import Runner, Session
from bagcert.nets.runtimes.onnx_graph import INPUT, LIBRARIES, graph_of


class OnnxRuntimeRunner(Runner):
    """Runs a network in onnxruntime."""

    name = "onnxruntime"
    libraries = ("onnxruntime", *LIBRARIES)
    extra = "onnx"

    def start(self, image: tuple[int, int, int], threads: int) -> Session:
        """Starts a session with the network's graph."""
        session = onnx_session(graph_of(self.net, image, self.folder), threads)

        def scores(images: np.ndarray) -> np.ndarray:
            (z,) = session.run(None, {INPUT: images})
            return z

        return scores


def onnx_session(model: bytes, threads: int) -> Any:
    """Creates an onnxruntime session on the CPU with the given number of threads."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Otherwise its threads keep spinning after a run and slow down the rules that follow.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
