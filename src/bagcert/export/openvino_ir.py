"""An exported graph as OpenVINO's own files."""

from pathlib import Path

import numpy as np

from bagcert.export.check import Run
from bagcert.io.optional import require_installed
from bagcert.nets.runtimes.openvino import compiled, core


def require_openvino() -> None:
    """Says which extra brings OpenVINO, if it is missing.

    Raises:
        UsageError: it is.
    """
    require_installed(["openvino"], "openvino", "writing OpenVINO's files")


def intermediate(model: bytes, metadata: dict[str, str], folder: Path, name: str) -> tuple[bytes, bytes]:
    """The graph as `.xml` and `.bin`, weights in float32; the metadata is under `bagcert` in its run-time info."""
    import openvino

    graph = core().read_model(model)
    for key, value in metadata.items():
        graph.set_rt_info(value, ["bagcert", key])
    path = folder / f"{name}.xml"
    openvino.save_model(graph, path, compress_to_fp16=False)
    return path.read_bytes(), path.with_suffix(".bin").read_bytes()


def runner(xml: Path, threads: int) -> Run:
    """The files as a function, in float32, which has to be asked for: the default may be bfloat16."""
    model = compiled(str(xml), threads)
    request = model.create_infer_request()

    def run(inputs: np.ndarray) -> list[np.ndarray]:
        in_range = [np.ones(len(inputs), dtype=bool) for _ in model.inputs[1:]]  # of the part behind the network
        found = request.infer([inputs, *in_range])
        return [np.array(found[k]) for k in range(len(model.outputs))]

    return run
