"""The trainable form of attention pooling; `frozen` gives the integer readout that certificates use.

Real values are in units of 1/32 and readout weights in units of 1/128, so that rounding needs no calibration. The
forward pass rounds as the integer readout does and gradients pass through (straight-through estimator): training sees
the arithmetic that is deployed.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from bagcert.aggregation import HIDDEN_UNIT, POOLED_LIMIT, VALUE_LIMIT, WEIGHT_LIMIT, AttentionPooling
from bagcert.errors import UsageError

UNITS = 32
"""Integer steps in a value, pooled value or hidden value of 1."""
FIRST_WEIGHT = 16.0
"""The attention weight that an untrained network gives to a region."""


LARGEST_LOGIT = math.log(WEIGHT_LIMIT)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):  # type: ignore[no-untyped-def, override]
        return x.round()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def, override]
        return grad


def rounded(x: Tensor) -> Tensor:
    """`round(x)` forward, the identity backward; one operation where `x + (x.round() - x).detach()` takes three."""
    return _Rounded.apply(x)  # type: ignore[no-any-return]


def finite(z: Tensor) -> Tensor:
    """float32 without NaN (0) and infinities (large numbers)."""
    return torch.nan_to_num(z.float(), nan=0.0, posinf=1e6, neginf=-1e6)


def clipped(x: Tensor, least: int | float, most: int | float) -> Tensor:
    """`x` within a range forward, the identity backward."""
    return x.clamp(least, most).detach() + (x - x.detach())


class AttentionReadout(nn.Module):
    """Attention pooling and a small network: a real map [batch, values + heads, rows, cols] to class scores.

    Args:
        classes: how many.
        values: channels that are pooled.
        heads: attention heads, each for `values / heads` of the values.
        hidden: hidden units after the pooling.
        map_size: (rows, columns). Each head has a learned bias per region and can so attend to a part of the image.
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
        """Channels that the network must have: values, then heads."""
        return self.values + self.heads

    @torch.no_grad()
    def integers(self, z: Float[Tensor, "batch channels rows cols"]) -> Int[Tensor, "batch channels rows cols"]:
        """The integer map that rules see, int32: products `e v`, then weights `e`. NaN becomes 0 before the split.

        An addition, a multiplication by a power of two, comparisons and products of integers: each integer follows
        from the scores of its own region alone, whatever a device makes of an exponential.
        """
        values, logits = self._split(finite(z))
        values = values.clamp(-VALUE_LIMIT, VALUE_LIMIT).round()
        steps = torch.tensor(weight_steps(), dtype=torch.float32, device=z.device)
        weights = torch.bucketize(logits.contiguous(), steps, right=True) + 1
        products = weights.unsqueeze(2) * values.to(torch.int32).unflatten(1, (self.heads, -1))
        return torch.cat([products.flatten(1, 2), weights], 1).to(torch.int32)

    def evidence(self, z: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels rows cols"]:
        """The same map as real numbers, with gradients."""
        values, logits = self._split(z.float())
        values = rounded(values.clamp(-VALUE_LIMIT, VALUE_LIMIT))
        return self._products(values, rounded(logits.clamp(0, LARGEST_LOGIT).exp()))

    def slopes(self, z: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels rows cols"]:
        """The same map without rounding, with gradients also where values or weights are clipped.

        For attacks, which must not stop where a network is saturated (Athalye et al., ICML 2018).
        """
        values, logits = self._split(finite(z))
        return self._products(clipped(values, -VALUE_LIMIT, VALUE_LIMIT), clipped(logits, 0.0, LARGEST_LOGIT).exp())

    def forward(self, sums: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch classes"]:
        """Real class scores from sums of `evidence` over the kept regions."""
        total = sums[..., : self.values].unflatten(-1, (self.heads, -1))
        mean = total / sums[..., self.values :, None].clamp(min=1)
        pooled = rounded(mean).clamp(-POOLED_LIMIT, POOLED_LIMIT).flatten(-2) / UNITS
        hidden = rounded(self.first(pooled) * UNITS).clamp(0, POOLED_LIMIT) / UNITS
        return self.second(hidden) + self.skip(pooled)

    def soft(self, sums: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch classes"]:
        """`forward` without rounding and saturation: for attacks, like `slopes`."""
        total = sums[..., : self.values].unflatten(-1, (self.heads, -1))
        pooled = (total / sums[..., self.values :, None].clamp(min=1)).flatten(-2) / UNITS
        return self.second(self.first(pooled).relu()) + self.skip(pooled)

    @torch.no_grad()
    def frozen(self) -> AttentionPooling:
        """The integer readout. Scaling by powers of two and rounding give the same integers on every machine.

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
        """[batch, values + heads, rows, cols]: values times the weight of their head, then weights."""
        products = weights.unsqueeze(2) * values.unflatten(1, (self.heads, -1))
        return torch.cat([products.flatten(1, 2), weights], 1)

    def _split(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Values in integer units and logarithms of attention weights, neither clipped nor rounded.

        Raises:
            UsageError: a map of another size.
        """
        if z.shape[2:] != self.position.shape[1:]:
            expected, found = ("x".join(map(str, shape[-2:])) for shape in (self.position.shape, z.shape))
            raise UsageError(f"attention pooling is for maps of {expected} regions, got {found}; resize the images")
        return z[:, : self.values] * UNITS, z[:, self.values :] + (self.position + math.log(FIRST_WEIGHT))


@cache
def weight_steps() -> tuple[float, ...]:
    """The logarithms at which a rounded weight becomes 2, 3, ... 255, ascending."""
    return tuple(math.log(weight - 0.5) for weight in range(2, WEIGHT_LIMIT + 1))


def attention_masking_loss(
    readout: AttentionReadout,
    z: Float[Tensor, "batch channels rows cols"],
    labels: Int[Tensor, " batch"],
    windows: Float[Tensor, "windows rows cols"],
    full_weight: float = 0.5,
    label_smoothing: float = 0.0,
) -> Float[Tensor, " batch"]:
    """`CE(scores of the kept regions) + full_weight * CE(scores of all regions)`, two windows left out.

    The windows are chosen greedily by the readout: the one without which the cross-entropy of the label is largest,
    then the next. That takes two readouts per window and no further forward pass.

    Args:
        windows: 1 in the regions of each window, 0 elsewhere.
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
    loss = F.cross_entropy(kept, labels, reduction="none", label_smoothing=label_smoothing)
    return loss + full_weight * F.cross_entropy(full, labels, reduction="none", label_smoothing=label_smoothing)
