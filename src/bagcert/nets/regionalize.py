"""Conversion of image classifiers with mean pooling to networks with one score per region."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from bagcert.errors import UnsoundError, UsageError, sanitize
from bagcert.nets.receptive_field.derive import eval_mode
from bagcert.nets.receptive_field.operations import LAYERS_NOT_LOCAL

BY_HAND = (
    "remove pooling and flatten, and replace the linear layer by nn.Conv2d(channels, classes, 1) with the same weights"
)
_FLATTENS = (torch.flatten, "flatten", torch.squeeze, "squeeze", "view", "reshape", torch.reshape)
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_MEANS = (torch.mean, "mean", F.adaptive_avg_pool2d, F.avg_pool2d)
_MAXIMA = (torch.amax, "amax", torch.max, "max", F.adaptive_max_pool2d, F.max_pool2d)


def regionalize(module: nn.Module, image_size: tuple[int, int] | None = None) -> nn.Module:
    """Remove the mean pooling at the end of a classifier, so that it returns one score per region and class.

    The linear layer becomes a 1x1 convolution with the same weights. A linear function of a mean equals the mean of the
    linear function, so the mean of the region scores equals the output of the classifier up to rounding. Layers before
    the pooling are unchanged; `RegionScorer.from_module` checks whether they are local.

    Args:
        module: maps images [batch, channels, height, width] to class scores [batch, classes]. It must be traceable by
            `torch.fx` and end with one pooling to 1x1 (`nn.AdaptiveAvgPool2d(1)`, a mean over rows and columns, or an
            average over windows of the whole map), followed by any number of `nn.Flatten`, `nn.Linear` and dropout.
        image_size: (height_px, width_px); needed only for `nn.AvgPool2d`, to check that its window is the whole map.

    Returns:
        A copy that returns a map [batch, classes, rows, columns] and can be trained. It has the class of `module` if
        only layers were replaced, and is a `torch.fx.GraphModule` otherwise.

    Raises:
        UnsoundError: the classifier does not end with a mean of region scores; the message gives the reason.
        UsageError: the module cannot be traced, or `image_size` is missing.

    >>> classifier = nn.Sequential(nn.Conv2d(3, 8, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    >>> regionalize(classifier)(torch.rand(1, 3, 8, 8)).shape
    torch.Size([1, 2, 5, 5])
    """
    for name, part in module.named_modules():
        for kind, reason in LAYERS_NOT_LOCAL.items():
            if isinstance(part, kind):
                _refuse(f"its layer {name or 'itself'!r} ({type(part).__name__}) is not local: {reason}")
    copied = copy.deepcopy(module)
    try:
        with eval_mode(copied):
            traced = fx.symbolic_trace(copied)
    except Exception as error:  # modules may fail in any way on symbolic tensors
        raise UsageError(f"the classifier cannot be traced by torch.fx ({sanitize(error)}); {BY_HAND}") from error
    end = _End(traced, None if image_size is None else _shapes(traced, module, image_size))
    end.walk()
    return end.without_pooling(copied)


def _refuse(why: str) -> Any:
    raise UnsoundError(f"this classifier is not a mean of region scores: {why}")


def _shapes(traced: fx.GraphModule, module: nn.Module, image_size: tuple[int, int]) -> dict[fx.Node, tuple[int, ...]]:
    """Compute the shape of every tensor for one image of that size."""
    weight = next((p for p in module.parameters() if p.ndim == 4), None)
    if weight is None:
        raise UsageError("the classifier has no convolution to take the number of image channels from")
    found: dict[fx.Node, tuple[int, ...]] = {}

    class Watched(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            out = super().run_node(n)
            if isinstance(out, Tensor):
                found[n] = tuple(out.shape)
            return out

    try:
        with eval_mode(traced), torch.no_grad():
            Watched(traced).run(torch.zeros(1, weight.shape[1], *image_size).to(weight))
    except Exception as error:
        raise UsageError(f"the classifier does not run on an image of {image_size} px: {sanitize(error)}") from error
    return found


class _End:
    """The end of a traced classifier, from the pooled map to the output."""

    def __init__(self, traced: fx.GraphModule, shapes: dict[fx.Node, tuple[int, ...]] | None) -> None:
        self._traced, self._shapes = traced, shapes
        self.linear: list[fx.Node] = []
        self.removed: list[fx.Node] = []

    def walk(self) -> None:
        """Walk back from the output until rows and columns are pooled."""
        (output,) = (node for node in self._traced.graph.nodes if node.op == "output")
        node = output.args[0]
        pooled: set[int] = set()
        while pooled != {2, 3}:
            if not isinstance(node, fx.Node):
                _refuse("it does not return one tensor")
            if node.op in ("placeholder", "get_attr"):
                _refuse("it pools no map")
            if len([user for user in node.users if not _is_size(user)]) != 1:
                _refuse(f"what {self._name(node)} returns is used more than once")
            pooled |= self._step(node, between=bool(pooled))
            node = node.args[0] if node.args else node.kwargs.get("input")

    def _step(self, node: fx.Node, between: bool) -> set[int]:
        """Process one node and return which of dimensions 2 and 3 it pools.

        Args:
            between: whether the node lies between the mean over one of the dimensions and the mean over the other.
        """
        layer, name, target = self._layer(node), self._name(node), node.target
        if layer is not None and sum(self._layer(other) is layer for other in self._traced.graph.nodes) > 1:
            _refuse(f"{name} is used more than once")
        if isinstance(layer, _DROPOUTS) or target is F.dropout or isinstance(layer, nn.Identity):
            return set()
        if not between:
            if isinstance(layer, nn.Linear):
                self.linear.append(node)
                return set()
            if isinstance(layer, nn.Flatten) or target in _FLATTENS:
                self.removed.append(node)
                return set()
            if isinstance(layer, nn.Conv2d) and (layer.kernel_size, layer.stride) == ((1, 1), (1, 1)):
                if layer.padding not in ((0, 0), "valid", "same"):
                    _refuse(f"{name} pads the map")
                return set()  # applies equally to a mean and to a map
        dims = self._pooled_dims(node, layer, name)
        self.removed.append(node)
        return dims

    def _layer(self, node: fx.Node) -> nn.Module | None:
        return self._traced.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _pooled_dims(self, node: fx.Node, layer: nn.Module | None, name: str) -> set[int]:
        target = node.target
        if isinstance(layer, nn.AdaptiveAvgPool2d) or target is F.adaptive_avg_pool2d:
            size = layer.output_size if layer is not None else _argument(node, 1, "output_size")
            if size in (1, (1, 1), [1, 1]):
                return {2, 3}
            _refuse(f"{name} pools to {size}, and what follows weighs each of these places in its own way")
        if target in (torch.mean, "mean"):
            dims = _argument(node, 1, "dim")
            dims = (dims,) if isinstance(dims, int) else dims
            named = {dim + 4 if dim < 0 else dim for dim in dims or ()}
            if named and named <= {2, 3} and all(isinstance(dim, int) for dim in dims):
                if any(dim < 0 for dim in dims) and len(named) == 1:
                    _refuse(f"{name} names its dimension from the end; write mean((2, 3))")
                return named
            _refuse(f"{name} is not over rows and columns (dimensions 2 and 3) alone")
        if isinstance(layer, nn.AvgPool2d) or target is F.avg_pool2d:
            return self._whole_window(node, layer, name)
        if isinstance(layer, nn.AdaptiveMaxPool2d | nn.MaxPool2d) or target in _MAXIMA:
            _refuse(f"{name} takes the maximum over the map, which is the score of one region and not their mean")
        if isinstance(layer, nn.Softmax | nn.LogSoftmax | nn.Softmax2d) or target in (F.softmax, torch.softmax):
            _refuse(f"{name} is not linear; leave it out, the class with the largest score stays the same")
        if isinstance(layer, nn.BatchNorm1d):
            _refuse(f"{name} is not converted; fold it into the linear layer first")
        if not self._pools_before(node) and self.removed:
            _refuse(
                f"{self._name(self.removed[-1])} merges the rows and columns of a map, so that what follows weighs "
                "each place in its own way"
            )
        between = "is not linear, and stands between the mean and the scores" if self.linear else "is no mean pooling"
        return _refuse(f"{name} {between}")

    def _pools_before(self, node: Any) -> bool:
        """Whether there is a pooling between the image and a node."""
        while isinstance(node, fx.Node) and node.op != "placeholder":
            if isinstance(self._layer(node), nn.AdaptiveAvgPool2d | nn.AvgPool2d) or node.target in _MEANS:
                return True
            node = node.args[0] if node.args else None
        return False

    def _whole_window(self, node: fx.Node, layer: nn.Module | None, name: str) -> set[int]:
        if self._shapes is None:
            raise UsageError(f"{name} averages windows; give image_size, which tells whether a window is the whole map")
        source = node.args[0]
        assert isinstance(source, fx.Node)
        rows, cols = self._shapes[source][2:]
        kernel: Any = layer.kernel_size if layer is not None else _argument(node, 1, "kernel_size")
        padding = layer.padding if layer is not None else _argument(node, 3, "padding") or 0
        sides = (kernel, kernel) if isinstance(kernel, int) else tuple(kernel)
        divisor = layer.divisor_override if layer is not None else _argument(node, 6, "divisor_override")
        if sides != (rows, cols) or padding not in (0, (0, 0), [0, 0]) or divisor is not None:
            _refuse(f"{name} averages windows of {sides}, and the map has {rows} rows and {cols} columns")
        return {2, 3}

    def _name(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"layer {node.target!r} ({type(self._traced.get_submodule(str(node.target))).__name__})"
        return f"the operation {getattr(node.target, '__name__', node.target)!r}"

    def without_pooling(self, copied: nn.Module) -> nn.Module:
        """Build the classifier with 1x1 convolutions instead of linear layers and without pooling."""
        in_place = all(node.op == "call_module" for node in (*self.removed, *self.linear))
        home = copied if in_place else self._traced
        for node in self.linear:
            _replace(home, str(node.target), _as_convolution(home.get_submodule(str(node.target))))
        for node in self.removed:
            if in_place:
                _replace(home, str(node.target), nn.Identity())
            else:
                node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
                self._traced.graph.erase_node(node)
        if in_place:
            return copied
        self._traced.graph.eliminate_dead_code()
        self._traced.delete_all_unused_submodules()
        self._traced.recompile()
        return self._traced.train(copied.training)


def _is_size(node: fx.Node) -> bool:
    """Whether a node uses only the size of a tensor."""
    return node.target in ("size", "dim") or (node.target is getattr and node.args[1] in ("shape", "ndim"))


def _replace(home: nn.Module, name: str, new: nn.Module) -> None:
    """Replace a layer under all of its names."""
    old = home.get_submodule(name)
    for parent in list(home.modules()):
        for child in [child for child, found in parent._modules.items() if found is old]:
            parent._modules[child] = new


def _argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def _as_convolution(linear: nn.Module) -> nn.Conv2d:
    assert isinstance(linear, nn.Linear)
    where: Any = {"device": linear.weight.device, "dtype": linear.weight.dtype}
    convolution = nn.Conv2d(linear.in_features, linear.out_features, 1, bias=linear.bias is not None, **where)
    with torch.no_grad():
        convolution.weight.copy_(linear.weight[:, :, None, None])
        if linear.bias is not None:
            convolution.bias.copy_(linear.bias)  # type: ignore[union-attr]
    return convolution.train(linear.training)
