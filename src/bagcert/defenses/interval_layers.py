"""Propagation of boxes through layers: bounds on the activations for all inputs within a box.

A box has a center and a radius per activation, in float64. An affine layer y = A x + b maps the center to A c + b and
the radius to |A| r. ReLU is applied to both ends of the interval.

Rounding: if n products and a bias are summed in floating point with unit roundoff u, in any order and with or without
fused operations, the error is at most g(n + 1) * (|A| |x| + |b|), where g(k) = k u / (1 - k u) (Higham, Accuracy and
Stability of Numerical Algorithms, section 3.1). Each affine layer widens its box by twice
g(n + 2) * (|A| (|c| + r) + |b|) with u = 2^-24 (float32), and by a bound on underflow. The computed activations
therefore lie in the computed boxes:
- for a float32 forward pass that sums products and does not overflow (without Winograd, FFT or TF32);
- for the float64 forward pass of `IntervalBounds.predict` with any algorithm, by a factor of 2^29;
- the second half of the slack exceeds the float64 rounding of center, radius and slack by the same factor.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as all_modules
from torch.nn.utils import parametrize

from bagcert.errors import UsageError
from bagcert.nets.region_scorer import Normalize

_UNIT_ROUNDOFF = 2.0**-24
_SMALLEST_NORMAL = 2.0**-126
_IGNORED = (nn.Identity, nn.Dropout, nn.Dropout2d)  # no effect in eval mode
_BOUNDED = (nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten, nn.AvgPool2d, nn.BatchNorm2d, Normalize)


@dataclass(frozen=True, eq=False)
class Box:
    """Intervals [center - radius, center + radius] of activations in float64, one box per row."""

    center: Float[Tensor, "rows *shape"]
    radius: Float[Tensor, "rows *shape"]


def flat_layers(model: nn.Module) -> list[nn.Module]:
    """List the layers of a network in order, flattening nested sequences and omitting layers without effect.

    Raises:
        UsageError: the network is not an `nn.Sequential`, contains an unsupported or modified layer (named in the
            message), or hooks are registered for all modules.
    """
    if type(model) is not nn.Sequential:
        raise UsageError(f"interval bounds need the layers in an nn.Sequential, got {type(model).__name__}")
    if all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks:
        raise UsageError("interval bounds do not support hooks that are registered for all modules")
    layers = []
    for name, layer in model.named_modules(remove_duplicate=False):  # a layer may be used several times
        if reason := _altered(layer) or _unbounded(layer):
            named = f"layer {name} of the network, {' '.join(str(layer).split())}" if name else "the network"
            raise UsageError(f"interval bounds do not support {named}: {reason}")
        if type(layer) in _BOUNDED:
            layers.append(layer)
    return layers


def _altered(layer: nn.Module) -> str:
    """Why a layer may compute something other than its type implies; empty if it does not."""
    if layer._forward_hooks or layer._forward_pre_hooks:
        return "it has hooks"
    if parametrize.is_parametrized(layer):
        return "its weights have parametrizations; remove them first, see torch.nn.utils.parametrize"
    replaced = [name for name in vars(layer) if callable(getattr(type(layer), name, None))]
    if replaced:
        return f"its method {replaced[0]!r} is replaced"
    if type(layer) is not nn.Sequential and any(child is not None for child in layer.children()):
        return "it has layers of its own"
    tensors = [*layer.parameters(recurse=False), *layer.buffers(recurse=False)]
    if any(type(tensor) not in (Tensor, nn.Parameter) for tensor in tensors):
        return "its weights are not plain tensors"
    return ""


def _unbounded(layer: nn.Module) -> str:
    """Why a layer cannot be bounded because of its type or options; empty if it can, or if it has no effect."""
    if type(layer) is nn.Sequential or type(layer) in _IGNORED:
        return ""
    if type(layer) not in _BOUNDED:  # exact types, since a subclass may compute something else
        return f"supported layers are {', '.join(kind.__name__ for kind in _BOUNDED)}"
    if isinstance(layer, nn.Conv2d) and layer.padding_mode != "zeros":
        return "padding must be zero padding"
    if isinstance(layer, nn.AvgPool2d) and layer.divisor_override is not None:
        return "the divisor must be the number of pixels"
    if isinstance(layer, nn.BatchNorm2d) and (layer.running_mean is None or layer.running_var is None):
        return "it has no running statistics, so the images of a batch influence each other"
    if isinstance(layer, nn.Flatten) and (layer.start_dim, layer.end_dim) != (1, -1):
        return "it must flatten all but the batch axis"
    return ""


def through(layer: nn.Module, box: Box) -> Box:
    """Propagate a box through a layer of `flat_layers`, in float64 and eval mode."""
    if isinstance(layer, nn.Flatten):
        return Box(box.center.flatten(1), box.radius.flatten(1))
    if isinstance(layer, nn.ReLU):
        low, high = (box.center - box.radius).clamp(min=0), (box.center + box.radius).clamp(min=0)
        # Seven rounding errors of half a unit in the last place are together below 2^-48 of the upper end.
        return Box((low + high) / 2, (high - low) / 2 + high * 2.0**-48)
    reach = box.center.abs() + box.radius
    radius, size = _magnitude(layer, torch.cat([box.radius, reach])).chunk(2)
    terms, shift = _terms_and_shift(layer)
    return Box(layer(box.center), radius + slack(size + shift, terms))


def slack(size: Tensor, terms: int) -> Tensor:
    """Twice the bound on the rounding error of a sum of `terms` products and a bias, with `size` = |A| |x| + |b|."""
    count = terms + 2
    gamma = count * _UNIT_ROUNDOFF / (1 - count * _UNIT_ROUNDOFF)
    return 2 * (gamma * size + count * _SMALLEST_NORMAL)


def _magnitude(layer: nn.Module, x: Tensor) -> Tensor:
    """Compute |A| x for an affine layer and x >= 0."""
    if isinstance(layer, nn.Conv2d):
        return functional.conv2d(x, layer.weight.abs(), None, layer.stride, layer.padding, layer.dilation, layer.groups)
    if isinstance(layer, nn.Linear):
        return functional.linear(x, layer.weight.abs())
    if isinstance(layer, nn.BatchNorm2d):
        return x * _scale(layer).abs()[:, None, None]
    if isinstance(layer, Normalize):
        return x / layer.std.abs()
    assert isinstance(layer, nn.AvgPool2d)
    return layer(x)


def _terms_and_shift(layer: nn.Module) -> tuple[int, Tensor | float]:
    """Number of products per output of an affine layer, and |b|. For normalization each operation is counted."""
    if isinstance(layer, nn.Conv2d):
        shift = 0.0 if layer.bias is None else layer.bias.abs()[:, None, None]
        return layer.weight[0].numel(), shift
    if isinstance(layer, nn.Linear):
        return layer.in_features, 0.0 if layer.bias is None else layer.bias.abs()
    if isinstance(layer, nn.BatchNorm2d):
        assert layer.running_mean is not None
        shift = (layer.running_mean * _scale(layer)).abs()
        shift = shift if layer.bias is None else shift + layer.bias.abs()
        return 12, shift[:, None, None]
    if isinstance(layer, Normalize):
        return 4, (layer.mean / layer.std).abs()
    assert isinstance(layer, nn.AvgPool2d)
    sides = layer.kernel_size if isinstance(layer.kernel_size, tuple) else (layer.kernel_size, layer.kernel_size)
    return sides[0] * sides[1], 0.0


def _scale(layer: nn.BatchNorm2d) -> Tensor:
    assert layer.running_var is not None
    scale = 1 / torch.sqrt(layer.running_var + layer.eps)
    return scale if layer.weight is None else scale * layer.weight


def last_layer(layers: list[nn.Module]) -> tuple[list[nn.Module], nn.Linear | None]:
    """Split the layers into those before a final linear layer and that layer; (layers, None) if there is none."""
    return (layers[:-1], layers[-1]) if layers and isinstance(layers[-1], nn.Linear) else (layers, None)


def margin_bounds(
    box: Box,
    weight: Float[Tensor, "classes features"] | None,
    bias: Float[Tensor, " classes"] | None,
    label: Int[Tensor, " rows"],
) -> Float[Tensor, "rows classes"]:
    """Lower bounds of z_y - z_c for every class c: inf for y itself, -inf after an overflow.

    The difference of two logits is bounded as one linear function of the last activations. This is tighter than the
    difference of two bounds, because contributions to both logits cancel.

    Args:
        weight, bias: weights of the last layer, in the dtype of the box. If `weight` is None, the box contains logits.
        label: class index y of each row.
    """
    if weight is None:
        weight = torch.eye(box.center.shape[1], dtype=box.center.dtype, device=label.device)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    difference = weight[label][:, None] - weight
    center = torch.einsum("rcf,rf->rc", difference, box.center) + bias[label][:, None] - bias
    radius = torch.einsum("rcf,rf->rc", difference.abs(), box.radius)
    rounding = slack((box.center.abs() + box.radius) @ weight.abs().T + bias.abs(), weight.shape[1])
    every = torch.arange(len(label), device=label.device)
    lower = center - radius - rounding - rounding[every, label][:, None]
    own = functional.one_hot(label, len(weight)).bool()
    return lower.masked_fill(own, torch.inf).nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
