"""Measurement of the locality of an ONNX file with onnxruntime, using the geometry of its original model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bagcert.devices import dtype_name
from bagcert.errors import UnreadableError, UnsoundError, UsageError, reason_of
from bagcert.io.files import read_input
from bagcert.io.optional import require
from bagcert.locality.measurement import run_probes, shapes_for
from bagcert.locality.report import LocalityReport
from bagcert.locality.target import Backend
from bagcert.nets.region_scorer import RegionScorer

MOST_BYTES = 2**31  # an ONNX file cannot be larger
# Operators whose range or statistics are computed from the whole tensor at run time.
DYNAMIC = (b"DynamicQuantizeLinear", b"DynamicQuantizeMatMul", b"DynamicQuantizeLSTM", b"MatMulInteger")


class OnnxScores:
    """Function from images to real-valued score maps, computed from an ONNX file.

    Args:
        path: path of the file. The first input must be images, float [batch, 3, height, width] in [0, 1] or uint8
            [batch, height, width, 3]. The first output with four dimensions must be the scores.

    Raises:
        UsageError: onnxruntime is not installed, or the file has no such input or output.
        UnreadableError: the file is missing or not an ONNX model.
    """

    def __init__(self, path: Path) -> None:
        self._runtime: Any = require("onnxruntime", "onnx", "measuring an ONNX file")
        self._model = read_input(path, MOST_BYTES)
        self._path = path
        self._session = self._start(torch.get_num_threads())
        first = self._session.get_inputs()[0]
        if first.type not in ("tensor(float)", "tensor(uint8)") or len(first.shape) != 4:
            raise UsageError(f"the first input of {path} must be images, float or uint8, of four dimensions")
        self.bytes = first.type == "tensor(uint8)"
        self.batch_size = first.shape[0] if isinstance(first.shape[0], int) else None
        self._input = first.name
        outputs = [out for out in self._session.get_outputs() if len(out.shape or ()) == 4]
        if not outputs:
            raise UsageError(f"{path} has no output of four dimensions; scores are [batch, classes, rows, cols]")
        self._output = outputs[0].name

    @property
    def quantized_dynamically(self) -> bool:
        """Whether the file contains an operator whose range is computed from the whole tensor."""
        return any(name in self._model for name in DYNAMIC)

    def __call__(self, images: Tensor) -> Tensor:
        """Compute `z` [batch, classes, rows, cols] for images [batch, 3, height, width] in [0, 1]."""
        feed = images.numpy()
        if self.bytes:
            feed = np.ascontiguousarray(np.rint(feed * 255).astype(np.uint8).transpose(0, 2, 3, 1))
        try:
            (scores,) = self._session.run([self._output], {self._input: feed})
        except Exception as error:  # onnxruntime has many exception types
            raise UsageError(f"{self._path} does not run on images {list(feed.shape)}: {reason_of(error)}") from None
        return torch.from_numpy(np.asarray(scores))

    @contextmanager
    def threads(self, count: int) -> Iterator[None]:
        """Context manager that uses a session with `count` threads."""
        before = self._session
        try:
            self._session = self._start(count)
            yield
        finally:
            self._session = before

    def _start(self, threads: int) -> Any:
        options = self._runtime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            return self._runtime.InferenceSession(str(self._path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UnreadableError(f"{self._path} is not an ONNX model: {reason_of(error)}") from None


def measure_onnx(
    path: Path, model: Any, patch: object = None, images: Tensor | None = None, seed: int = 0
) -> LocalityReport:
    """Run the numerical probes of `measure` on an ONNX file, with the geometry and the head of its original model.

    Args:
        model: the defense or region scorer from which the file was exported.
    """
    scorer: RegionScorer = getattr(model, "scorer", model)
    scores = OnnxScores(path)
    grid, shapes = scorer.grid(), shapes_for(model, patch, scorer.image_size)
    out = scores(torch.zeros(scores.batch_size or 1, scorer.channels, *scorer.image_size))
    if tuple(out.shape[2:]) != grid.map_size:
        raise UnsoundError(f"{path} returns a map of {tuple(out.shape[2:])} regions, the model's are {grid.map_size}")

    def head(z: Tensor) -> Tensor:
        return scorer.integers(z.float()) if z.dtype.is_floating_point else z

    backend = Backend(
        scores,
        head,
        grid,
        scorer.channels,
        takes_nan=not scores.bytes,
        threads=scores.threads,
        batch_size=scores.batch_size,
    )
    probes, largest = run_probes(backend, shapes, images, True, seed)
    refusal = f"{path.name} is quantized dynamically: a range is that of the whole batch"
    return LocalityReport(
        model=path.name,
        backend="onnxruntime",
        device="cpu",
        dtype=dtype_name(out.dtype),
        threads=torch.get_num_threads(),
        image_size=scorer.image_size,
        patches=shapes,
        footprint="unmeasured",
        probes=probes,
        largest_score=largest,
        refusal=refusal if scores.quantized_dynamically else "",
        thorough=True,
        guardable=scorer.readout is None,
    )
