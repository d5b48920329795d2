"""The receptive fields of a network, derived from its layers.

The network runs once, on an image that remembers: every tensor on the way carries which image rows each of its
rows depends on, and likewise for columns (METHOD section 2, "Geometry"). Each operation is looked up in a table
of what it does to those two tables. What is not in the table is refused by name: a certificate may rest only on
operations that are known to be local. Shapes are real, so padding, ceil_mode and control flow that depends on
sizes need no special care; control flow that depends on pixel values is refused.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from operator import itemgetter
from typing import Any, NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagcert.errors import BagcertError, UnsoundError, UsageError
from bagcert.grid import RegionGrid

_ROW, _COL = 1, 2  # positions in _Footprint.dims


@dataclass(frozen=True, eq=False)
class _Footprint:
    """What a tensor depends on.

    Attributes:
        dims: which dimensions of the tensor are the batch, the rows and the columns.
        rows: boolean [tensor rows, image height].
        cols: boolean [tensor columns, image width].
    """

    dims: tuple[int, int, int]
    rows: np.ndarray
    cols: np.ndarray

    def map(self, dim: int, change: Callable[[np.ndarray], np.ndarray]) -> "_Footprint":
        """The footprint after `change` of the table that belongs to dimension `dim`, if one does."""
        if dim == self.dims[_ROW]:
            return replace(self, rows=change(self.rows))
        if dim == self.dims[_COL]:
            return replace(self, cols=change(self.cols))
        return self

    def moved(self, to: Callable[[int], int]) -> "_Footprint":
        """The same tables, with dimension `d` of the tensor at `to(d)`."""
        batch, row, col = self.dims
        return replace(self, dims=(to(batch), to(row), to(col)))

    def same(self, other: "_Footprint") -> bool:
        return (
            self.dims == other.dims and np.array_equal(self.rows, other.rows) and np.array_equal(self.cols, other.cols)
        )


@dataclass(frozen=True)
class _Layer:
    """How messages name a layer, and whether it is one of torch's own, whose name says all."""

    text: str
    of_torch: bool

    @classmethod
    def of(cls, name: str, module: nn.Module) -> "_Layer":
        kind = type(module)
        text = f"layer {name!r} ({kind.__name__})" if name else f"the network ({kind.__name__})"
        return cls(text, kind.__module__.startswith("torch.nn") and not isinstance(module, nn.Sequential))


class _Tracked(Tensor):
    """A tensor with a footprint. Every torch function that is given one goes through `_interpret`."""

    footprint: _Footprint
    layers: list["_Layer"]  # the layers being called, innermost last
    aliased: bool  # other tensors may share its memory

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _interpret(func, args, kwargs or {})


class _Call:
    """One call of a torch function with tracked arguments."""

    def __init__(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        tensors = list(_tensors((args, kwargs)))
        self.tracked = [tensor for tensor in tensors if isinstance(tensor, _Tracked)]
        self.plain = [tensor for tensor in tensors if not isinstance(tensor, _Tracked)]
        name = getattr(func, "__name__", str(func))
        self.name = getattr(func.__self__, "__name__", name) if name == "__get__" else name

    @cached_property
    def out(self) -> Any:
        """The real result; computed once, after the handler has made sure that it may be."""
        return self.func(*self.args, **self.kwargs)

    def print_of(self, value: Any) -> _Footprint:
        """The footprint of an argument that has to be the only one that comes from the image."""
        if not isinstance(value, _Tracked) or len(self.tracked) > 1:
            self.unsupported("takes weights, statistics or sizes from the image")
        return value.footprint

    def plain_print_of(self, value: Any) -> _Footprint:
        """Likewise, in the layout [batch, channels, rows, columns]."""
        footprint = self.print_of(value)
        if value.ndim != 4 or footprint.dims != (0, 2, 3):
            self.unsupported("works on a map that is not [batch, channels, rows, columns]")
        return footprint

    def refuse(self, reason: str) -> NoReturn:
        """The operation reaches across the map."""
        raise UnsoundError(f"{self._subject} is not local: {reason}")

    def unsupported(self, reason: str) -> NoReturn:
        """The operation may be local, but cannot be derived."""
        raise UsageError(f"{self._subject} is not supported: it {reason}")

    @property
    def in_place(self) -> bool:
        """By torch's naming: `add_`, `__iadd__`."""
        if self.name.startswith("__"):
            return self.name == "__setitem__" or (self.name[2] == "i" and hasattr(Tensor, f"__{self.name[3:]}"))
        return self.name.endswith("_")

    @property
    def _subject(self) -> str:
        layer = self.tracked[0].layers[-1]
        return layer.text if layer.of_torch else f"{self.name.strip('_')} in {layer.text}"


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
    image = torch.full((2, channels, *image_size), torch.nan).to(parameter).as_subclass(_Tracked)
    image.footprint = _Footprint((0, 2, 3), *(np.eye(pixels, dtype=bool) for pixels in image_size))
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
    if not isinstance(out, _Tracked):
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
def _named_layers(module: nn.Module, layers: list[_Layer]) -> Iterator[None]:
    """Keeps in `layers` which layers are being called."""
    with ExitStack() as hooks:
        for name, part in module.named_modules():
            layer = _Layer.of(name, part)
            if isinstance(part, torch.jit.ScriptModule):
                raise UsageError(f"{layer.text} is TorchScript, which cannot be followed; give the module it came from")
            if type(part).__name__ == "OptimizedModule":
                raise UsageError(f"{layer.text} is compiled, which cannot be followed; give the module it came from")
            enter = part.register_forward_pre_hook(partial(_enter, layers, layer), prepend=True)
            leave = part.register_forward_hook(partial(_leave, layers))
            hooks.callback(enter.remove)
            hooks.callback(leave.remove)
        yield


def _enter(layers: list[_Layer], layer: _Layer, module: nn.Module, inputs: Any) -> None:
    layers.append(layer)
    for kind, reason in _LAYERS_NOT_LOCAL.items():
        if isinstance(module, kind):
            raise UnsoundError(f"{layer.text} is not local: {reason}")


def _leave(layers: list[_Layer], *call: Any) -> None:
    layers.pop()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(tuple(value.values()))
    elif isinstance(value, slice):
        yield from _tensors((value.start, value.stop, value.step))


def _interpret(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Runs one torch function and works out the footprint of what comes out."""
    call = _Call(func, args, kwargs)
    handler = _HANDLERS.get(func)
    if handler is None:
        call.refuse("it is not among the operations that are known to be")
    if kwargs.get("out") is not None or (call.in_place and not isinstance(args[0], _Tracked)):
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


def _track(call: _Call, result: Tensor, footprint: _Footprint) -> _Tracked:
    if isinstance(result, _Tracked):  # written in place, or handed through
        # What shares its memory would change as well, without its footprint.
        if result.aliased and not footprint.same(result.footprint):
            call.unsupported("writes into a tensor that shares its memory; write it out of place")
        result.footprint = footprint
        return result
    sharing = [t for t in call.tracked if t.untyped_storage().data_ptr() == result.untyped_storage().data_ptr()]
    tracked = result.as_subclass(_Tracked)
    tracked.footprint, tracked.layers, tracked.aliased = footprint, call.tracked[0].layers, bool(sharing)
    for source in sharing:
        source.aliased = True
    return tracked


# What each operation does. A handler takes the call and the arguments of the operation, and returns the footprint
# of the result, a list with one for each result, or None if the result says nothing of pixel values.

_Prints = _Footprint | list[_Footprint] | None


def _pointwise(call: _Call, *args: Any, **kwargs: Any) -> _Prints:
    """Each value depends on the values at its place: the union over the operands, broadcast."""
    ndim, shape = call.out.ndim, call.out.shape
    aligned = []
    for operand in call.tracked:
        aligned.append(operand.footprint.moved((ndim - operand.ndim).__add__))
    if len({footprint.dims for footprint in aligned}) > 1:
        call.refuse("its operands have their rows and columns in different dimensions")
    dims = aligned[0].dims
    rows = [np.broadcast_to(footprint.rows, (shape[dims[_ROW]], footprint.rows.shape[1])) for footprint in aligned]
    cols = [np.broadcast_to(footprint.cols, (shape[dims[_COL]], footprint.cols.shape[1])) for footprint in aligned]
    return _Footprint(dims, np.logical_or.reduce(rows), np.logical_or.reduce(cols))


def _same(call: _Call, input: Any, *args: Any, **kwargs: Any) -> _Prints:
    """The values stay where they are, whatever the other arguments."""
    return input.footprint if isinstance(input, _Tracked) else None


def _nothing(call: _Call, *args: Any, **kwargs: Any) -> _Prints:
    """Sizes, types and constants: no pixel values."""
    return None


def _random(call: _Call, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> _Prints:
    if training:
        call.refuse("it draws random numbers in eval mode, so the map changes everywhere from run to run")
    return call.print_of(input)


def _prelu(call: _Call, input: Any, weight: Any) -> _Prints:
    return call.print_of(input)


def _batch_norm(
    call: _Call,
    input: Any,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    *rest: Any,
    **options: Any,
) -> _Prints:
    footprint = call.print_of(input)
    if training or running_mean is None or running_var is None:
        call.refuse("it normalizes by statistics of the batch (no running statistics), which every pixel moves")
    if 1 in footprint.dims:
        call.unsupported("works on a map whose channels are not in dimension 1")
    return footprint


def _layer_norm(call: _Call, input: Any, normalized_shape: Any, *rest: Any, **options: Any) -> _Prints:
    footprint = call.print_of(input)
    if any(dim >= input.ndim - len(normalized_shape) for dim in footprint.dims):
        call.refuse("it normalizes over rows and columns, not over channels alone")
    return footprint


def _linear(call: _Call, input: Any, weight: Any, bias: Any = None) -> _Prints:
    footprint = call.print_of(input)
    if input.ndim - 1 in footprint.dims:
        call.refuse("it mixes all columns of the map")
    return footprint


def _conv(
    call: _Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> _Prints:
    kernel, dilation = tuple(weight.shape[2:]), _pair(dilation)
    before = _pair(padding) if not isinstance(padding, str) else (0, 0)
    if padding == "same":  # an odd total puts the extra pixel after
        before = tuple(dilation[axis] * (kernel[axis] - 1) // 2 for axis in (0, 1))
    return _windows(call, input, kernel, _pair(stride), dilation, before)


def _max_pool(
    call: _Call,
    input: Any,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    dilation: Any = 1,
    ceil_mode: bool = False,
    return_indices: bool = False,
) -> _Prints:
    kernel = _pair(kernel_size)
    return _windows(call, input, kernel, _pair(stride) if stride else kernel, _pair(dilation), _pair(padding))


def _avg_pool(
    call: _Call, input: Any, kernel_size: Any, stride: Any = None, padding: Any = 0, *rest: Any, **options: Any
) -> _Prints:
    kernel = _pair(kernel_size)
    return _windows(call, input, kernel, _pair(stride) if stride else kernel, (1, 1), _pair(padding))


def _channel_shuffle(call: _Call, input: Any, groups: int) -> _Prints:
    return call.plain_print_of(input)


def _pixel_unshuffle(call: _Call, input: Any, downscale_factor: int) -> _Prints:
    block = _pair(downscale_factor)
    return _windows(call, input, block, block, (1, 1), (0, 0))


def _windows(
    call: _Call,
    input: Any,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    before: tuple[int, ...],
) -> _Prints:
    """Output `a` of an axis sees inputs `stride*a - before + dilation*k` for k < kernel, those that exist."""
    footprint = call.plain_print_of(input)
    tables = []
    for axis, seen in enumerate((footprint.rows, footprint.cols)):
        outputs = np.arange(call.out.shape[2 + axis])[:, None]
        inputs = stride[axis] * outputs - before[axis] + dilation[axis] * np.arange(kernel[axis])[None, :]
        table = np.zeros((len(outputs), len(seen)), dtype=np.float32)
        exists = (inputs >= 0) & (inputs < len(seen))
        table[np.nonzero(exists)[0], inputs[exists]] = 1
        tables.append(table @ seen.astype(np.float32) > 0)
    return _Footprint(footprint.dims, *tables)


def _pair(value: Any) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * 2 if len(values) == 1 else values


def _pad(call: _Call, input: Any, pad: Any, mode: str = "constant", value: Any = None) -> _Prints:
    footprint = call.print_of(input)
    for pair in range(len(pad) // 2):
        dim, sides = input.ndim - 1 - pair, (pad[2 * pair], pad[2 * pair + 1])
        if dim == footprint.dims[0] and any(sides):
            call.unsupported("pads the batch")
        # torch itself says which position each padded one is a copy of; -1 is none.
        positions = torch.arange(input.shape[dim], dtype=torch.float64)[None, None]
        fill = {"value": -1} if mode == "constant" else {}
        source = F.pad(positions, sides, mode=mode, **fill)[0, 0].long().numpy()
        footprint = footprint.map(dim, partial(_take, source))
    return footprint


def _take(source: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return seen[source] & (source >= 0)[:, None]


def _getitem(call: _Call, input: Any, index: Any) -> _Prints:
    footprint = call.print_of(input)
    items = list(index) if isinstance(index, tuple) else [index]
    if not all(item is None or item is ... or type(item) in (int, slice) for item in items):
        call.unsupported("indexes by something other than slices and integers")
    rest = input.ndim - sum(item is not None and item is not ... for item in items)
    if ... not in items:
        items.append(...)
    at = items.index(...)
    items[at : at + 1] = [slice(None)] * rest
    position, result = 0, footprint
    order: list[int] = []  # for each dimension of the result the one it comes from, or -1
    for item in items:
        if item is None:
            order.append(-1)
            continue
        if isinstance(item, slice):
            result = result.map(position, itemgetter(item))
            order.append(position)
        elif position in footprint.dims:
            call.unsupported("picks a single image, row or column")
        if position == footprint.dims[0] and call.out.shape[len(order) - 1] != input.shape[position]:
            call.unsupported("takes images out of the batch")
        position += 1
    return result.moved(order.index)


def _pieces(call: _Call, input: Any, sections: Any, dim: int = 0) -> _Prints:
    prints, start = [], 0
    for piece in call.out:
        prints.append(_cut(call, input, dim, start, piece.shape[dim]))
        start += piece.shape[dim]
    return prints


def _cut(call: _Call, input: Any, dim: int, start: int, length: int) -> _Footprint:
    footprint, dim = call.print_of(input), dim % input.ndim
    if dim == footprint.dims[0]:
        call.unsupported("takes images out of the batch")
    return footprint.map(dim, lambda seen: seen[start : start + length])


def _cat(call: _Call, tensors: Any, dim: int = 0) -> _Prints:
    ndim = call.out.ndim
    first, dim = call.tracked[0].footprint, dim % ndim
    if any(t.footprint.dims != first.dims for t in call.tracked) or dim == first.dims[0]:
        call.unsupported("joins maps of different layouts, or batches")
    tables = []
    for axis, place in ((_ROW, first.rows), (_COL, first.cols)):
        lines = [_table(t, axis, first.dims[axis], place.shape[1]) for t in tensors]
        tables.append(np.concatenate(lines) if dim == first.dims[axis] else np.logical_or.reduce(lines))
    return _Footprint(first.dims, *tables)


def _table(value: Tensor, axis: int, dim: int, pixels: int) -> np.ndarray:
    if isinstance(value, _Tracked):
        return value.footprint.rows if axis == _ROW else value.footprint.cols
    return np.zeros((value.shape[dim], pixels), dtype=bool)


def _over(call: _Call, input: Any, dims: Any) -> _Prints:
    """Values along some dimensions are combined; these are gone afterwards, or kept."""
    footprint = call.print_of(input)
    dims = range(input.ndim) if dims is None else dims if isinstance(dims, tuple | list) else (dims,)
    over = {dim % input.ndim for dim in dims}
    if over & set(footprint.dims[1:]):
        call.refuse("it combines the values of all positions, so that every region sees every pixel")
    if over & set(footprint.dims):
        call.refuse("it combines the images of a batch")
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    gone = over if out.ndim < input.ndim else set()
    return footprint.moved(lambda dim: dim - sum(g < dim for g in gone))


def _reduce(call: _Call, input: Any, dim: Any = None, *rest: Any, **options: Any) -> _Prints:
    if isinstance(dim, Tensor) or isinstance(options.get("other"), Tensor):  # max(a, b)
        return _pointwise(call)
    return _over(call, input, options.get("axis", dim))


def _normalize(call: _Call, input: Any, p: float = 2.0, dim: Any = 1, *rest: Any, **options: Any) -> _Prints:
    return _over(call, input, dim)


def _glu(call: _Call, input: Any, dim: int = -1) -> _Prints:
    return _over(call, input, dim)


def _permute(call: _Call, input: Any, *dims: Any) -> _Prints:
    footprint = call.print_of(input)
    order = [dim % input.ndim for dim in (dims[0] if isinstance(dims[0], tuple | list) else dims)]
    return footprint.moved(order.index)


def _transpose(call: _Call, input: Any, dim0: int, dim1: int) -> _Prints:
    order = list(range(input.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(call, input, order)


def _reshape(call: _Call, input: Any, *shape: Any, **options: Any) -> _Prints:
    """Only channels may be regrouped, as in a channel shuffle."""
    footprint, old, new = call.print_of(input), input.shape, call.out.shape
    inner = (0, input.ndim - 2, input.ndim - 1)
    if footprint.dims != inner or len(new) < 3 or new[0] != old[0] or new[-2:] != old[-2:]:
        call.refuse("it merges rows and columns, so that what follows can see every pixel")
    return replace(footprint, dims=(0, len(new) - 2, len(new) - 1))


def _refusal(reason: str) -> Callable[..., _Prints]:
    return lambda call, *args, **kwargs: call.refuse(reason)


def _gap(reason: str) -> Callable[..., _Prints]:
    return lambda call, *args, **kwargs: call.unsupported(reason)


_ATTENDS, _RECURS = "every position attends to every other", "it carries values from position to position"

_LAYERS_NOT_LOCAL: dict[type[nn.Module], str] = {
    nn.MultiheadAttention: _ATTENDS,
    nn.TransformerEncoderLayer: _ATTENDS,
    nn.TransformerDecoderLayer: _ATTENDS,
    nn.RNNBase: _RECURS,
}

_TABLE: dict[Callable[..., _Prints], str] = {
    _pointwise: """abs absolute neg negative positive add sub subtract rsub mul multiply div divide true_divide
        floor_divide radd rmul rtruediv truediv floordiv pow square sqrt rsqrt reciprocal exp expm1 log log1p log2
        sin cos erf sign floor ceil round trunc clamp clamp_min clamp_max clip nan_to_num heaviside maximum minimum
        where lerp addcmul addcdiv gt greater ge greater_equal lt less le less_equal eq ne not_equal logical_and
        logical_or logical_not and or invert isnan isfinite isinf masked_fill relu relu6 gelu silu mish elu selu
        celu leaky_relu hardswish hardtanh hardsigmoid hardshrink softshrink tanhshrink softsign softplus
        logsigmoid threshold sigmoid tanh expand expand_as""",
    _prelu: "prelu",
    _same: """to type type_as float double half bfloat16 int long short bool cpu cuda contiguous clone detach data
        requires_grad_""",
    _channel_shuffle: "channel_shuffle native_channel_shuffle",
    _nothing: """shape size ndim dim ndimension dtype device layout is_cuda is_mps is_meta is_cpu is_sparse
        is_quantized is_nested requires_grad stride numel nelement element_size itemsize __len__ is_contiguous
        is_floating_point is_complex get_device zeros_like ones_like full_like new_zeros new_ones new_full""",
    _random: "dropout dropout1d dropout2d dropout3d alpha_dropout feature_alpha_dropout",
    _batch_norm: "batch_norm",
    _layer_norm: "layer_norm rms_norm",
    _linear: "linear",
    _conv: "conv2d",
    _max_pool: "max_pool2d",
    _avg_pool: "avg_pool2d",
    _pixel_unshuffle: "pixel_unshuffle",
    _pad: "pad",
    _getitem: "getitem",
    _pieces: "chunk split tensor_split",
    _cut: "narrow",
    _cat: "cat concat concatenate",
    _reduce: """mean sum nansum amax amin max min prod std var logsumexp argmax argmin softmax log_softmax softmin
        cumsum""",
    _normalize: "normalize",
    _glu: "glu",
    _permute: "permute",
    _transpose: "transpose swapaxes swapdims",
    _reshape: "view reshape flatten unflatten",
    _refusal("it pools over the whole map"): "adaptive_avg_pool2d adaptive_max_pool2d",
    _refusal("it normalizes by statistics of the whole map"): "group_norm instance_norm",
    _refusal(_ATTENDS): "scaled_dot_product_attention multi_head_attention_forward",
    _refusal("a product of maps mixes positions"): "matmul rmatmul mm bmm addmm baddbmm einsum tensordot bilinear",
    _refusal(_RECURS): "lstm gru rnn_tanh rnn_relu",
    _gap("upsamples or resamples the map"): """interpolate upsample upsample_nearest upsample_bilinear
        conv_transpose2d grid_sample max_unpool2d pixel_shuffle fold""",
    _gap("lets values of the image decide what is computed"): """__bool__ __int__ __long__ __float__ __index__ __array__
        item tolist numpy any all equal allclose nonzero masked_select""",
    _gap("writes into a part of a map"): "__setitem__ copy_ index_fill index_copy index_add scatter masked_scatter",
}


def _spellings(name: str) -> Iterator[Any]:
    """Every torch function and method of that name: plain, in place, as an operator and as an attribute."""
    for spelled in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__"):
        for home in (torch, Tensor, F, torch._C._nn, torch._C._VariableFunctions, torch.special):
            found = getattr(home, spelled, None)
            if callable(found):
                yield found
            elif found is not None and hasattr(found, "__get__"):
                yield found.__get__


_HANDLERS: dict[Any, Callable[..., _Prints]] = {
    func: handler for handler, names in _TABLE.items() for name in names.split() for func in _spellings(name)
}
