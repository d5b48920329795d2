"""A network, its head, a rule and the proof as one module: what is exported."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bagcert.errors import UnsoundError, UsageError
from bagcert.exporting.attention import EvidenceMap, attention_rule
from bagcert.exporting.image_range import ImageRange
from bagcert.exporting.rules import EXACT, RuleModule, rule_module
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.runtimes import inference_copy
from bagcert.rules import get_rule
from bagcert.scores import EXACT_SUMS, FIXED_POINT_LIMIT
from bagcert.threat import PatchThreatModel

OUTPUTS = ("label", "certified", "margin", "scores")
LARGEST = torch.finfo(torch.float32).max
ROUNDING = 2.0**-20  # of a score; several times what rounding z, its product with the scale and a sum can do

Decision = tuple[
    Int[Tensor, " batch"], Bool[Tensor, " batch"], Int[Tensor, " batch"], Int[Tensor, "batch classes rows cols"]
]


class CertifiedModule(nn.Module):
    """Images in [0, 1] to label, certified, margin and scores, as a deployed defense gives them.

    Proof and prediction are formed in float32 from whole numbers below 2^24. A runtime that does not count those
    exactly (one that computes in bfloat16, say) certifies nothing: beside the other sums two just below 2^24 are formed
    that differ by one, and where their difference is not one the margin is -2^24. So it is for images that are not in
    [0, 1], see `image_range`. Attention pooling forms sums over more than 128 regions in float64 below 2^53, and a
    runtime must round known quotients correctly as well.

    Args:
        scorer: the network, with its head and geometry; its weights are copied.
        rule: vote or double-masking.
        threat: the deployed patch.
        tolerance: how far `z` may move outside a patch's reach, counted for the attacker as `bagcert.rules.guard` does;
            0 where nothing moves.

    Raises:
        UsageError: a rule that cannot be exported, sums that float32 does not hold, too many windows.
    """

    large: Tensor
    ones: Tensor
    rule: RuleModule

    def __init__(self, scorer: RegionScorer, rule: str, threat: PatchThreatModel, tolerance: float = 0.0) -> None:
        super().__init__()
        get_rule(rule)
        self.binary = scorer.head == "binary"
        self.low, self.high = scorer.form.low, scorer.form.high
        self.evidence = None if scorer.readout is None else EvidenceMap(scorer.readout)
        if self.evidence is not None and tolerance > 0:
            raise UnsoundError("attention pooling needs a network whose locality is exact in the exported file")
        self.scale, self.tolerance = (1.0 if self.binary else scorer.scale), tolerance
        if tolerance * self.scale >= FIXED_POINT_LIMIT:
            raise UsageError(f"a tolerance of {tolerance:g} is more than the scores of this head hold")
        grid = scorer.grid()
        pooling = scorer.form.pooling
        if pooling is None:
            self.rule = rule_module(rule, grid, threat, len(scorer.class_names), self.high - self.low)
        else:
            self.rule = attention_rule(rule, grid, threat, pooling)
        regions, dtype = grid.map_size[0] * grid.map_size[1], self.rule.dtype
        most = EXACT if dtype == torch.float32 else EXACT_SUMS
        large = torch.full((2, regions), (most - 1) // regions, dtype=dtype)
        large[1, 0] -= 1
        self.register_buffer("large", large)
        self.register_buffer("ones", torch.ones(regions, 1, dtype=dtype))
        self.net = inference_copy(scorer)
        self.image_range = ImageRange()

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> tuple[Tensor, ...]:
        """`decide` for images in [0, 1], no certificate for others; the real-valued scores, and which images are so."""
        z, in_range = self.net(images), self.image_range(images)
        label, _, margin, scores = self.decide(z)
        margin = self.image_range.refuse(margin, in_range)
        return label, margin >= 0, margin, scores, z, in_range

    def decide(self, z: Float[Tensor, "batch classes rows cols"]) -> Decision:
        """Label, certified, margin and integer scores from real-valued scores."""
        scores = self.head(z)
        levels = scores.flatten(2) if self.evidence is not None else scores.flatten(2) - self.low
        label, margin = self.rule(levels)
        if self.tolerance > 0:
            worst_label, worst_margin = self.rule(self.worst(z, label).flatten(2) - self.low)
            margin = torch.where(worst_label == label, worst_margin, margin.clamp(max=-1.0))
        margin = torch.where(self._counts(levels), margin, float(-EXACT))
        return label.long(), margin >= 0, margin.long(), scores.int()

    def head(self, z: Tensor) -> Tensor:
        """`RegionScorer.integers`, in float32."""
        if self.evidence is not None:
            return self.evidence(z)
        if self.binary:
            return (z > 0).float()
        return torch.where(z.isnan(), float(self.low), self._scaled(z)).round()

    def worst(self, z: Tensor, label: Tensor) -> Tensor:
        """Every score as bad for the label as the tolerance allows: its own lower, all others higher."""
        if self.binary:
            room = self.tolerance * (1 + ROUNDING) + z.abs() * ROUNDING
            below, above = (z - room > 0).float(), (z + room > 0).float()
        else:
            # Beyond twice the range nothing within the tolerance can come back into it, and room stays finite.
            wide = (z * self.scale).clamp(2.0 * self.low, 2.0 * self.high)
            room = self.tolerance * self.scale * (1 + ROUNDING) + wide.abs() * ROUNDING
            below, above = ((wide + room * sign).round().clamp(self.low, self.high) for sign in (-1, 1))
        scores = self.head(z)
        slack = torch.maximum(above - scores, scores - below)  # as in `bagcert.scores.slack_of`
        slack = torch.where(z.abs() <= LARGEST, slack, float(self.high - self.low))  # NaN and infinities
        own = (self.rule.index == label[:, None])[:, :, None, None]
        return torch.where(own, scores - slack, scores + slack).clamp(self.low, self.high)

    def _scaled(self, z: Tensor) -> Tensor:
        """Clipped before it is rounded, which is the same, since the limits are whole."""
        return (z * self.scale).clamp(float(self.low), float(self.high))

    def _counts(self, levels: Float[Tensor, "batch classes regions"]) -> Bool[Tensor, " batch"]:
        """Does this runtime form sums just below the limit exactly? Of numbers that it cannot know beforehand."""
        ones = (levels[:, -1:] >= 0).to(self.large.dtype)  # levels and attention weights are never negative
        known = ones * self.large
        by_sum, by_product = known.sum(2), (known @ self.ones)[..., 0]
        counts = (by_sum[:, 0] - by_sum[:, 1] == 1) & (by_product[:, 0] - by_product[:, 1] == 1)
        return counts & self.rule.computes(ones[:, :, :1])
