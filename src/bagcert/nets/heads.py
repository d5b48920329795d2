"""Heads: how real scores become the integers that rules see, in which range, and how regions are aggregated.

A head has a second, differentiable form for training and attacks: the same integers with a slope (straight-through
estimator; Bengio et al., 2013). All code that needs the range, the integers, the slope or the aggregation of a model
asks its head, `RegionScorer.form`.
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
    """What stands between a network and a rule.

    Attributes:
        name: as in recipes and configs.
        low, high: the range of the integers.
    """

    name: ClassVar[HeadName]
    low: ClassVar[int]
    high: ClassVar[int]

    @property
    def pooling(self) -> AttentionPooling | None:
        """The integer readout of the kept regions; None where class scores are sums over regions."""
        return None

    @abstractmethod
    def integers(self, z: Float[Tensor, "batch channels rows cols"]) -> Int[Tensor, "batch channels rows cols"]:
        """The integers that rules see, each a function of the score at its own place. NaN has a value as well."""

    @abstractmethod
    def soft(self, z: Float[Tensor, "batch channels rows cols"], softness: float = 1.0) -> Tensor:
        """The same map as real numbers, in units of the integers, with a slope also where the integers are clipped.

        Args:
            softness: width of a step, in units of `z`, for heads with a single step.
        """

    def straight_through(self, z: Float[Tensor, "batch channels rows cols"], softness: float = 1.0) -> Tensor:
        """`integers` as floats, with the slope of `soft`."""
        soft = self.soft(z, softness)
        return self.integers(z).to(soft.dtype) + (soft - soft.detach())  # in this order the value is exact

    def class_scores(self, sums: Float[Tensor, "*batch channels"], regions: int) -> Float[Tensor, "*batch classes"]:
        """Class scores from sums over kept regions, with a slope; exact where the sums are.

        Args:
            regions: of the whole map.
        """
        return sums

    def score_map(
        self, scores: Int[Tensor, "batch channels rows cols"], grid: RegionGrid, slack: Tensor | None = None
    ) -> ScoreMap:
        """Integers of this head with their range, geometry and aggregation."""
        return ScoreMap(scores, self.low, self.high, grid, slack, self.pooling)

    def slack(self, z: Float[Tensor, "batch channels rows cols"], tolerance: float) -> Tensor | None:
        """How far each integer may be off where `z` may be off by `tolerance`; None where it may not be at all."""
        return slack_of(z, tolerance, self.integers, self.high - self.low) if tolerance > 0 else None


class BinaryHead(Head):
    """`[z > 0]`; backward, the slope of the sigmoid."""

    name, low, high = "binary", 0, 1

    def integers(self, z: Tensor) -> Tensor:
        """int16."""
        return binarize(z)

    def soft(self, z: Tensor, softness: float = 1.0) -> Tensor:
        """A sigmoid."""
        return torch.sigmoid(z / softness)


@dataclass(frozen=True)
class FixedPointHead(Head):
    """`clip(round(z * scale), -2047, 2047)`; backward, the identity."""

    scale: float = 1.0

    name, low, high = "fixed-point", -FIXED_POINT_LIMIT, FIXED_POINT_LIMIT

    def integers(self, z: Tensor) -> Tensor:
        """int16."""
        return quantize(z, self.scale)

    def soft(self, z: Tensor, softness: float = 1.0) -> Tensor:
        """Scaled; 0 where that is not finite."""
        scaled = z * self.scale
        return torch.where(scaled.isfinite(), scaled, 0.0)


@dataclass(frozen=True, eq=False)
class AttentionHead(Head):
    """Values and attention weights of every region, for the readout of `bagcert.aggregation`.

    Attributes:
        readout: its trainable form.
        frozen: its integer form if that is known; made from `readout` otherwise.
    """

    readout: AttentionReadout
    frozen: AttentionPooling | None = None

    name, low, high = "attention-pooling", -PRODUCT_LIMIT, PRODUCT_LIMIT

    @cached_property
    def pooling(self) -> AttentionPooling:  # type: ignore[override]
        """The integer readout, on the device of the weights.

        Raises:
            UsageError: a weight is so large that integer sums would not be exact.
        """
        if self.frozen is not None and self.frozen.bias.device == self.readout.position.device:
            return self.frozen
        return self.readout.frozen()

    def integers(self, z: Tensor) -> Tensor:
        """int32."""
        return self.readout.integers(z)

    def soft(self, z: Tensor, softness: float = 1.0) -> Tensor:
        """Products and weights, neither rounded nor clipped."""
        return self.readout.slopes(z)

    def class_scores(self, sums: Tensor, regions: int) -> Tensor:
        """Integer scores of the readout; backward, the slope of the readout without rounding and saturation."""
        with exact_arithmetic(sums.device):
            exact = self.pooling.scores(sums.detach().to(pooling_dtype(regions))).to(sums.dtype)
        soft = self.readout.soft(sums) * (UNITS * HIDDEN_UNIT)
        return exact + (soft - soft.detach())

    def slack(self, z: Tensor, tolerance: float) -> None:
        """None.

        Raises:
            UnsoundError: there is a tolerance, and with it no worst case that this aggregation could name.
        """
        if tolerance > 0:
            raise UnsoundError("attention pooling needs a network whose locality is exact on this device and dtype")


def make_head(
    name: HeadName, scale: float = 1.0, readout: AttentionReadout | None = None, frozen: AttentionPooling | None = None
) -> Head:
    """The head of that name."""
    if name == "binary":
        return BinaryHead()
    if name == "fixed-point":
        return FixedPointHead(scale)
    assert readout is not None
    return AttentionHead(readout, frozen)


def check_readout(values: int | None, attention_heads: int | None, hidden: int | None, ablated: bool) -> None:
    """Says whether a readout of these sizes can stand behind a network.

    Args:
        ablated: the network takes ablated images, as derandomized smoothing makes them.

    Raises:
        ValueError: it cannot; for the validators of recipes and configs.
    """
    if not values or not attention_heads or not hidden or values % attention_heads:
        raise ValueError(
            "attention pooling needs values (a multiple of attention_heads), attention_heads and hidden, "
            f"got {values}, {attention_heads} and {hidden}"
        )
    if ablated:
        raise ValueError("attention pooling is for whole images; a network of ablated images has another head")


def scale_of(z: Iterable[Tensor]) -> float:
    """The fixed-point scale that makes the largest of some scores the largest integer."""
    return FIXED_POINT_LIMIT / max(1e-6, *(part.abs().max().item() for part in z))
