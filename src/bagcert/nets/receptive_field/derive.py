"""Derivation of the receptive fields of a network from its layers.

The network is executed on a tracked image. Every tensor computed from it carries a footprint: the image rows on which
each of its rows depends, and the same for columns (docs/method.md, "Score map"). A table defines the effect of each
torch operation on footprints. Operations that are not in the table are refused, since certificates may only rely on
operations that are known to be local. The shapes are real, so padding, ceil_mode and control flow that depends on sizes
need no special treatment.

The network is then executed again on other images, with other batch sizes and with another memory layout. Each time it
must execute the same operations with the same operands, apart from the image (`bagcert.nets.receptive_field.passes`).
Control flow that depends on pixel values or on the batch is therefore refused, as are networks that change from call to
call (`bagcert.nets.receptive_field.module_state`).
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import RLock, get_ident
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from bagcert.errors import BagcertError, UnsoundError, UsageError
from bagcert.grid import RegionGrid
from bagcert.nets.receptive_field.footprint import Call, Footprint, Layer, Tracked, tensors_in
from bagcert.nets.receptive_field.module_state import ModuleState
from bagcert.nets.receptive_field.operations import GIVEN_SIZES, HANDLERS, LAYERS_NOT_LOCAL, tells_no_values
from bagcert.nets.receptive_field.passes import LOST, OTHERWISE, FromImage, Pass, Steps, leaves

_ONE_AT_A_TIME = RLock()  # concurrent passes would see each other's hooks as changes of the network
_IMAGES = 2  # batch size of most passes; with two images, regrouping a batch is visible in the shapes


class _Watched(Tracked):
    """Tracked tensor whose functions are interpreted even if no mode is active, for example in another thread."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        run = next(tensor.run for tensor in tensors_in((args, kwargs)) if isinstance(tensor, Tracked))
        with torch._C.DisableTorchFunctionSubclass():
            return _interpret(run, None, func, args, kwargs)


class _Functions(TorchFunctionMode):
    """Intercepts the torch functions of one pass: interprets tracked tensors and refuses lost values of the image."""

    def __init__(self, run: Pass, steps: Steps) -> None:
        super().__init__()
        self._run, self._steps = run, steps

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            tensors = list(tensors_in((args, kwargs)))
            if any(isinstance(tensor, Tracked) for tensor in tensors):
                return _interpret(self._run, self._steps, func, args, kwargs)
            if any(self._run.memory.holds(tensor) for tensor in tensors):
                self._run.unsupported(getattr(func, "__name__", str(func)), LOST)
            return func(*args, **kwargs)


def derive_grid(
    module: nn.Module, image_size: tuple[int, int], channels: int = 3, batch_sizes: Sequence[int] = (1, 3)
) -> RegionGrid:
    """Derive from the layers of a network which pixels each cell of its output map can depend on.

    Args:
        module: maps images [batch, channels, height, width] to a map [batch, classes, rows, columns]. It is executed in
            eval mode, and its state is restored afterwards.
        image_size: (height_px, width_px).
        batch_sizes: batch sizes, in addition to two, for which the network must compute the same.

    Returns:
        The grid. If branches of different geometry are combined, the grid is the smallest product of rows and columns
        that covers them.

    Raises:
        UnsoundError: a layer is not local, or not known to be local; the message names it.
        UsageError: the network cannot be traced (unsupported layer, control flow that depends on pixel values, state
            that changes from call to call, or an output that is not a map), or does not run on such an image.

    >>> grid = derive_grid(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 4, stride=2)), (32, 32))
    >>> grid.map_size, grid.receptive_field
    ((14, 14), (6, 6))
    """
    parameter = next((p for p in module.parameters() if p.is_floating_point()), torch.empty(0))
    shape, random = (_IMAGES, channels, *image_size), torch.Generator().manual_seed(0)
    noise = torch.rand(shape, generator=random)
    with _ONE_AT_A_TIME, torch.no_grad(), eval_mode(module), _Passes(module) as passes:
        # NaN marks values of the image in case a tensor loses its footprint.
        grid = passes.follow(torch.full(shape, torch.nan).to(parameter))
        for image in (torch.zeros(shape), torch.ones(shape), noise, (noise - 0.5) * 1e30):
            passes.repeat(image.to(parameter))
        for number, images in enumerate(batch_sizes):
            image = torch.rand((images, *shape[1:]), generator=random).to(parameter)
            layout = torch.channels_last if number else torch.contiguous_format  # the layouts that `RegionScorer` uses
            passes.require_same_grid(image.contiguous(memory_format=layout), grid)
        passes.require_settled(noise.to(parameter), grid)
    return grid


class _Passes:
    """Passes through one network, each starting from its original state, which is restored at the end.

    A network may initialize state in its first call, such as a weight computed from parts, if that state is the same
    for every image and later calls do not change it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.layers: list[Layer] = []
        constants = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        self._dispatched, self._called = Steps(constants), Steps(constants)
        self._hooks = ExitStack()

    def __enter__(self) -> "_Passes":
        self._hooks.enter_context(_named_layers(self._module, self))
        self._before = self._after = ModuleState(self._module)
        return self

    def __exit__(self, *exception: object) -> None:
        self.layers.clear()
        self._before.restore()
        self._hooks.close()

    def follow(self, image: Tensor) -> RegionGrid:
        """Run the first pass with a tracked image and record its operations for comparison."""
        grid = _grid_of(self._pass(image, self._dispatched, self._called))
        if self._before.changed() is not None:
            self._after = ModuleState(self._module)
            self._before.restore()
        return grid

    def repeat(self, image: Tensor) -> None:
        """Run a pass with an ordinary tensor, as in deployment."""
        self._pass(image, self._dispatched, None)
        self._require_state()

    def require_same_grid(self, image: Tensor, grid: RegionGrid) -> None:
        """Run a pass with another batch size or memory layout and check that the grid is the same."""
        found = _grid_of(self._pass(image, None, self._called))
        self._require_state()
        if not (grid.covers(found) and found.covers(grid)):
            raise UsageError("the network cannot be traced: its geometry depends on the number of images")

    def require_settled(self, image: Tensor, grid: RegionGrid) -> None:
        """Check that a network that changed in its first call does not change in the second."""
        if self._after is not self._before:
            self._after.restore()
            self.require_same_grid(image, grid)

    def _require_state(self) -> None:
        changed = self._after.changed()
        if self._after is not self._before or changed is not None:
            self._before.restore()
        if changed is not None:
            raise UsageError(f"the network cannot be traced: it changes {changed!r} from call to call")

    def _require_same_map(self, run: Pass, out: Any, called: Steps | None) -> None:
        """Check that the output of the network is the result of the same operation in each pass."""
        self.layers.clear()
        with torch._C.DisableTorchFunction():
            for steps, operands in ((run.steps, run.described(out)), (called, list(map(_described, leaves(out))))):
                if steps and steps.add("return", operands, run.batch):
                    raise UsageError(f"the network cannot be traced: its output {OTHERWISE}")

    def _pass(self, image: Tensor, dispatched: Steps | None, called: Steps | None) -> Any:
        """Run a pass and return the output of the network; the image is tracked if `called` is given."""
        self.layers.clear()
        self.run = run = Pass(len(image), self.layers, dispatched)
        run.memory.add(image)
        for steps in (dispatched, called):
            if steps:
                steps.begin()
        try:
            with run:
                if called:
                    start = Footprint((0, 2, 3), *(np.eye(pixels, dtype=bool) for pixels in image.shape[2:]))
                    tracked = _tracked(image, start, run)
                    with _Functions(run, called):
                        out = self._module(tracked)
                else:
                    out = self._module(image)
            if run.failure:  # the network caught the exception
                raise run.failure
            self._require_same_map(run, out, called)
        except Exception as raised:
            error = run.failure or raised
            if isinstance(error, BagcertError):
                raise error from None
            size = "x".join(map(str, image.shape[1:]))
            raise UsageError(f"the network cannot be traced on an image of {size}: {error}") from error
        finally:
            run.over = True
        return out


def _grid_of(out: Any) -> RegionGrid:
    if not isinstance(out, Tracked):
        found = "a tensor that does not come from the image" if isinstance(out, Tensor) else type(out).__name__
        raise UsageError(f"a network must return one map [batch, classes, rows, columns], this one returns {found}")
    with torch._C.DisableTorchFunctionSubclass():
        if out.ndim != 4 or out.footprint.dims != (0, 2, 3):
            raise UsageError(
                f"a network must return one map [batch, classes, rows, columns], this one returns {list(out.shape)}"
            )
    return RegionGrid(out.footprint.rows, out.footprint.cols)


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Context manager for eval mode; restores the mode of every submodule."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training


@contextmanager
def _named_layers(module: nn.Module, passes: _Passes) -> Iterator[None]:
    """Context manager that records the layers being called in `passes.layers`."""
    with ExitStack() as hooks:
        for name, part in module.named_modules():
            layer = Layer.of(name, part)
            if isinstance(part, torch.jit.ScriptModule):
                raise UsageError(f"{layer.text} is TorchScript, which cannot be traced; use the original module")
            if type(part).__name__ == "OptimizedModule":
                raise UsageError(f"{layer.text} is compiled, which cannot be traced; use the original module")
            naming = _Naming(passes, layer)
            enter = part.register_forward_pre_hook(naming.enter, prepend=True)
            leave = part.register_forward_hook(naming.leave)
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        yield


class _Naming:
    """Hooks of one layer for the tracing thread. It has no `__dict__`, so it is not part of the network's state."""

    __slots__ = ("_layer", "_passes", "_thread")

    def __init__(self, passes: _Passes, layer: Layer) -> None:
        self._passes, self._layer, self._thread = passes, layer, get_ident()

    def enter(self, module: nn.Module, inputs: Any) -> None:
        """Hook before the layer is called."""
        if get_ident() == self._thread:
            self._passes.layers.append(self._layer)
            for kind, reason in LAYERS_NOT_LOCAL.items():
                if isinstance(module, kind):
                    self._passes.run.fail(UnsoundError(f"{self._layer.text} is not local: {reason}"))

    def leave(self, *call: Any) -> None:
        """Hook after the layer is called."""
        if get_ident() == self._thread:
            self._passes.layers.pop()


def _interpret(run: Pass, steps: Steps | None, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    call = Call(run, func, args, kwargs)
    try:
        return _interpreted(call, steps)
    except Exception as error:
        run.fail(error)


def _interpreted(call: Call, steps: Steps | None) -> Any:
    run, args = call.run, call.args
    handler = HANDLERS.get(call.func)
    if handler is None:
        call.refuse("it is not among the operations that are known to be local")
    if run.over or any(tensor.run is not run for tensor in call.tracked):
        call.unsupported("is given values that the network has kept from another image")
    if call.kwargs.get("out") is not None or (call.in_place and not isinstance(args[0], Tracked)):
        call.unsupported("writes the image's values into another tensor")
    if any(run.memory.holds(value) for value in call.plain):
        call.unsupported(LOST)
    if steps and handler is not tells_no_values:
        operands = [_described(leaf) for leaf in leaves((args, call.kwargs))]
        if wrong := steps.add(call.func, operands, run.batch, handler in GIVEN_SIZES):
            call.unsupported(wrong)
    prints = handler(call, *args, **call.kwargs)
    if prints is None:
        return call.out
    several = isinstance(call.out, tuple | list)
    parts = list(call.out) if several else [call.out]
    parts = [_track(call, part, prints[i] if isinstance(prints, list) else prints) for i, part in enumerate(parts)]
    return type(call.out)(parts) if several else parts[0]  # keeps named tuples, as of max(dim)


def _described(leaf: Any) -> Any:
    if not isinstance(leaf, Tracked):
        return leaf
    return FromImage(tuple(leaf.shape), leaf.dtype, leaf.number, leaf.footprint.dims[0])


def _track(call: Call, result: Any, footprint: Footprint) -> Tracked:
    if not isinstance(result, Tensor):
        call.unsupported("does not return a tensor")
    sizes = (call.run.batch, len(footprint.rows), len(footprint.cols))
    if tuple(result.shape[dim] for dim in footprint.dims) != sizes:
        call.unsupported(f"returns {list(result.shape)} where another size was derived")
    if isinstance(result, Tracked):  # written in place, or returned unchanged
        # Tensors that share its memory would change as well, but their footprints would not.
        if result.aliased and not footprint.same(result.footprint):
            call.unsupported("writes into a tensor that shares its memory; write it out of place")
        result.footprint, result.number = footprint, call.run.next_number()
        return result
    sharing = [t for t in call.tracked if t.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()]
    tracked = _tracked(result, footprint, call.run)
    tracked.aliased = bool(sharing)
    for source in sharing:
        source.aliased = True
    return tracked


def _tracked(tensor: Tensor, footprint: Footprint, run: Pass) -> Tracked:
    tracked = tensor.as_subclass(_Watched)
    tracked.footprint, tracked.run, tracked.aliased, tracked.number = footprint, run, False, run.next_number()
    return tracked
