"""Integer attention pooling: aggregates the kept regions into one integer score per class.

Attention pooling followed by a small network is more expressive than a sum of class scores. Masking is still a
subtraction, and the double-masking proof holds for any function of the kept regions.

Every region has integer weights `e` in [1, 255], one per attention head, and integer values `v` in [-511, 511]. The map
contains the products `u = e v` and the weights. For a set K of kept regions:

    U_d = sum over K of u_d        A_h = sum over K of e_h        q_d = clip(round(U_d / A_h(d)), -127, 127)
    t = clip(round((first q + first_bias) / 128), 0, 127)   scores = second t + skip q + bias

where `round` rounds halves to even.

Source: Ilse et al., "Attention-based deep multiple instance learning", ICML 2018.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bagcert.errors import UsageError

WEIGHT_LIMIT = 255
"""Maximum attention weight of a region."""
VALUE_LIMIT = 511
"""Maximum absolute value of a region."""
PRODUCT_LIMIT = WEIGHT_LIMIT * VALUE_LIMIT
POOLED_LIMIT = 127
"""Maximum absolute pooled value and maximum hidden value."""
HIDDEN_UNIT = 128
"""Divisor of hidden sums before rounding."""


@dataclass(frozen=True, eq=False)
class AttentionPooling:
    """Integer readout of attention pooling: maps sums over the kept regions to one integer score per class.

    All results are exact. Sums over regions and products stay below 2^24 (float64 is used for more than 128 regions).
    A quotient U / A below 128 that is not a half-integer differs from every half-integer by at least
    1 / (2 A) > 2^-17. A correctly rounded division changes it by at most 2^-18, so `round(U / A)` equals the rounded
    rational number.

    Attributes:
        first, first_bias: weights of the hidden layer, integers [hidden, values] and [hidden].
        second: weights of the output layer, integers [classes, hidden].
        skip, bias: weights of the skip connection and output bias, integers [classes, values] and [classes].
        heads: number of attention heads; each weighs `values / heads` consecutive values.

    Raises:
        UsageError: the shapes do not match, or a result could leave the exact range of float32.
    """

    first: Int[Tensor, "hidden values"]
    first_bias: Int[Tensor, " hidden"]
    second: Int[Tensor, "classes hidden"]
    skip: Int[Tensor, "classes values"]
    bias: Int[Tensor, " classes"]
    heads: int

    def __post_init__(self) -> None:
        hidden, values, classes = len(self.first), self.first.shape[1], len(self.second)
        shapes = (self.first_bias.shape, self.second.shape, self.skip.shape, self.bias.shape)
        if shapes != ((hidden,), (classes, hidden), (classes, values), (classes,)):
            raise UsageError(f"the shapes of the readout matrices do not match: {[list(shape) for shape in shapes]}")
        if classes < 2 or self.heads < 1 or values % self.heads:
            raise UsageError(
                f"a readout needs at least two classes, and its values must be a multiple of its heads; got {classes} "
                f"classes, {values} values and {self.heads} heads"
            )
        for name, weights, bias in (
            ("hidden layer", self.first, self.first_bias),
            ("output layer", torch.cat([self.second, self.skip], 1), self.bias),
        ):
            if weights.dtype.is_floating_point or bias.dtype.is_floating_point:
                raise UsageError(f"the {name} of a readout must hold integers, got {weights.dtype} and {bias.dtype}")
            largest = weights.abs().long().sum(1) * POOLED_LIMIT + bias.abs().long()
            # The remaining bit is needed for the difference of two scores.
            if int(largest.max()) >= 2**23:
                raise UsageError(f"the {name} of a readout can reach {int(largest.max()):,}; sums are exact below 2^23")

    @property
    def values(self) -> int:
        """Number of values per region."""
        return self.first.shape[1]

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.bias)

    @property
    def channels(self) -> int:
        """Number of channels of the map: values, then heads."""
        return self.values + self.heads

    @property
    def score_unit(self) -> int:
        """The integer that stands for a class score of 1."""
        return HIDDEN_UNIT

    def pooled(self, sums: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch values"]:
        """Rounded weighted means `q` of the values over the kept regions; 0 if no region is kept."""
        total = sums[..., : self.values].unflatten(-1, (self.heads, -1))
        weight = sums[..., self.values :, None].clamp(min=1)
        return total.div(weight).round_().clamp_(-POOLED_LIMIT, POOLED_LIMIT).flatten(-2)

    def scores(self, sums: Float[Tensor, "*batch channels"]) -> Float[Tensor, "*batch classes"]:
        """Compute integer class scores from sums over the kept regions, in an exact float dtype.

        Must be called inside `bagcert.scores.exact_arithmetic`.
        """
        linear, linear_bias, second = self._matrices(sums.dtype)
        pooled = self.pooled(sums.flatten(0, -2))
        hidden, skipped = torch.addmm(linear_bias, pooled, linear).split([len(self.first), self.classes], 1)
        scores = torch.addmm(skipped, hidden.round_().clamp_(0, POOLED_LIMIT), second)
        return scores.unflatten(0, sums.shape[:-1])

    def _matrices(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Float weights, cached per dtype: of the hidden layer beside the skip connection, their biases, the output.

        The hidden layer is divided by `HIDDEN_UNIT`. Division by a power of two is exact, so it can precede the sum.
        """
        kept = self.__dict__.setdefault("_converted", {})
        if dtype not in kept:
            linear = torch.cat([self.first.to(dtype) / HIDDEN_UNIT, self.skip.to(dtype)]).T.contiguous()
            linear_bias = torch.cat([self.first_bias.to(dtype) / HIDDEN_UNIT, self.bias.to(dtype)])
            kept[dtype] = (linear, linear_bias, self.second.T.to(dtype).contiguous())
        return kept[dtype]


def pooling_dtype(regions: int) -> torch.dtype:
    """Float dtype in which every sum over this many regions is exact: float32 if possible, else float64.

    >>> pooling_dtype(128), pooling_dtype(129)
    (torch.float32, torch.float64)
    """
    return torch.float32 if regions * PRODUCT_LIMIT < 2**24 else torch.float64
