"""Conversion of a network for other runtimes: an inference copy on the CPU, and its ONNX graph."""

import copy
import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bagcert.errors import BagcertError, UsageError, sanitize
from bagcert.io.files import read_regular, write_atomically
from bagcert.nets.cost import update_with_weights
from bagcert.nets.receptive_field.module_state import is_told_by_text

OPSET = 18  # supported by every runtime since 2023
INPUT = "images"
REAL_SCORES = "z"
MOST_BYTES = 2**31  # an ONNX file cannot be larger
LIBRARIES = ("onnx", "onnxscript")  # libraries of `to_onnx`

_GRAPHS: dict[str, bytes] = {}  # cache of this process: exporting a graph takes seconds


def inference_copy(scorer: Any) -> nn.Module:
    """Copies normalization and network of a region scorer for inference; maps images in [0, 1] to `z`."""
    net = nn.Sequential(copy.deepcopy(scorer.normalize), copy.deepcopy(scorer.net))
    net = net.cpu().float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return net.eval().requires_grad_(False)


def to_onnx(module: nn.Module, image: tuple[int, int, int], outputs: Sequence[str], batch: int | None = None) -> Any:
    """Exports a module that takes `images`, float32 [batch, channels, height, width], as an ONNX graph.

    The graph contains standard operators and weights, and no information about the machine.

    Args:
        image: (channels, height, width).
        batch: batch size; None for any batch size.

    Raises:
        UsageError: a layer cannot be expressed in ONNX.
    """
    example = torch.rand(batch or 2, *image, generator=torch.Generator().manual_seed(0))
    with _quiet():
        try:
            program = torch.onnx.export(
                _Named(module).eval(),
                (example,),
                input_names=[INPUT],
                output_names=list(outputs),
                dynamic_shapes={INPUT: {0: torch.export.Dim("batch")}} if batch is None else None,
                opset_version=OPSET,
                external_data=False,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:  # the exporter raises many kinds of errors
            raise UsageError(f"this network cannot be written as ONNX: {sanitize(error)}") from error
    assert program is not None
    model = program.model_proto
    _forget_origin(model)
    return model


def graph_of(net: nn.Module, image: tuple[int, int, int], folder: Path | None = None) -> bytes:
    """Returns the ONNX file of a network with the output `z`, cached per process, and per machine with a folder.

    The folder only saves time: a damaged file in it is replaced, and a folder that cannot be written is not an error.

    Args:
        image: (channels, height, width).
    """
    key = network_key(net, image)
    if key is None:
        return to_onnx(net, image, [REAL_SCORES]).SerializeToString()
    if key not in _GRAPHS:
        path = None if folder is None else folder / f"{key}.onnx"
        found = None if path is None else _kept(path)
        if found is None:
            found = to_onnx(net, image, [REAL_SCORES]).SerializeToString()
            if path is not None:
                with suppress(BagcertError, OSError):
                    write_atomically(path, _digest(found) + found)
        _GRAPHS[key] = found
    return _GRAPHS[key]


def network_key(net: nn.Module, *more: object) -> str | None:
    """Returns a hash of a network's layers and weights; None if they may not determine what the network computes."""
    if not is_told_by_text(net):
        return None
    versions = [metadata.version(name) for name in ("bagcert", "torch", *LIBRARIES)]
    digest = hashlib.sha256(repr((net, more, versions)).encode())
    update_with_weights(digest, net)
    return digest.hexdigest()


def _kept(path: Path) -> bytes | None:
    """Reads a cached file, if it is complete."""
    try:
        content = read_regular(path, MOST_BYTES)
    except OSError:
        return None
    digest, found = content[:32], content[32:]
    return found if digest == _digest(found) else None


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


class _Named(nn.Module):
    """Wrapper that sets the name of the input, independent of the module's parameter name."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, images: Tensor) -> Any:
        return self.module(images)


def _forget_origin(model: Any) -> None:
    """Removes the exporter's notes about source files and paths on this machine."""
    del model.metadata_props[:]
    model.doc_string = ""
    graphs = [model.graph, *model.functions]
    for graph in graphs:
        graph.doc_string = ""
        del graph.metadata_props[:]
        for part in (*graph.node, *graph.value_info, *getattr(graph, "input", ()), *getattr(graph, "initializer", ())):
            if not isinstance(part, str):
                part.doc_string = ""
                if hasattr(part, "metadata_props"):
                    del part.metadata_props[:]
    for output in model.graph.output:
        del output.metadata_props[:]


@contextmanager
def _quiet() -> Iterator[None]:
    before = logging.root.manager.disable
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
