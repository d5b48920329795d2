"""Networks stored as a list of operations, so that custom modules can be saved without their code.

`as_graph` converts a module to such a list with `torch.export`. The list may contain only operations from the table
below; nothing else is ever called. The geometry is not stored; it is derived from the operations at each load.
"""

import hashlib
import math
import warnings
from collections.abc import Callable
from functools import partial
from operator import getitem
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from bagcert.errors import UsageError, sanitize
from bagcert.nets.receptive_field.derive import eval_mode

MOST_STEPS = 10_000
MOST_VALUES = 1 << 28  # limit for the number of values of one result for one image
MOST_VALUES_IN_ALL = 1 << 32
STORED = "tensors/"  # prefix of the names of tensors; dots are replaced since torch does not allow them


def _layer_norm(
    x: Tensor, shape: list[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    return torch.layer_norm(x, shape, weight, bias, eps)


def _batch_norm(
    x: Tensor, weight: Any, bias: Any, mean: Tensor, variance: Tensor, momentum: float, eps: float
) -> Tensor:
    return nn.functional.batch_norm(x, mean, variance, weight, bias, False, momentum, eps)


def _slice(x: Tensor, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Tensor:
    return x[(slice(None),) * (dim % x.ndim) + (slice(start, end, step),)]


def _select(x: Tensor, dim: int, index: int) -> Tensor:
    return x[(slice(None),) * (dim % x.ndim) + (index,)]


def _unsqueeze(x: Tensor, dim: int) -> Tensor:
    return x[(slice(None),) * (dim % (x.ndim + 1)) + (None,)]


def _size(x: Tensor, dim: int) -> int:
    return x.shape[dim]


def _softmax(x: Tensor, dim: int, *_: Any) -> Tensor:
    return torch.softmax(x, dim)


_NAMED = """abs add amax amin avg_pool2d batch_norm cat clamp clamp_max clamp_min conv2d cos div elu erf exp expm1
    expand gelu glu hardsigmoid hardswish hardtanh layer_norm leaky_relu linear log log1p log_sigmoid logsumexp maximum
    max_pool2d mean minimum mish mul neg pad permute pixel_unshuffle pow prelu reciprocal relu relu6 reshape rms_norm
    rsqrt rsub sigmoid sign silu sin softplus split sqrt sub sum tanh transpose var"""


def _of_torch(name: str) -> Callable[..., Any]:
    """The function with the same arguments as the operation of that name in the output of `torch.export`."""
    return next(
        getattr(home, name)
        for home in (torch._C._VariableFunctions, torch._C._nn, torch.Tensor, torch)
        if hasattr(home, name)
    )


OPERATIONS: dict[str, Callable[..., Any]] = {name: _of_torch(name) for name in _NAMED.split()} | {
    "batch_norm": _batch_norm,
    "item": getitem,
    "layer_norm": _layer_norm,
    "select": _select,
    "size": _size,
    "slice": _slice,
    "softmax": _softmax,
    "unsqueeze": _unsqueeze,
}
"""All operations of stored networks."""

_SPELLED = {
    "_native_batch_norm_legit_no_training": "batch_norm",
    "_softmax": "softmax",
    "_unsafe_view": "reshape",
    "split_with_sizes": "split",
    "sym_size": "size",
    "view": "reshape",
}
"""Other names of some operations in the output of `torch.export`."""
_SAME = ("clone", "alias", "contiguous", "detach", "dropout", "lift_fresh_copy")  # identity functions in inference
_OPTIONS = ("alpha", "approximate", "correction", "keepdim", "rounding_mode")


class Step(BaseModel):
    """One operation of a network.

    Attributes:
        operation: a name from `OPERATIONS`.
        arguments, options: constants, `{"step": n}` for the result of step n (0 is the images, 1 the first operation),
            or `{"tensor": name}` for a weight.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    operation: str
    arguments: list[Any]
    options: dict[str, Any] = {}


Side = Annotated[int, Field(ge=0, le=1 << 31)]


class NetworkGraph(BaseModel):
    """Operations of a network, from normalized images to real-valued scores.

    Attributes:
        parameters, buffers: names and shapes of the tensors, all float32.
        output: number of the step whose result is the score map.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal[1] = 1
    steps: list[Step] = Field(min_length=1, max_length=MOST_STEPS)
    parameters: dict[str, list[Side]] = Field(max_length=MOST_STEPS)
    buffers: dict[str, list[Side]] = Field(max_length=MOST_STEPS)
    output: int

    @model_validator(mode="after")
    def _refers_to_what_is_there(self) -> "NetworkGraph":
        tensors = {*self.parameters, *self.buffers}
        for number, step in enumerate(self.steps, 1):
            if step.operation not in OPERATIONS:
                raise ValueError(f"step {number}: unknown operation {sanitize(step.operation)!r}")
            if unknown := [name for name in step.options if name not in _OPTIONS]:
                raise ValueError(f"step {number}: unknown option {sanitize(unknown[0])!r}")
            for reference in _references([step.arguments, *step.options.values()]):
                _check_reference(reference, number, tensors)
        if not 0 < self.output <= len(self.steps):
            raise ValueError("the output is not the result of a step")
        return self


def _references(value: Any) -> list[dict[str, Any]]:
    if isinstance(value, dict):
        return [value]
    if isinstance(value, list):
        return [reference for part in value for reference in _references(part)]
    if value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"a constant of type {type(value).__name__}")
    return []


def _check_reference(reference: dict[str, Any], number: int, tensors: set[str]) -> None:
    match reference:
        case {"step": int(earlier)} if len(reference) == 1 and 0 <= earlier < number and type(earlier) is int:
            return
        case {"tensor": str(name)} if len(reference) == 1 and name in tensors:
            return
    raise ValueError(f"step {number}: {sanitize(reference)} is neither the result of an earlier step nor a tensor")


class GraphNetwork(nn.Module):
    """Network that executes the steps of a graph. Batch norm is always in eval mode."""

    def __init__(self, graph: NetworkGraph) -> None:
        super().__init__()
        self.graph = graph
        for name, shape in graph.parameters.items():
            self.register_parameter(_stored(name), nn.Parameter(torch.empty(shape)))
        for name, shape in graph.buffers.items():
            self.register_buffer(_stored(name), torch.empty(shape))
        uses = {self.graph.output: len(graph.steps) + 1}
        for number, step in enumerate(graph.steps, 1):
            for reference in _references([step.arguments, *step.options.values()]):
                if "step" in reference:
                    uses[reference["step"]] = max(number, uses.get(reference["step"], 0))
        self._finished: dict[int, list[int]] = {}  # by step, the results that are not needed afterwards
        for result, last in uses.items():
            self._finished.setdefault(last, []).append(result)

    def forward(self, images: Tensor) -> Tensor:
        """Map images [batch, channels, height, width] to scores [batch, classes, rows, cols]."""
        return self._computed(images, lambda result: None)

    def require_bounded(self, images: Tensor) -> Tensor:
        """Execute the graph on the meta device, which computes only shapes, and check the sizes of all results."""
        total = 0

        def count(result: Any) -> None:
            nonlocal total
            parts = result if isinstance(result, tuple | list) else [result]
            sizes = [math.prod(part.shape) for part in parts if isinstance(part, Tensor)]
            total += sum(sizes)
            if max(sizes, default=0) > MOST_VALUES or total > MOST_VALUES_IN_ALL:
                raise UsageError(f"a result of {max(sizes, default=0):,} values is too large")

        try:
            out = self._computed(images, count)
        except UsageError:
            raise
        except Exception as error:  # torch raises different exceptions for invalid arguments
            raise UsageError(f"its operations are inconsistent: {sanitize(error)}") from error
        if not isinstance(out, Tensor) or out.ndim != 4 or len(out) != len(images):
            raise UsageError("its output is not a map [batch, classes, rows, columns]")
        return out

    def _computed(self, images: Tensor, look: Callable[[Any], None]) -> Tensor:
        results: dict[int, Any] = {0: images}
        for number, step in enumerate(self.graph.steps, 1):
            arguments = [self._filled(value, results) for value in step.arguments]
            options = {name: self._filled(value, results) for name, value in step.options.items()}
            results[number] = OPERATIONS[step.operation](*arguments, **options)
            look(results[number])
            for finished in self._finished.get(number, ()):
                del results[finished]
        return results[self.graph.output]

    def _filled(self, value: Any, results: dict[int, Any]) -> Any:
        if isinstance(value, dict):
            return results[value["step"]] if "step" in value else getattr(self, _stored(value["tensor"]))
        return [self._filled(part, results) for part in value] if isinstance(value, list) else value

    def extra_repr(self) -> str:
        """Description of the graph including its hash, since caches compare networks by their text and weights."""
        return f"{len(self.graph.steps)} operations, sha256 {hashlib.sha256(graph_text(self.graph)).hexdigest()}"


def graph_text(graph: NetworkGraph) -> bytes:
    """Serialize a graph to JSON."""
    return graph.model_dump_json().encode()


def _stored(name: str) -> str:
    return STORED + name.replace(".", "/")


def as_graph(net: nn.Module, image: tuple[int, int, int]) -> GraphNetwork:
    """Convert a network to a list of operations with `torch.export`, with copies of its weights on the CPU.

    Args:
        image: (channels, height, width) of the example image.

    Raises:
        UsageError: the network cannot be exported, or contains an operation that is not in `OPERATIONS`.
    """
    if isinstance(net, GraphNetwork):
        return net
    device = next((tensor.device for tensor in net.state_dict().values()), torch.device("cpu"))
    examples = [torch.rand(size, *image, generator=torch.Generator().manual_seed(size)).to(device) for size in (2, 3)]
    with eval_mode(net), torch.no_grad():
        graph, tensors = _exported(net, examples[0])
        stored = GraphNetwork(graph).eval()
        stored.load_state_dict({_stored(name): tensor.detach().cpu().clone() for name, tensor in tensors.items()})
        stored.to(device)
        for images in examples:
            expected, found = net(images), stored(images)
            near = 1e-4 * max(1.0, float(expected.abs().max()))
            if found.shape != expected.shape or not torch.allclose(found, expected, rtol=0, atol=near):
                raise UsageError("this network cannot be saved: its exported operations compute other scores")
    return stored.cpu()


def _exported(net: nn.Module, example: Tensor) -> tuple[NetworkGraph, dict[str, Tensor]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            dynamic = (({0: torch.export.Dim("batch")}),)
            program: Any = torch.export.export(net, (example,), dynamic_shapes=dynamic).run_decompositions({})
        except Exception as error:  # the exporter raises many exception types
            raise UsageError(f"this network cannot be saved: torch.export failed: {sanitize(error)}") from error
    kinds = torch.export.graph_signature.InputKind
    names: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    listed: dict[str, dict[str, list[int]]] = {"parameters": {}, "buffers": {}}
    given = {**program.constants, **dict(program.named_buffers()), **dict(program.named_parameters())}
    for spec in program.graph_signature.input_specs:
        if spec.kind in (kinds.PARAMETER, kinds.BUFFER, kinds.CONSTANT_TENSOR):
            names[spec.arg.name] = spec.target
    references: dict[Any, Any] = {}
    steps: list[Step] = []
    output = 0
    for node in program.graph.nodes:
        if node.op == "placeholder":
            name = names.get(node.name)
            references[node] = {"step": 0} if name is None else {"tensor": name}
            if name is not None and node.users:
                tensors[name] = _float32(given[name], name)
                trained = "parameters" if isinstance(given[name], nn.Parameter) else "buffers"
                listed[trained][name] = list(given[name].shape)
        elif node.op == "output":
            (result,) = node.args[0]
            output = references.get(result, {}).get("step", 0)
        elif node.op == "call_function":
            _add(node, steps, references)
        else:
            raise UsageError(f"this network cannot be saved: it contains a {node.op}, which is not supported")
    return NetworkGraph(steps=steps, output=output, **listed), tensors  # type: ignore[arg-type]


def _float32(tensor: Tensor, name: str) -> Tensor:
    if tensor.dtype != torch.float32:
        raise UsageError(f"this network cannot be saved: its tensor {name!r} is {tensor.dtype}, expected torch.float32")
    return tensor


def _add(node: Any, steps: list[Step], references: dict[Any, Any]) -> None:
    """Append the step of one exported operation; operations that return their first argument are skipped."""
    name = getattr(node.target, "_opname", getattr(node.target, "__name__", str(node.target)))
    if name in _SAME:
        references[node] = references[node.args[0]]
        return
    if name.startswith("_assert") and not node.users:
        return
    source = node.args[0] if node.args else None
    if name == "getitem" and getattr(getattr(source, "target", None), "_opname", "").startswith("_native_batch_norm"):
        references[node] = references[source]  # the first of three results, and the only one in inference
        return
    name = "item" if name == "getitem" else _SPELLED.get(name, name)
    if name not in OPERATIONS:
        raise UsageError(f"this network cannot be saved: the operation {name!r} is not supported")
    referenced = partial(_referenced, references=references)
    options = {key: referenced(value) for key, value in node.kwargs.items() if value is not None}
    steps.append(Step(operation=name, arguments=[referenced(value) for value in node.args], options=options))
    references[node] = {"step": len(steps)}


def _referenced(value: Any, references: dict[Any, Any]) -> Any:
    if isinstance(value, torch.fx.Node):
        return references[value]
    if isinstance(value, list | tuple):
        return [_referenced(part, references) for part in value]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise UsageError(f"this network cannot be saved: an operation has an argument of type {type(value).__name__}")
