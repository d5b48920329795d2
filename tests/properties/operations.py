"""The operations that networks at random are made of: `LOCAL` ones, and `OTHER` ones that may see everything.

Each is given the program that is being written and a sample of the maps so far, and returns a statement: a function
of the maps. Argument forms are drawn as well, usual and unusual, wrong ones among them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.properties import escapes


class Skip(Exception):
    """This operation does not fit here."""


def pick(program: Any, maps: list[Tensor]) -> int:
    """Mostly the last map."""
    return len(maps) - 1 if program.draw.random() < 0.75 else program.draw.randrange(len(maps))


def unary(build: Callable) -> Callable:
    """An operation on one map: `build` is given what draws, and the map, and returns a function of it."""

    def make(program: Any, maps: list[Tensor]) -> Callable:
        at = pick(program, maps)
        function = build(program, maps[at])
        if isinstance(function, nn.Module):
            program.parts.append(function.eval())
        return lambda maps: function(maps[at])

    return make


def binary(build: Callable) -> Callable:
    """An operation on two maps, cut to the same rows and columns where they differ."""

    def make(program: Any, maps: list[Tensor]) -> Callable:
        first, second = pick(program, maps), program.draw.randrange(len(maps))
        function = build(program, maps[first], maps[second])

        def statement(maps: list[Tensor]) -> Tensor:
            a, b = maps[first], maps[second]
            rows, cols = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
            return function(a[:, :, :rows, :cols], b[:, :, -rows:, :cols])

        return statement

    return make


def layer_conv(program: Any, x: Tensor) -> nn.Module:
    draw = program.draw
    kernel = (draw.randint(1, 4), draw.randint(1, 4))
    mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    if draw.random() < 0.3:
        return nn.Conv2d(x.shape[1], 4, kernel, 1, "same", draw.randint(1, 2), padding_mode=mode)
    stride, padding = draw.choice([1, 1, 2, (1, 2), 3]), draw.choice([0, 0, 1, (0, 2), "valid"])
    groups = x.shape[1] if draw.random() < 0.2 else 1
    return nn.Conv2d(x.shape[1], 4 if groups == 1 else groups, kernel, stride, padding, draw.choice([1, 1, 2]), groups,
                     draw.random() < 0.5, mode)  # fmt: skip


def function_conv(program: Any, x: Tensor) -> Callable:
    draw = program.draw
    weight = torch.randn(2, x.shape[1], draw.randint(1, 3), draw.randint(1, 3))
    options = draw.choice([{}, {"padding": "same"}, {"stride": [2]}, {"padding": (1, 0), "dilation": 2}, {"stride": 2}])
    function = draw.choice([F.conv2d, torch.conv2d])
    return lambda x: function(input=x, weight=weight, **options)


def pool(program: Any, x: Tensor) -> Callable:
    draw = program.draw
    kernel, ceil = draw.choice([1, 2, 3, (2, 3), [3, 1], [2]]), draw.random() < 0.5
    options: dict[str, Any] = {"stride": draw.choice([None, 1, 2, (2, 1), []]), "ceil_mode": ceil}
    options["padding"] = draw.choice([0, 0, (0, 1)])
    if draw.random() < 0.5:
        options["dilation"] = draw.choice([1, 2, (1, 2)])
        return lambda x: F.max_pool2d(x, kernel, **options)
    if draw.random() < 0.5:
        return lambda x: torch.max_pool2d(x, kernel, **options)
    options["count_include_pad"] = draw.random() < 0.5
    return lambda x: F.avg_pool2d(x, kernel, **options)


def activation(program: Any, x: Tensor) -> Callable:
    inplace = program.draw.random() < 0.4
    return program.draw.choice(
        [
            lambda x: F.relu(x, inplace=inplace), lambda x: F.hardtanh(x, -0.5, 0.5, inplace), lambda x: x.sigmoid(),
            lambda x: F.leaky_relu(x, 0.1, inplace), lambda x: F.softplus(x), lambda x: torch.tanh(input=x),
            lambda x: F.threshold(x, 0.2, 0.1, inplace), lambda x: F.gelu(x), lambda x: x.clamp(0, 1),
            lambda x: x.clamp(min=torch.tensor(0.2)), lambda x: torch.nan_to_num(x, 0.3), lambda x: x.abs_(),
            lambda x: x.mul_(2).add_(0.1), lambda x: 1 - x, lambda x: 2 / (x.abs() + 1), lambda x: 2.0**x.clamp(-2, 2),
            lambda x: (x > 0.4).float(), lambda x: x.gt(0.5) & (x < 0.9), lambda x: (x * 10).int(),
            lambda x: ~(x >= 0.1), lambda x: torch.isnan(x), lambda x: torch.heaviside(x, torch.tensor(0.5)),
            lambda x: x.masked_fill(x > 0.5, 7.0), lambda x: torch.where(x > 0.3, x, -x), lambda x: x.double().float(),
            lambda x: x.to(torch.float64, copy=True).to(x), lambda x: x.clone().detach().contiguous(), lambda x: x.data,
            lambda x: F.dropout(x, 0.5, False), lambda x: F.prelu(x, torch.tensor([0.3])), lambda x: x.bfloat16(),
            lambda x: torch.lerp(x, x * 2, 0.3), lambda x: torch.addcmul(x, x, x, value=0.1), lambda x: x // 0.3,
            lambda x: x.copysign(-x), lambda x: x % 0.4, lambda x: torch.fmod(x, 0.3), lambda x: x.frac(),
        ]
    )  # fmt: skip


def padding(program: Any, x: Tensor) -> Callable:
    draw = program.draw
    mode = draw.choice(["constant", "reflect", "replicate", "circular"])
    pads = [draw.randint(-1, 2) for _ in range(4)]
    if mode == "constant":
        pads += draw.choice([[], [0, 1], [0, 0, 0, 0]])
        value = draw.choice([None, 0.5, -3])
        return lambda x: F.pad(x, tuple(pads), value=value)
    return lambda x: F.pad(x, pads, mode)


def cut(program: Any, x: Tensor) -> Callable:
    draw, dim = program.draw, program.draw.choice([1, 2, 3, -1, -2, -3])
    size, start = x.shape[dim], program.draw.randint(-3, 3)
    length, step = draw.randint(1, 6), draw.randint(1, 3)
    index = [slice(None)] * 4
    index[dim] = slice(draw.choice([None, start]), draw.choice([None, start + length, -1]), draw.choice([None, step]))
    ends = sorted(draw.sample(range(-3, size), 2)) if draw.random() < 0.5 else draw.sample(range(size + 2), 2)
    part = draw.randint(0, 2)
    sizes = [length, 1, size - length - 1]
    return draw.choice(
        [
            lambda x: x.narrow(dim, start, length), lambda x: torch.narrow(x, dim, torch.tensor(start), length),
            lambda x: x[tuple(index)], lambda x: x[..., None, ::step, 1:][:, :, 0], lambda x: x[:, -2:],
            lambda x: x.chunk(3, dim)[part], lambda x: torch.split(x, length, dim=dim)[part],
            lambda x: x.split(sizes, dim)[part], lambda x: x.tensor_split(3, dim)[part],
            lambda x: x.tensor_split(tuple(ends), dim)[part], lambda x: torch.cat(x.chunk(2, dim)[::-1], dim),
            lambda x: torch.tensor_split(x, torch.tensor(ends), dim=dim)[part], lambda x: x[[slice(None)] * 3],
            lambda x: torch.cat([x, torch.zeros_like(x), x], dim=dim), lambda x: torch.cat((x, x.abs()), dim),
            lambda x: x[:, :, start:, : start + length], lambda x: x.unsafe_chunk(2, dim)[0],
            lambda x: x.index_select(dim, torch.arange(length)), lambda x: x[:, torch.arange(2)],
        ]
    )  # fmt: skip


def layout(program: Any, x: Tensor) -> Callable:
    draw, channels = program.draw, x.shape[1]
    weight = torch.randn(3, channels)
    swap, back = draw.choice([((0, 2, 3, 1), (0, 3, 1, 2)), ((0, 3, 2, 1), (0, 3, 2, 1)), ((1, 0, 3, 2), (1, 0, 3, 2))])
    return draw.choice(
        [
            lambda x: F.linear(x.permute(0, 2, 3, 1), weight).permute(0, 3, 1, 2),
            lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (channels,)).permute(0, -1, 1, 2),
            lambda x: x.permute(swap).relu().permute(*back), lambda x: x.permute(dims=swap).permute(dims=back),
            lambda x: x.transpose(1, -1).transpose(-1, 1), lambda x: x.swapaxes(1, 2).mul(2).swapdims(2, 1),
            lambda x: x.reshape(len(x), channels, 1, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
            lambda x: x.view(x.shape[0], -1, *x.shape[2:]), lambda x: x.unflatten(1, (channels, 1)).flatten(1, 2),
            lambda x: F.channel_shuffle(x, channels), lambda x: F.pixel_unshuffle(x, 2),
            lambda x: x.sum(1, keepdim=True).expand(-1, 4, -1, -1), lambda x: x[:, :1].expand_as(x),
            lambda x: x.unsqueeze(1).squeeze(1), lambda x: x.view(torch.int32).view(torch.float32),
            lambda x: x.reshape(x.shape[0], x.shape[2], x.shape[3], -1).permute(0, 3, 1, 2),
            lambda x: x.transpose(2, 3), lambda x: x.view(len(x), *x.shape[1:]).contiguous(),
        ]
    )  # fmt: skip


def reduction(program: Any, x: Tensor) -> Callable:
    """Combined over channels, with every form of `dim`; where that is all dimensions it is not local."""
    draw = program.draw
    channel = [1, -3, (1,), [-3]]
    other = [None, (), [], True, False, (2, 3), -1, 0, (1, 2)]
    dim = draw.choice(channel) if draw.random() < 0.7 else draw.choice(other)
    name = draw.choice(["mean", "sum", "amax", "amin", "std", "var", "logsumexp", "nansum"])
    single = draw.choice(["max", "min", "prod", "argmax", "softmax", "cumsum", "log_softmax", "argmin", "median"])
    forms = [
        lambda x: getattr(x, name)(dim, keepdim=True), lambda x: getattr(torch, name)(x, dim=dim, keepdim=True),
        lambda x: getattr(x, name)(dim), lambda x: getattr(x, name)(axis=dim, keepdim=True),
        lambda x: getattr(torch, name)(input=x, dim=dim), lambda x: getattr(x, name)(dim, True),
        lambda x: x.std(dim, True, True), lambda x: x.var(dim=dim, correction=0, keepdim=True), lambda x: x.std(True),
        lambda x: x.var(dim, unbiased=False), lambda x: _first(getattr(x, single)(dim)), lambda x: x.norm(2, dim, True),
        lambda x: _first(getattr(torch, single)(x, dim, keepdim=True)), lambda x: F.normalize(x, 2.0, dim),
        lambda x: F.softmax(x, dim), lambda x: F.softmax(x), lambda x: F.glu(x, dim), lambda x: x.max(x.abs()),
        lambda x: torch.linalg.vector_norm(x, dim=dim, keepdim=True), lambda x: x.std(unbiased=False),
    ]  # fmt: skip
    reduce, combine = draw.choice(forms), draw.choice([lambda x, r: x - r, lambda x, r: torch.where(x < r, x, -x)])
    return lambda x: combine(x, _aligned(reduce(x), x))


def _first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else value[0]


def _aligned(value: Tensor, x: Tensor) -> Tensor:
    return value[:, None] if value.ndim == 3 else value


def two(program: Any, a: Tensor, b: Tensor) -> Callable:
    draw = program.draw
    if a.shape[1] != b.shape[1] and draw.random() < 0.5:
        dim = draw.choice([1, -3])
        return lambda a, b: torch.cat([a, b], dim)
    return draw.choice(
        [
            lambda a, b: a + b, lambda a, b: a.clone().add_(b, alpha=0.5), lambda a, b: torch.maximum(a, b),
            lambda a, b: torch.max(a, other=b), lambda a, b: a * (b > 0.5), lambda a, b: torch.where(b > 0.2, a, b),
            lambda a, b: a.masked_fill(b < 0.1, 0.0), lambda a, b: a.clone().masked_fill_(b > 1, -1),
            lambda a, b: torch.addcdiv(a, b, b.abs() + 1), lambda a, b: a.lerp(b, 0.5), lambda a, b: a.div(b + 9),
            lambda a, b: sum([a, b, a]), lambda a, b: a.mul_(b), lambda a, b: torch.minimum(a, b),
            lambda a, b: torch.stack([a, b]).amax(0), lambda a, b: torch.where(a.mean(1, True) > b[:, :1], a, b),
        ]
    )  # fmt: skip


def written(program: Any, x: Tensor) -> Callable:
    """Writes in place into views, plain tensors and parts."""
    draw = program.draw

    def view_grows(x: Tensor) -> Tensor:
        part = x[:, :, 1:-1, 1:-1]
        part += F.avg_pool2d(x, 3, 1)
        return x

    def view_scaled(x: Tensor) -> Tensor:
        part = x[:, :, ::2]
        part *= 2
        return x

    def whole_grows(x: Tensor) -> Tensor:
        part = x[:, :, 1:]
        x += F.max_pool2d(x, 3, 1, 1)
        return part

    def by_expand(x: Tensor) -> Tensor:
        other = torch.zeros(x.shape)
        other.expand_as(x).add_(x)
        return x + other.flip(2)

    def by_like(x: Tensor) -> Tensor:
        other = torch.zeros_like(x)
        other += x
        return x - other.roll(3, 3)

    def by_part(x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, 0] = y[:, :, -1]
        return y

    def by_data(x: Tensor) -> Tensor:
        y = x.clone()
        y.data = x.flip(3).data
        return y

    def by_out(x: Tensor) -> Tensor:
        other = torch.empty_like(x)
        torch.mul(x, 2, out=other)
        return other

    return draw.choice([view_grows, view_scaled, whole_grows, by_expand, by_like, by_part, by_data, by_out])


def norm(program: Any, x: Tensor) -> Any:
    draw, channels = program.draw, x.shape[1]
    mean, var = torch.randn(channels), torch.rand(channels) + 0.5
    training = draw.random() < 0.2
    layer = nn.BatchNorm2d(channels, track_running_stats=draw.random() < 0.8, affine=draw.random() < 0.5)
    return draw.choice(
        [
            layer, layer, lambda x: F.batch_norm(x, mean, var, training=training),
            lambda x: torch.batch_norm(x, mean, var, mean, var, training, 0.1, 1e-5, False),
            lambda x: torch.batch_norm(x, mean, var, None, None, True, 0.1, 1e-5, False),
            lambda x: F.layer_norm(x, x.shape[1:]), lambda x: F.local_response_norm(x, 2), lambda x: F.instance_norm(x),
            nn.GroupNorm(1, channels), lambda x: F.rms_norm(x.movedim(1, -1), (channels,)).movedim(-1, 1),
        ]
    )  # fmt: skip


def mixing(program: Any, x: Tensor) -> Callable:
    draw, dim = program.draw, program.draw.choice([2, 3, -1, -2, 1])
    rows, cols = x.shape[2:]
    index = torch.randperm(rows)
    return draw.choice(
        [
            lambda x: x.roll(2, dim), lambda x: x.flip(dim), lambda x: x.sort(dim)[0], lambda x: x.cumsum(dim),
            lambda x: x.cummax(dim)[0], lambda x: x.topk(1, dim)[0] + x, lambda x: torch.ones(rows, rows) @ x,
            lambda x: torch.einsum("bchw,wv->bchv", x, torch.ones(cols, cols)), lambda x: x[:, :, index],
            lambda x: F.interpolate(x, scale_factor=2), lambda x: F.grid_sample(x, torch.zeros(len(x), 4, 4, 2)),
            lambda x: F.fold(F.unfold(x, 3), (rows, cols), 3), lambda x: x.unfold(2, 3, 1).amax(-1),
            lambda x: F.pixel_shuffle(torch.cat([x] * 4, 1), 2), lambda x: F.adaptive_avg_pool2d(x, (rows, cols)),
            lambda x: F.adaptive_max_pool2d(x, 1) + x, lambda x: torch.fft.fft(x).real, lambda x: x.rot90(1, (2, 3)),
            lambda x: x.gather(2, (x > 0.5).long()), lambda x: x.scatter(3, (x > 0.5).long(), 1.0), lambda x: x.mT,
            lambda x: x.reshape(len(x), -1, cols, rows), lambda x: x.flatten(2).unflatten(2, (rows, cols)),
            lambda x: x.as_strided(x.shape, x.stride()), lambda x: torch.diff(x, dim=dim), lambda x: x.movedim(2, 3),
            lambda x: torch.stack(list(x.unbind(2)), 2), lambda x: x + x.mean((2, 3), keepdim=True), lambda x: x.T,
            lambda x: x[::2].repeat_interleave(2, 0), lambda x: x + x.flip(0), lambda x: x[torch.arange(len(x)) - 1],
            lambda x: F.conv_transpose2d(x, torch.ones(x.shape[1], 3, 2, 2)), lambda x: x.tril(), lambda x: x.t(),
            lambda x: F.dropout(x, 0.2, True), lambda x: x + torch.rand(1), lambda x: x * torch.randn_like(x),
            lambda x: F.softmax(x.flatten(2), -1).view_as(x), lambda x: x / x.max(), lambda x: x.norm() * x,
        ]
    )  # fmt: skip


LOCAL: dict[str, Callable] = {
    "layer_conv": unary(layer_conv),
    "function_conv": unary(function_conv),
    "pool": unary(pool),
    "activation": unary(activation),
    "padding": unary(padding),
    "cut": unary(cut),
    "layout": unary(layout),
    "two": binary(two),
}
OTHER: dict[str, Callable] = {
    "reduction": unary(reduction),
    "written": unary(written),
    "norm": unary(norm),
    "mixing": unary(mixing),
    "gated": unary(escapes.gated),
    "stateful": unary(escapes.stateful),
}
