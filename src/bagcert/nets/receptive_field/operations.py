"""Effect of torch operations on footprints, including operations that are known not to be local.

A handler receives the call and the arguments of the operation. It returns the footprint of the result, a list of
footprints for several results, or None if the result does not depend on pixel values.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bagcert.nets.receptive_field.footprint import COL, ROW, Call, Footprint, Tracked

_Prints = Footprint | list[Footprint] | None


def _pointwise(call: Call, *args, **kwargs) -> _Prints:
    """Elementwise operations: the union of the broadcast footprints of the operands."""
    if not isinstance(call.out, Tensor):  # `where` with a condition alone
        call.unsupported("returns no tensor of the same size")
    ndim, shape = call.out.ndim, call.out.shape
    aligned = []
    for operand in call.tracked:
        aligned.append(operand.footprint.moved((ndim - operand.ndim).__add__))
    if len({footprint.dims for footprint in aligned}) > 1:
        call.refuse("its operands have their rows and columns in different dimensions")
    dims = aligned[0].dims
    rows = [np.broadcast_to(footprint.rows, (shape[dims[ROW]], footprint.rows.shape[1])) for footprint in aligned]
    cols = [np.broadcast_to(footprint.cols, (shape[dims[COL]], footprint.cols.shape[1])) for footprint in aligned]
    return Footprint(dims, np.logical_or.reduce(rows), np.logical_or.reduce(cols))


def _expand(call: Call, *args, **kwargs) -> _Prints:
    return _pointwise(call)


def _same(call: Call, input, *args, **kwargs) -> _Prints:
    """Operations that keep all values at their positions."""
    return input.footprint if isinstance(input, Tracked) else None


def tells_no_values(call: Call, *args, **kwargs) -> _Prints:
    """Operations that return sizes, types or constants rather than pixel values."""
    if len(call.tracked) > 1 or not isinstance(args[0] if args else kwargs.get("input"), Tracked):
        call.unsupported("fills a tensor with a value of the image")
    return None


def _random(call: Call, input, p=0.5, training=True, inplace=False) -> _Prints:
    if training:
        call.refuse("it draws random numbers in eval mode, so the map changes everywhere from run to run")
    return call.print_of(input)


def _prelu(call: Call, input, weight) -> _Prints:
    return call.print_of(input)


def _batch_norm(
    call: Call, input, running_mean, running_var, weight=None, bias=None, training=False, *rest, **options
) -> _Prints:
    footprint = call.print_of(input)
    if call.func is torch.batch_norm:  # weight and bias come first there
        call.unsupported("has the arguments of torch.batch_norm; use torch.nn.functional.batch_norm")
    if training or running_mean is None or running_var is None:
        call.refuse("it normalizes by statistics of the batch (no running statistics), which every pixel moves")
    if 1 in footprint.dims:
        call.unsupported("works on a map whose channels are not in dimension 1")
    return footprint


def _layer_norm(call: Call, input, normalized_shape, *rest, **options) -> _Prints:
    footprint = call.print_of(input)
    if any(dim >= input.ndim - len(normalized_shape) for dim in footprint.dims):
        call.refuse("it normalizes over rows and columns, not over channels alone")
    return footprint


def _linear(call: Call, input, weight, bias=None) -> _Prints:
    footprint = call.print_of(input)
    if input.ndim - 1 in footprint.dims:
        call.refuse("it mixes all columns of the map")
    return footprint


def _conv(call: Call, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> _Prints:
    kernel, dilation = tuple(weight.shape[2:]), _pair(dilation)
    before = _pair(padding) if not isinstance(padding, str) else (0, 0)
    if padding == "same":  # an odd total puts the extra pixel after
        before = tuple(dilation[axis] * (kernel[axis] - 1) // 2 for axis in (0, 1))
    return _windows(call, input, kernel, _pair(stride), dilation, before)


def _max_pool(
    call: Call, input, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False
) -> _Prints:
    kernel = _pair(kernel_size)
    return _windows(call, input, kernel, _pair(stride) if stride else kernel, _pair(dilation), _pair(padding))


def _avg_pool(call: Call, input, kernel_size, stride=None, padding=0, *rest, **options) -> _Prints:
    kernel = _pair(kernel_size)
    return _windows(call, input, kernel, _pair(stride) if stride else kernel, (1, 1), _pair(padding))


def _channel_shuffle(call: Call, input, groups) -> _Prints:
    return call.plain_print_of(input)


def _pixel_unshuffle(call: Call, input, downscale_factor) -> _Prints:
    block = _pair(downscale_factor)
    return _windows(call, input, block, block, (1, 1), (0, 0))


def _windows(
    call: Call,
    input,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
    before: tuple[int, ...],
) -> _Prints:
    """Windowed operations: output `a` of an axis sees inputs `stride*a - before + dilation*k` for k < kernel."""
    footprint = call.plain_print_of(input)
    tables = []
    for axis, seen in enumerate((footprint.rows, footprint.cols)):
        outputs = np.arange(call.out.shape[2 + axis])[:, None]
        inputs = stride[axis] * outputs - before[axis] + dilation[axis] * np.arange(kernel[axis])[None, :]
        table = np.zeros((len(outputs), len(seen)), dtype=np.float32)
        exists = (inputs >= 0) & (inputs < len(seen))
        table[np.nonzero(exists)[0], inputs[exists]] = 1
        tables.append(table @ seen.astype(np.float32) > 0)
    return Footprint(footprint.dims, *tables)


def _pair(value: Any) -> tuple[int, ...]:
    values = tuple(value) if isinstance(value, tuple | list) else (value,)
    return values * 2 if len(values) == 1 else values


def _pad(call: Call, input, pad, mode="constant", value=None) -> _Prints:
    footprint = call.print_of(input)
    for pair in range(len(pad) // 2):
        dim, sides = input.ndim - 1 - pair, (pad[2 * pair], pad[2 * pair + 1])
        if dim == footprint.dims[0] and any(sides):
            call.unsupported("pads the batch")
        if mode == "circular" and min(sides) < 0:
            # If one side is cropped and the other padded, torch leaves part of the result uninitialized.
            call.unsupported("crops by circular padding")
        # Pad the positions with torch to find the source of each padded position; -1 stands for none.
        positions = torch.arange(input.shape[dim], dtype=torch.float64)[None, None]
        fill = {"value": -1} if mode == "constant" else {}
        source = F.pad(positions, sides, mode=mode, **fill)[0, 0].long().numpy()
        footprint = footprint.map(dim, partial(_take, source))
    return footprint


def _take(source: np.ndarray, seen: np.ndarray) -> np.ndarray:
    return seen[source] & (source >= 0)[:, None]


def _getitem(call: Call, input, index) -> _Prints:
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
    order: list[int] = []  # source dimension of each dimension of the result, or -1
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


def _pieces(call: Call, input, *args, **kwargs) -> _Prints:
    """Operations that return slices of rows, columns or channels; applied to positions to find where each one goes."""
    footprint, several = call.print_of(input), isinstance(call.out, tuple | list)
    parts = list(call.out) if several else [call.out]
    prints = [footprint] * len(parts)
    for dim in footprint.dims:
        line = torch.arange(input.shape[dim]).view([-1 if d == dim else 1 for d in range(input.ndim)])
        with torch._C.DisableTorchFunction():
            moved = call.func(line.expand(input.shape), *args, **kwargs)
        for i, part in enumerate(moved if several else [moved]):
            index = part.movedim(dim, 0).flatten(1)[:, 0].numpy() if part.numel() else np.arange(part.shape[dim])
            if dim != footprint.dims[0]:
                prints[i] = prints[i].map(dim, itemgetter(index))
            elif len(index) != input.shape[dim]:
                call.unsupported("takes images out of the batch")
    return prints if several else prints[0]


def _cat(call: Call, tensors, dim=0) -> _Prints:
    ndim = call.out.ndim
    first, dim = call.tracked[0].footprint, dim % ndim
    if any(t.footprint.dims != first.dims for t in call.tracked) or dim == first.dims[0]:
        call.unsupported("joins maps of different layouts, or batches")
    tables = []
    for axis, place in ((ROW, first.rows), (COL, first.cols)):
        lines = [_table(t, axis, first.dims[axis], place.shape[1]) for t in tensors]
        tables.append(np.concatenate(lines) if dim == first.dims[axis] else np.logical_or.reduce(lines))
    return Footprint(first.dims, *tables)


def _table(value: Tensor, axis: int, dim: int, pixels: int) -> np.ndarray:
    if isinstance(value, Tracked):
        return value.footprint.rows if axis == ROW else value.footprint.cols
    return np.zeros((value.shape[dim], pixels), dtype=bool)


def _over(call: Call, input, dims) -> _Prints:
    """Reductions over some dimensions, which are removed or kept with size 1."""
    footprint = call.print_of(input)
    dims = dims if isinstance(dims, tuple | list) else () if dims is None else (dims,)
    if any(type(dim) is not int for dim in dims):  # the argument of `std(True)` is not a dimension
        call.unsupported("is given something other than the numbers of dimensions")
    dims = dims or range(input.ndim)  # no dimension means all
    over = {dim % input.ndim for dim in dims}
    if over & set(footprint.dims[1:]):
        call.refuse("it combines the values of all positions, so that every region sees every pixel")
    if over & set(footprint.dims):
        call.refuse("it combines the images of a batch")
    out = call.out[0] if isinstance(call.out, tuple) else call.out
    gone = over if out.ndim < input.ndim else set()
    return footprint.moved(lambda dim: dim - sum(g < dim for g in gone))


def _reduce(call: Call, input, dim=None, *rest, **options) -> _Prints:
    if isinstance(dim, Tensor) or isinstance(options.get("other"), Tensor):  # max(a, b)
        return _pointwise(call)
    return _over(call, input, options.get("axis", dim))


def _normalize(call: Call, input, p=2.0, dim=1, *rest, **options) -> _Prints:
    return _over(call, input, dim)


def _glu(call: Call, input, dim=-1) -> _Prints:
    return _over(call, input, dim)


def _permute(call: Call, input, *given, dims=()) -> _Prints:
    footprint = call.print_of(input)
    dims = dims or (given[0] if isinstance(given[0], tuple | list) else given)
    order = [dim % input.ndim for dim in dims]
    return footprint.moved(order.index)


def _transpose(call: Call, input, dim0, dim1) -> _Prints:
    order = list(range(input.ndim))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _permute(call, input, order)


def _reshape(call: Call, input, *shape, **options) -> _Prints:
    """Reshaping, which may only regroup channels, as in a channel shuffle."""
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

LAYERS_NOT_LOCAL: dict[type[nn.Module], str] = {
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
        logsigmoid threshold sigmoid tanh expand_as""",
    _expand: "expand",
    _prelu: "prelu",
    _same: """to type type_as float double half bfloat16 int long short bool cpu cuda contiguous clone detach data
        requires_grad_""",
    _channel_shuffle: "channel_shuffle native_channel_shuffle",
    tells_no_values: """shape size ndim dim ndimension dtype device layout is_cuda is_mps is_meta is_cpu is_sparse
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
    _pieces: "chunk split tensor_split narrow",
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
    """Yield every torch function and method of that name: plain, in place, operator and attribute."""
    for spelled in (name, f"{name}_", f"__{name}__", f"__r{name}__", f"__i{name}__"):
        for home in (torch, Tensor, F, torch._C._nn, torch._C._VariableFunctions, torch.special):
            found = getattr(home, spelled, None)
            if callable(found):
                yield found
            elif found is not None and hasattr(found, "__get__"):
                yield found.__get__


HANDLERS: dict[Any, Callable[..., _Prints]] = {
    func: handler for handler, names in _TABLE.items() for name in names.split() for func in _spellings(name)
}
GIVEN_SIZES = {_reshape, _expand}  # their arguments may contain the number of images
