"""Static quantization of the network to 8 bits. The head and the rule are not quantized.

The ranges are constants, computed on calibration images. Dynamic quantization is never used: it computes the ranges
from the whole tensor at run time, so that a patch would change every score.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bagcert.errors import UsageError, sanitize
from bagcert.exporting.graph import rule_nodes
from bagcert.nets.runtimes.onnx_graph import INPUT

BATCH = 32


class _Images:
    """Data reader that passes calibration images to the quantizer in batches."""

    def __init__(self, images: Tensor) -> None:
        self._batches = iter(images.split(BATCH))

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Returns the next batch; None at the end."""
        batch = next(self._batches, None)
        return None if batch is None else {INPUT: batch.numpy()}

    def __iter__(self) -> Any:
        return iter(self.get_next, None)


def quantized(model: Any, images: Tensor, folder: Path) -> Any:
    """Quantizes every convolution except the last one to 8 bits, per channel.

    Args:
        model: a graph with `z` among its outputs.
        images: calibration images, float [images, channels, height, width] in [0, 1].
        folder: folder for temporary files.

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
    except Exception as error:  # onnxruntime raises many kinds of errors
        raise UsageError(f"onnxruntime cannot quantize this network: {sanitize(error)}") from error
    return onnx.load(str(after))


@contextmanager
def _no_advice() -> Iterator[None]:
    """Silences onnxruntime's advice to optimize the graph first, which would also change the nodes of the rule."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
