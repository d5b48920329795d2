"""Derived receptive fields against brute force, and every refusal by name."""

import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from bagcert.errors import UnsoundError, UsageError
from bagcert.nets.receptive_field.derive import derive_grid
from bagcert.nets.receptive_field.probe import probe_grid
from tests import refused


def positive(net):
    """Weights that let every increase of a pixel through, in float64."""
    net = net.double().eval()
    for name, value in [*net.named_parameters(), *net.named_buffers()]:
        if value.is_floating_point():
            value.data.uniform_(0.2, 1.0)
        assert "num_batches" in name or value.is_floating_point()
    return net


def brute_force(net, size, channels=2):
    """Boolean [map rows, map cols, height, width]: which outputs move when one pixel grows, pixel by pixel."""
    height, width = size
    image = torch.rand(1, channels, height, width, dtype=torch.float64)
    images = image.repeat(height * width, 1, 1, 1)
    for k in range(height * width):
        images[k, :, k // width, k % width] += 100.0
    with torch.no_grad():
        moved = (net(images) != net(image)).any(1)
    return moved.permute(1, 2, 0).reshape(*moved.shape[1:], height, width).numpy()


def product(grid):
    return np.einsum("ai,bj->abij", grid.rows_seen, grid.cols_seen)


def assert_exact(net, size, channels=2):
    grid = derive_grid(positive(net), size, channels)
    np.testing.assert_array_equal(product(grid), brute_force(net, size, channels))
    assert grid.covers(probe_grid(net, size, channels))
    return grid


def assert_covers(net, size, channels=2):
    grid = derive_grid(positive(net), size, channels)
    assert not (brute_force(net, size, channels) & ~product(grid)).any()
    return grid


class Call(nn.Module):
    """A function as a layer."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Residual(nn.Module):
    """y = body(x) + the part of x that is left, written in the way of BagNet's reference code."""

    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        y = self.body(x)
        if x.size(-1) != y.size(-1):
            rows, cols = x.size(-2) - y.size(-2), x.size(-1) - y.size(-1)
            x = x[:, :, rows // 2 : -rows + rows // 2, cols // 2 : -cols + cols // 2]
        y += x
        return y


def random_layer(draw, channels):
    kernel = (draw.randint(1, 4), draw.randint(1, 4))
    stride = (draw.choice([1, 1, 2, 3]), draw.choice([1, 1, 2]))
    dilation = (draw.choice([1, 1, 2]), draw.choice([1, 1, 2]))
    mode = draw.choice(["zeros", "zeros", "reflect", "replicate", "circular"])
    half = (kernel[0] // 2, kernel[1] // 2)
    kind = draw.randrange(6)
    if kind == 0:
        padding = draw.choice([0, (draw.randint(0, 2), draw.randint(0, 2)), "valid"])
        return nn.Conv2d(channels, channels, kernel, stride, padding, dilation, padding_mode=mode)
    if kind == 1:
        return nn.Conv2d(channels, channels, kernel, 1, "same", dilation, groups=channels, padding_mode=mode)
    if kind == 2:
        return nn.MaxPool2d(kernel, draw.choice([None, stride]), half, dilation, ceil_mode=draw.random() < 0.5)
    if kind == 3:
        return nn.AvgPool2d(
            kernel, draw.choice([None, stride]), half, draw.random() < 0.5, count_include_pad=draw.random() < 0.5
        )
    if kind == 4:
        pads = tuple(draw.randint(0, 2) for _ in range(4))
        return draw.choice(
            [
                nn.ZeroPad2d(pads),
                nn.ConstantPad2d(pads, 0.5),
                nn.ReflectionPad2d(pads),
                nn.ReplicationPad2d(pads),
                nn.CircularPad2d(pads),
                nn.ZeroPad2d((-1, 1, 0, -1)),
            ]
        )
    return draw.choice([nn.BatchNorm2d(channels), nn.ReLU(), nn.Dropout(), nn.Identity(), nn.PixelUnshuffle(1)])


@pytest.mark.parametrize("seed", range(60))
def test_random_stacks_against_brute_force(seed):
    draw = random.Random(seed)
    torch.manual_seed(seed)
    size = (draw.randint(7, 12), draw.randint(7, 12))
    for _ in range(50):  # stacks that do not fit the image are drawn again
        net = positive(nn.Sequential(*(random_layer(draw, 2) for _ in range(draw.randint(1, 4)))))
        try:
            net(torch.rand(1, 2, *size, dtype=torch.float64))
        except RuntimeError:
            continue
        assert_exact(net, size)
        return
    pytest.fail("no stack fits")


@pytest.mark.parametrize("padding_mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_same_padding_in_every_mode(padding_mode, kernel):
    grid = assert_exact(nn.Conv2d(2, 3, kernel, padding="same", padding_mode=padding_mode), (6, 9))
    assert grid.map_size == (6, 9)


@pytest.mark.parametrize("pool", [nn.MaxPool2d, nn.AvgPool2d])
@pytest.mark.parametrize("side", [7, 8, 9, 10])
def test_ceil_mode(pool, side):
    assert_exact(pool(3, 2, 1, ceil_mode=True), (side, 8))


@pytest.mark.parametrize(
    "layer",
    [
        nn.ReLU(), nn.ReLU(inplace=True), nn.ReLU6(), nn.GELU(), nn.SiLU(), nn.LeakyReLU(), nn.Hardswish(),
        nn.Sigmoid(), nn.Tanh(), nn.Identity(), nn.Dropout(), nn.Dropout2d(), nn.Softplus(), nn.ELU(), nn.PReLU(2),
        nn.Mish(), nn.BatchNorm2d(2), nn.Hardtanh(), nn.Hardsigmoid(), nn.CELU(), nn.SELU(), nn.Softsign(),
        nn.LogSigmoid(), nn.Softmax2d(), nn.LogSoftmax(1), nn.Threshold(0.1, 0.0),
    ],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_elementwise_layers(layer):
    net = nn.Sequential(nn.Conv2d(3, 2, 3), layer)
    grid = derive_grid(net, (6, 7))
    assert grid.covers(derive_grid(net[:1], (6, 7)))
    measured = probe_grid(net, (6, 7))
    assert grid.covers(measured)
    assert measured.covers(grid)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.relu(x) * 2 + 1,
        lambda x: torch.add(x, x.abs(), alpha=0.5),
        lambda x: (x - torch.full((1, 2, 1, 1), 0.5)) / torch.ones(1, 2, 1, 1),
        lambda x: x.float().double().contiguous(memory_format=torch.channels_last),
        lambda x: F.pad(x, (1, 2, 0, 1)),
        lambda x: F.pad(x, (-1, 2), value=3.0),
        lambda x: F.pad(x, (1, 1, 1, 1, 0, 2)),
        lambda x: F.avg_pool2d(x, 2),
        lambda x: F.max_pool2d(x, kernel_size=2, stride=1),
        lambda x: F.conv2d(x, torch.ones(1, 2, 3, 2, dtype=x.dtype), stride=(2, 1)),
        lambda x: F.pixel_unshuffle(F.pad(x, (0, 1, 1, 0)), 2),
        lambda x: F.channel_shuffle(x, 2),
        lambda x: x[:, :, 1:-1, 2:],
        lambda x: x[..., ::2, -5:],
        lambda x: x[:, 1:, :, ::3],
        lambda x: x[:, 0][:, None, 1:],
        lambda x: torch.cat([x, x * 2], dim=1),
        lambda x: torch.cat(x.chunk(2, 1)[::-1], 1),
        lambda x: torch.cat(x.split([2, x.shape[3] - 2], dim=3)[::-1], 3),
        lambda x: x.narrow(2, 1, 3),
        lambda x: x.mean(1, keepdim=True) + x.amax(dim=1, keepdim=True),
        lambda x: x.max(dim=1, keepdim=True).values,
        lambda x: sum([x, x.clamp(min=0.0)]),
        lambda x: x.permute(0, 3, 2, 1)[:, 1:].permute(0, 3, 2, 1),
        lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (2,), eps=1.0).permute(0, 3, 1, 2),
        lambda x: F.linear(x.permute(0, 2, 3, 1), torch.ones(3, 2, dtype=x.dtype)).permute(0, 3, 1, 2),
        lambda x: x.view(x.shape[0], 2, 1, *x.shape[2:]).transpose(1, 2).reshape(x.shape),
        lambda x: x.sum(1, keepdim=True).expand(-1, 3, -1, -1),
        lambda x: x.mul_(2).add_(F.avg_pool2d(x, 3, 1, 1)),
    ],
)  # fmt: skip
def test_functions_against_brute_force(function):
    torch.manual_seed(0)
    assert_exact(nn.Sequential(nn.Conv2d(2, 2, 2), Call(function)), (8, 10))


def test_pixel_shuffle():
    assert assert_exact(nn.PixelUnshuffle(2), (6, 8)).map_size == (3, 4)
    refused(UsageError, "PixelShuffle", derive_grid, nn.PixelShuffle(2), (6, 8), 4)


@pytest.mark.parametrize("kernel", [1, 3, (2, 3), (3, 5)])
def test_residual_blocks_with_center_crop(kernel):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, kernel))
    if kernel == (2, 3):
        body.append(nn.Conv2d(2, 2, (2, 1)))
    net = nn.Sequential(nn.Conv2d(2, 2, 3), Residual(body), nn.ReLU(inplace=True), Residual(nn.Conv2d(2, 2, 3)))
    assert_exact(net, (11, 13))


def test_branches_of_different_geometry_are_covered():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.tall, self.wide = nn.Conv2d(2, 2, (5, 1), padding=(2, 0)), nn.Conv2d(2, 2, (1, 5), padding=(0, 2))

        def forward(self, x):
            return torch.cat([self.tall(x), self.wide(x)], 1)

    assert assert_covers(Fork(), (8, 9)).receptive_field == (5, 5)


def test_mode_and_state_are_left_alone():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout())
    net[1].eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    derive_grid(net, (8, 8))
    probe_grid(net, (8, 8))
    assert [part.training for part in net] == [True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in net.modules())
    assert type(net(torch.rand(2, 3, 8, 8))) is torch.Tensor


class SqueezeExcite(nn.Module):
    def forward(self, x):
        return x * x.mean((2, 3), keepdim=True).sigmoid()


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        tokens = x.permute(0, 2, 3, 1)
        return self.attention(tokens, tokens, tokens)[0]


UNSOUND = {
    "AdaptiveAvgPool2d": nn.AdaptiveAvgPool2d(1),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d((2, 2)),
    "SqueezeExcite": SqueezeExcite(),
    "GroupNorm": nn.GroupNorm(2, 8),
    "InstanceNorm2d": nn.InstanceNorm2d(8),
    "LayerNorm": nn.LayerNorm((8, 6, 6)),
    "MultiheadAttention": Attention(),
    "LSTM": nn.LSTM(6, 6),
    "Flatten": nn.Flatten(),
    "Linear": nn.Linear(6, 2),
    "Softmax": nn.Softmax(3),
    "BatchNorm2d": nn.BatchNorm2d(8, track_running_stats=False),
    "LocalResponseNorm": nn.LocalResponseNorm(2),
    "adaptive_avg_pool2d in": Call(lambda x: x + F.adaptive_avg_pool2d(x, 1)),
    "batch_norm in": Call(lambda x: F.batch_norm(x, torch.zeros(8), torch.ones(8), training=True)),
    "mean in": Call(lambda x: x - x.mean()),
    "max in": Call(lambda x: x / x.max()),
    "softmax in": Call(lambda x: torch.softmax(x, -1)),
    "scaled_dot_product_attention in": Call(lambda x: F.scaled_dot_product_attention(x, x, x)),
    "matmul in": Call(lambda x: x @ x),
    "einsum in": Call(lambda x: torch.einsum("bchw,bcwh->bchw", x, x)),
    "flatten in": Call(lambda x: x.flatten(2)),
    "reshape in": Call(lambda x: x.reshape(x.shape[0], 8, 3, 12)),
    "dropout in": Call(lambda x: F.dropout(x, 0.5)),
    "cumsum in": Call(lambda x: x.cumsum(2)),
    "roll in": Call(lambda x: x.roll(1, 2)),
    "var in": Call(lambda x: x.var(0, keepdim=True)),
    "add in": Call(lambda x: x + x.transpose(2, 3)),
}
REASONS = {
    "AdaptiveAvgPool2d": "it pools over the whole map",
    "BatchNorm2d": "statistics of the batch",
    "batch_norm in": "statistics of the batch",
    "scaled_dot_product_attention in": "every position attends to every other",
}


@pytest.mark.parametrize("name", UNSOUND)
def test_not_local_refused(name):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Sequential(nn.ReLU(), UNSOUND[name]))
    said = refused(UnsoundError, "is not local", derive_grid, net, (8, 8))
    assert name in said
    assert "layer '1.1" in said
    assert REASONS.get(name, "") in said


UNSUPPORTED = {
    "Upsample": nn.Upsample(scale_factor=2),
    "ConvTranspose2d": nn.ConvTranspose2d(8, 8, 2),
    "interpolate in": Call(lambda x: F.interpolate(x, scale_factor=2)),
    "conv2d in": Call(lambda x: F.conv2d(torch.ones(1, 8, 9, 9), x)),
    "add in": Call(lambda x: torch.add(x, x, out=torch.empty(2, 8, 6, 6))),
    "add_ in": Call(lambda x: torch.zeros(2, 8, 6, 6).add_(x)),
    "setitem in": Call(lambda x: x.__setitem__((slice(None), 0), 0.0)),
    "getitem in": Call(lambda x: x[:1]),
    "bool in": Call(lambda x: x if x.relu() > 0 else -x),
    "item in": Call(lambda x: x * x.sum(1, keepdim=True).item()),
    "tolist in": Call(lambda x: x.tolist()),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_not_followed_refused(name):
    said = refused(UsageError, None, derive_grid, nn.Sequential(nn.Conv2d(3, 8, 3), UNSUPPORTED[name]), (8, 8))
    assert name.removesuffix("_ in") in said


def test_shared_memory_refused():
    def widen(x):
        part = x[:, :, 1:-1, 1:-1]
        part += F.avg_pool2d(x, 3, 1)
        return x

    def widen_the_whole(x):
        part = x[:, :, 1:-1, 1:-1]
        x += F.avg_pool2d(x, 3, 1, 1)
        return part

    for function in (widen, widen_the_whole):
        refused(UsageError, "shares its memory", derive_grid, Call(function), (8, 8))


def test_batch_norm_in_train_mode_refused():
    class Stubborn(nn.BatchNorm2d):
        def train(self, mode=True):
            return super().train(True)

    with pytest.raises(UnsoundError, match=r"'1' \(Stubborn\) is not local: it normalizes by statistics of the batch"):
        derive_grid(nn.Sequential(nn.Conv2d(3, 2, 3), Stubborn(2)), (8, 8))


def test_values_that_lose_their_footprint_are_found():
    class Escape(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.Tensor._make_subclass(torch.Tensor, x)

    with pytest.raises((UsageError, UnsoundError)):
        derive_grid(Call(lambda x: x + torch.vmap(lambda image: image.mean() + image)(x)), (8, 8))
    with pytest.raises(UsageError, match="whose origin cannot be traced"):
        derive_grid(Call(lambda x: x + Escape.apply(x).roll(3, 2)), (8, 8))


def test_straight_through_functions_are_followed():
    class Step(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return (z > 0).to(z.dtype)

    grid = derive_grid(nn.Sequential(nn.Conv2d(3, 2, 3), Call(Step.apply)), (8, 8))
    assert grid.receptive_field == (3, 3)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (Call(lambda x: (x, x)), "returns tuple"),
        (Call(lambda x: torch.zeros(2, 3, 4, 4)), "does not come from the image"),
        (Call(lambda x: x.sum(1)), r"returns \[2, 8, 8\]"),
        (Call(lambda x: x.transpose(2, 3)), "must return one map"),
        (nn.Conv2d(5, 2, 3), "image of 3x8x8"),
        (nn.Conv2d(3, 2, 9), "image of 3x8x8"),
        (torch.jit.script(nn.Sequential(nn.ReLU())), "TorchScript"),
    ],
)
def test_other_outputs_refused(net, words):
    refused(UsageError, words, derive_grid, net, (8, 8))


def test_weight_parametrizations_and_half_precision():
    net = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.Conv2d(4, 2, 2)).bfloat16()
    assert derive_grid(net, (8, 9)).map_size == (5, 6)
