"""Heads: conversion of real-valued scores to bounded integers, and aggregation of regions.

For training and attacks, every head also has a differentiable form: the same integers with a surrogate gradient
(straight-through estimator; Bengio et al., 2013). The head of a region scorer is `RegionScorer.form`.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bagcert.aggregation import HIDDEN_UNIT, PRODUCT_LIMIT, AttentionPooling, pooling_dtype
from bagcert.errors import UnsoundError
from bagcert.grid import RegionGrid
from bagcert.nets.attention_pooling import UNITS, AttentionReadout
from bagcert.scores import FIXED_POINT_LIMIT, ScoreMap, binarize, exact_arithmetic, quantize, slack_of

HeadName = Literal["binary", "fixed-point", "attention-pooling"]
HEADS: tuple[HeadName, ...] = ("binary", "fixed-point", "attention-pooling")


class Head(ABC):
    """Base class of heads, which convert network outputs to score maps."""

    name: ClassVar[HeadName]
    low: ClassVar[int]
    high: ClassVar[int]

    @property
    def pooling(self) -> AttentionPooling | None:
        """Integer readout of the kept regions; None if class scores are sums over regions."""
        return None

    @abstractmethod
    def integers(self, z: Float[Tensor, "batch channels rows cols"]) -> Int[Tensor, "batch channels rows cols"]:
        """Compute the integers used by rules; each depends only on the scores of its own region. NaN is permitted."""

    @abstractmethod
    def soft(self, z: Float[Tensor, "batch channels rows cols"], softness: float = 1.0) -> Tensor:
        """Compute a real-valued version of the map in integer units, with gradients even where integers are clipped.

        Args:
            softness: width of the soft step in units of `z`, for binary heads.
        """

    def straight_through(self, z: Float[Tensor, "batch channels rows cols"], softness: float = 1.0) -> Tensor:
        """Compute `integers` as floats with the gradient of `soft`."""
        soft = self.soft(z, softness)
        return self.integers(z).to(soft.dtype) + (soft - soft.detach())  # in this order the value is exact

    def class_scores(self, sums: Float[Tensor, "*batch channels"], regions: int) -> Float[Tensor, "*batch classes"]:
        """Compute class scores from sums over the kept of all `regions`, with gradients; exact if the sums are."""
        return sums

    def score_map(
        self, scores: Int[Tensor, "batch channels rows cols"], grid: RegionGrid, slack: Tensor | None = None
    ) -> ScoreMap:
        """Create a score map from integers of this head."""
        return ScoreMap(scores, self.low, self.high, grid, slack, self.pooling)

    def slack(self, z: Float[Tensor, "batch channels rows cols"], tolerance: float) -> Tensor | None:
        """Bound on the change of each integer if `z` changes by at most `tolerance`; None if `tolerance` is 0."""
        return slack_of(z, tolerance, self.integers, self.high - self.low) if tolerance > 0 else None


class BinaryHead(Head):
    """Binary head `[z > 0]`, with the gradient of the sigmoid."""

    name, low, high = "binary", 0, 1

    def integers(self, z: Tensor) -> Tensor:
        """Compute `[z > 0]` as int16."""
        return binarize(z)

    def soft(self, z: Tensor, softness: float = 1.0) -> Tensor:
        """Compute a sigmoid of `z / softness`."""
        return torch.sigmoid(z / softness)


@dataclass(frozen=True)
class FixedPointHead(Head):
    """Fixed-point head `clip(round(z * scale), -2047, 2047)`, with the gradient of `z * scale`."""

    scale: float = 1.0

    name, low, high = "fixed-point", -FIXED_POINT_LIMIT, FIXED_POINT_LIMIT

    def integers(self, z: Tensor) -> Tensor:
        """Compute the fixed-point scores as int16."""
        return quantize(z, self.scale)

    def soft(self, z: Tensor, softness: float = 1.0) -> Tensor:
        """Compute `z * scale`, with 0 for values that are not finite."""
        scaled = z * self.scale
        return torch.where(scaled.isfinite(), scaled, 0.0)


@dataclass(frozen=True, eq=False)
class AttentionHead(Head):
    """Attention-pooling head: values and attention weights of every region; see `bagcert.aggregation`.

    Attributes:
        frozen: the integer readout if available; otherwise it is created from `readout`.
    """

    readout: AttentionReadout
    frozen: AttentionPooling | None = None

    name, low, high = "attention-pooling", -PRODUCT_LIMIT, PRODUCT_LIMIT

    @cached_property
    def pooling(self) -> AttentionPooling:  # type: ignore[override]
        """Integer readout, on the device of the weights."""
        if self.frozen is not None and self.frozen.bias.device == self.readout.position.device:
            return self.frozen
        return self.readout.frozen()

    def integers(self, z: Tensor) -> Tensor:
        """Compute products and attention weights as int32."""
        return self.readout.integers(z)

    def soft(self, z: Tensor, softness: float = 1.0) -> Tensor:
        """Compute products and weights without rounding; clipped values keep their gradient."""
        return self.readout.slopes(z)

    def class_scores(self, sums: Tensor, regions: int) -> Tensor:
        """Compute integer scores of the readout, with the gradient of the readout without rounding and saturation."""
        with exact_arithmetic(sums.device):
            exact = self.pooling.scores(sums.detach().to(pooling_dtype(regions))).to(sums.dtype)
        soft = self.readout.soft(sums) * (UNITS * HIDDEN_UNIT)
        return exact + (soft - soft.detach())

    def slack(self, z: Tensor, tolerance: float) -> None:
        """Return None, or raise an error if `tolerance` is positive: no worst case is known for this aggregation."""
        if tolerance > 0:
            raise UnsoundError("attention pooling needs a network whose locality is exact on this device and dtype")


def make_head(
    name: HeadName, scale: float = 1.0, readout: AttentionReadout | None = None, frozen: AttentionPooling | None = None
) -> Head:
    """Create a head by name."""
    if name == "binary":
        return BinaryHead()
    if name == "fixed-point":
        return FixedPointHead(scale)
    assert readout is not None
    return AttentionHead(readout, frozen)


def check_readout(values: int | None, attention_heads: int | None, hidden: int | None, ablated: bool) -> None:
    """Raise a ValueError, for the validators of recipes and configs, if a network cannot have a readout of these sizes.

    `ablated` networks take ablated images, as derandomized smoothing makes them.
    """
    if not values or not attention_heads or not hidden or values % attention_heads:
        raise ValueError(
            "attention pooling needs values (a multiple of attention_heads), attention_heads and hidden, "
            f"got {values}, {attention_heads} and {hidden}"
        )
    if ablated:
        raise ValueError("attention pooling cannot be used with ablated images; choose another head")


def scale_of(z: Iterable[Tensor]) -> float:
    """Fixed-point scale that maps the largest absolute score to the largest integer."""
    return FIXED_POINT_LIMIT / max(1e-6, *(part.abs().max().item() for part in z))
