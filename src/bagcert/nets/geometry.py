"""The receptive fields of a network, derived from its layers.

The network runs once, on an image that remembers: every tensor on the way carries which image rows each of its
rows depends on, and likewise for columns (METHOD section 2, "Geometry"). Each operation is looked up in a table
of what it does to those two tables. What is not in the table is refused by name: a certificate may rest only on
operations that are known to be local. Shapes are real, so padding, ceil_mode and control flow that depends on
sizes need no special care; control flow that depends on pixel values is refused.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bagcert.errors import BagcertError, UnsoundError, UsageError
from bagcert.grid import RegionGrid
from bagcert.nets.footprint import Call, Footprint, Layer, Tracked
from bagcert.nets.operations import HANDLERS, LAYERS_NOT_LOCAL


class _Watched(Tracked):
    """Every torch function that is given one goes through `_interpret`."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _interpret(func, args, kwargs or {})


def derive_grid(module: nn.Module, image_size: tuple[int, int], channels: int = 3) -> RegionGrid:
    """Which pixels each cell of a network's output map can depend on, from its layers alone.

    Args:
        module: images [batch, channels, height, width] to a map [batch, classes, rows, columns]. It runs once,
            in eval mode, and is left as it was.
        image_size: (height_px, width_px).
        channels: of the image.

    Returns:
        The grid; where branches of different geometry meet, the smallest product of rows and columns that
        covers them.

    Raises:
        UnsoundError: a layer is not local, or not known to be; the sentence names it.
        UsageError: the network cannot be followed (unsupported layer, control flow on pixel values, an output
            that is no map), or does not run on such an image.

    >>> grid = derive_grid(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 4, stride=2)), (32, 32))
    >>> grid.map_size, grid.receptive_field
    ((14, 14), (6, 6))
    """
    parameter = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    # NaN marks what comes from the image, should it lose its footprint on the way. Two images, so that regrouping
    # a batch shows in the shapes.
    image = torch.full((2, channels, *image_size), torch.nan).to(parameter).as_subclass(_Watched)
    image.footprint = Footprint((0, 2, 3), *(np.eye(pixels, dtype=bool) for pixels in image_size))
    image.aliased = False
    image.layers = []
    try:
        with torch.no_grad(), eval_mode(module), _named_layers(module, image.layers):
            out = module(image)
    except BagcertError:
        raise
    except Exception as error:
        size = f"{channels}x{image_size[0]}x{image_size[1]}"
        raise UsageError(f"the network cannot be followed on an image of {size}: {error}") from error
    if not isinstance(out, Tracked):
        found = "a tensor that does not come from the image" if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"a network must return one map [batch, classes, rows, columns], this one returns {found}")
    footprint = out.footprint
    with torch._C.DisableTorchFunctionSubclass():
        if out.ndim != 4 or footprint.dims != (0, 2, 3):
            raise UsageError(
                f"a network must return one map [batch, classes, rows, columns], this one returns {list(out.shape)}"
            )
    return RegionGrid(footprint.rows, footprint.cols)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Eval mode inside; afterwards every submodule is in the mode it was in."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _named_layers(module: nn.Module, layers: list[Layer]) -> Iterator[None]:
    """Keeps in `layers` which layers are being called."""
    with ExitStack() as hooks:
        for name, part in module.named_modules():
            layer = Layer.of(name, part)
            if isinstance(part, torch.jit.ScriptModule):
                raise UsageError(f"{layer.text} is TorchScript, which cannot be followed; give the module it came from")
            if type(part).__name__ == "OptimizedModule":
                raise UsageError(f"{layer.text} is compiled, which cannot be followed; give the module it came from")
            enter = part.register_forward_pre_hook(partial(_enter, layers, layer), prepend=True)
            leave = part.register_forward_hook(partial(_leave, layers))
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        yield


def _enter(layers: list[Layer], layer: Layer, module: nn.Module, inputs: Any) -> None:
    layers.append(layer)
    for kind, reason in LAYERS_NOT_LOCAL.items():
        if isinstance(module, kind):
            raise UnsoundError(f"{layer.text} is not local: {reason}")


def _leave(layers: list[Layer], *call: Any) -> None:
    layers.pop()


def _interpret(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs one torch function and works out the footprint of what comes out."""
    call = Call(func, args, kwargs)
    handler = HANDLERS.get(func)
    if handler is None:
        call.refuse("it is not among the operations that are known to be")
    if kwargs.get("out") is not None or (call.in_place and not isinstance(args[0], Tracked)):
        call.unsupported("writes the image's values into another tensor")
    if any(value.is_floating_point() and value.isnan().any() for value in call.plain):
        call.unsupported("is given values of the image that have lost their way (or weights that are NaN)")
    prints = handler(call, *args, **kwargs)
    if prints is None:
        return call.out
    several = isinstance(call.out, tuple | list)
    parts = list(call.out) if several else [call.out]
    parts = [_track(call, part, prints[i] if isinstance(prints, list) else prints) for i, part in enumerate(parts)]
    return type(call.out)(parts) if several else parts[0]  # named tuples of max(dim) stay what they are


def _track(call: Call, result: Tensor, footprint: Footprint) -> Tracked:
    if isinstance(result, Tracked):  # written in place, or handed through
        # What shares its memory would change as well, without its footprint.
        if result.aliased and not footprint.same(result.footprint):
            call.unsupported("writes into a tensor that shares its memory; write it out of place")
        result.footprint = footprint
        return result
    sharing = [t for t in call.tracked if t.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()]
    tracked = result.as_subclass(_Watched)
    tracked.footprint, tracked.layers, tracked.aliased = footprint, call.tracked[0].layers, bool(sharing)
    for source in sharing:
        source.aliased = True
    return tracked
