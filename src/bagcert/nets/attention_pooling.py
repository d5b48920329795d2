"""Trainable attention pooling. `AttentionReadout.frozen` returns the integer readout used by certificates.

Real values are in units of 1/32 and readout weights in units of 1/128, so rounding needs no calibration. The forward
pass rounds like the integer readout, with straight-through gradients, so training uses the deployed arithmetic.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bagcert.aggregation import HIDDEN_UNIT, POOLED_LIMIT, VALUE_LIMIT, WEIGHT_LIMIT, AttentionPooling
from bagcert.errors import UsageError

UNITS = 32  # number of integer steps per unit of a value, pooled value or hidden value
FIRST_WEIGHT = 16.0  # initial attention weight of a region in an untrained network


LARGEST_LOGIT = math.log(WEIGHT_LIMIT)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def, override]
        return x.round()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        return grad


def rounded(x: Tensor) -> Tensor:
    """Round in the forward pass, with the gradient of the identity; faster than `x + (x.round() - x).detach()`."""
    return _Rounded.apply(x)  # type: ignore[no-any-return]


def finite(z: Tensor) -> Tensor:
    """Convert to float32, replacing NaN by 0 and infinities by large numbers."""
    return torch.nan_to_num(z.float(), nan=0.0, posinf=1e6, neginf=-1e6)


def clipped(x: Tensor, least: int | float, most: int | float) -> Tensor:
    """Clip in the forward pass, with the gradient of the identity."""
    return x.clamp(least, most).detach() + (x - x.detach())


class AttentionReadout(nn.Module):
    """Attention pooling and a small network: maps [batch, values + heads, rows, cols] to class scores.

    Args:
        heads: number of attention heads; each pools `values / heads` channels.
        map_size: (rows, columns). Each head has a learned bias per region, so it can attend to a part of the image.
    """

    def __init__(self, classes: int, values: int, heads: int, hidden: int, map_size: tuple[int, int]) -> None:
        super().__init__()
        self.values, self.heads, self.classes = values, heads, classes
        self.first = nn.Linear(values, hidden)
        self.second = nn.Linear(hidden, classes, bias=False)
        self.skip = nn.Linear(values, classes)
        self.position = nn.Parameter(torch.zeros(heads, *map_size))

    @property
    def channels(self) -> int:
        """Number of output channels that the network must have: values, then heads."""
        return self.values + self.heads

    @torch.no_grad()
    def integers(self, z: Float[Tensor, "batch channels rows cols"]) -> Int[Tensor, "batch channels rows cols"]:
        """Compute the integer map used by rules, int32: products `e v`, then weights `e`. NaN is first replaced by 0.

        The computation consists of an addition, a multiplication by a power of two, comparisons and integer products.
        Each integer depends only on the scores of its own region, and not on a device's implementation of exp.
        """
        values, logits = self._split(finite(z))
        values = values.clamp(-VALUE_LIMIT, VALUE_LIMIT).round()
        steps = torch.tensor(weight_steps(), dtype=torch.float32, device=z.device)
        weights = torch.bucketize(logits.contiguous(), steps, right=True) + 1
        products = weights.unsqueeze(2) * values.to(torch.int32).unflatten(1, (self.heads, -1))
        return torch.cat([products.flatten(1, 2), weights], 1).to(torch.int32)

    def evidence(self, z: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels rows cols"]:
        """Compute the map as floats, with gradients, for training."""
        values, logits = self._split(z.float())
        values = rounded(values.clamp(-VALUE_LIMIT, VALUE_LIMIT))
        return self._products(values, rounded(logits.clamp(0, LARGEST_LOGIT).exp()))

    def slopes(self, z: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels rows cols"]:
        """Compute the map without rounding, with gradients even where values or weights are clipped.

        For attacks, which otherwise fail on saturated networks (Athalye et al., ICML 2018).
        """
        values, logits = self._split(finite(z))
        return self._products(clipped(values, -VALUE_LIMIT, VALUE_LIMIT), clipped(logits, 0.0, LARGEST_LOGIT).exp())

    def forward(self, sums: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch classes"]:
        """Compute real-valued class scores from sums of `evidence` over the kept regions."""
        total = sums[..., : self.values].unflatten(-1, (self.heads, -1))
        mean = total / sums[..., self.values :, None].clamp(min=1)
        pooled = rounded(mean).clamp(-POOLED_LIMIT, POOLED_LIMIT).flatten(-2) / UNITS
        hidden = rounded(self.first(pooled) * UNITS).clamp(0, POOLED_LIMIT) / UNITS
        return self.second(hidden) + self.skip(pooled)

    def soft(self, sums: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch classes"]:
        """`forward` without rounding and saturation, for attacks; see `slopes`."""
        total = sums[..., : self.values].unflatten(-1, (self.heads, -1))
        pooled = (total / sums[..., self.values :, None].clamp(min=1)).flatten(-2) / UNITS
        return self.second(self.first(pooled).relu()) + self.skip(pooled)

    @torch.no_grad()
    def frozen(self) -> AttentionPooling:
        """Create the integer readout by scaling with powers of two and rounding; identical on every machine.

        Raises:
            UsageError: a weight is so large that integer sums would not be exact.
        """

        def integers(x: Tensor, unit: int) -> Tensor:
            return (x.double() * unit).round().clamp(-(2.0**30), 2.0**30).to(torch.int32)

        return AttentionPooling(
            integers(self.first.weight, HIDDEN_UNIT),
            integers(self.first.bias, HIDDEN_UNIT * UNITS),
            integers(self.second.weight, HIDDEN_UNIT),
            integers(self.skip.weight, HIDDEN_UNIT),
            integers(self.skip.bias, HIDDEN_UNIT * UNITS),
            self.heads,
        )

    def _products(self, values: Tensor, weights: Tensor) -> Tensor:
        """Concatenate products of values with the weight of their head, and weights: [batch, values + heads, ...]."""
        products = weights.unsqueeze(2) * values.unflatten(1, (self.heads, -1))
        return torch.cat([products.flatten(1, 2), weights], 1)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Split into values in integer units and logarithms of attention weights, without clipping or rounding."""
        if z.shape[2:] != self.position.shape[1:]:
            expected, found = ("x".join(map(str, shape[-2:])) for shape in (self.position.shape, z.shape))
            raise UsageError(f"attention pooling is for maps of {expected} regions, got {found}; resize the images")
        return z[:, : self.values] * UNITS, z[:, self.values :] + (self.position + math.log(FIRST_WEIGHT))


@cache
def weight_steps() -> tuple[float, ...]:
    """Thresholds of the logarithm at which the rounded weight becomes 2, 3, ... 255, ascending."""
    return tuple(math.log(weight - 0.5) for weight in range(2, WEIGHT_LIMIT + 1))


def attention_masking_loss(
    readout: AttentionReadout,
    z: Float[Tensor, "batch channels rows cols"],
    labels: Int[Tensor, " batch"],
    windows: Float[Tensor, "windows rows cols"],
    full_weight: float = 0.5,
    label_smoothing: float = 0.0,
    targets: Float[Tensor, "batch classes"] | None = None,
) -> Float[Tensor, " batch"]:
    """Training loss: cross-entropy with two windows masked, plus `full_weight` times cross-entropy on all regions.

    The windows are chosen greedily: first the one whose masking gives the largest cross-entropy, then the next. This
    needs two readouts per window and no further forward pass.

    Args:
        windows: 1 in the regions of each window, 0 elsewhere.
        targets: class probabilities for both cross-entropies, instead of the labels. The labels still choose windows.
    """
    evidence = readout.evidence(z).flatten(2)
    masks = windows.flatten(1)
    keep = torch.ones_like(evidence[:, 0])
    with torch.no_grad():
        for _ in range(2):
            left = evidence * keep[:, None]
            sums = (left.sum(2, keepdim=True) - left @ masks.T).transpose(1, 2)
            scores = readout(sums)
            lead = scores.gather(2, labels[:, None, None].expand(-1, len(masks), 1))[..., 0]
            keep = keep * (1 - masks[(scores.logsumexp(2) - lead).argmax(1)])
    kept = readout((evidence * keep[:, None]).sum(2))
    full = readout(evidence.sum(2))
    target = labels if targets is None else targets
    loss = F.cross_entropy(kept, target, reduction="none", label_smoothing=label_smoothing)
    return loss + full_weight * F.cross_entropy(full, target, reduction="none", label_smoothing=label_smoothing)
