"""Static quantization of the network to 8 bits; the head, the rule and the proof stay as they are.

The ranges are constants found on calibration images. Dynamic quantization takes its range over the whole tensor at run
time, so that a patch moves every score, and is never used.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bagcert.errors import UsageError, shown
from bagcert.exporting.graph import rule_nodes
from bagcert.nets.runtimes.onnx_graph import INPUT

BATCH = 32


class _Images:
    """Calibration images in batches, as the quantizer asks for them."""

    def __init__(self, images: Tensor) -> None:
        self._batches = iter(images.split(BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch, None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}

    def __iter__(self) -> Any:
        return iter(self.get_next, None)


def quantized(model: Any, images: Tensor, folder: Path) -> Any:
    """The graph with every convolution but the last in 8 bits, per channel.

    Args:
        model: a graph with `z` among its outputs.
        images: calibration images, float [images, channels, height, width] in [0, 1].
        folder: for files on the way.

    Raises:
        UsageError: there is nothing to quantize, or onnxruntime cannot.
    """
    import onnx
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    kept = rule_nodes(model)
    if not any(node.op_type == "Conv" and node.name not in kept for node in model.graph.node):
        raise UsageError("this network has no convolution besides its last one; there is nothing to quantize")
    before, after = folder / "float32.onnx", folder / "int8.onnx"
    onnx.save(model, str(before))
    try:
        with _no_advice():
            quantize_static(
                str(before),
                str(after),
                _Images(images),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=["Conv"],
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
                nodes_to_exclude=kept,
            )
    except Exception as error:  # onnxruntime raises whatever it trips over
        raise UsageError(f"onnxruntime cannot quantize this network: {shown(error)}") from error
    return onnx.load(str(after))


@contextmanager
def _no_advice() -> Iterator[None]:
    """Keeps onnxruntime's advice to optimize the graph first to itself: that would take the rule's nodes along."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
