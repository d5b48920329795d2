"""The exported module: network, head, rule and certification."""

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
ROUNDING = 2.0**-20  # in score units; several times the rounding error of z, its product with the scale, and a sum

Decision = tuple[
    Int[Tensor, " batch"], Bool[Tensor, " batch"], Int[Tensor, " batch"], Int[Tensor, "batch classes rows cols"]
]


class CertifiedModule(nn.Module):
    """Maps images in [0, 1] to label, certified, margin and scores, like the deployed defense.

    Label and margin are computed in float32 from integers below 2^24. A runtime that does not represent these exactly
    (for example, one that computes in bfloat16) certifies nothing: the graph also computes two sums just below 2^24
    that differ by one, and if their difference is not one, the margin is -2^24. The margin is also -2^24 for images
    that are not in [0, 1], see `image_range`. Attention pooling computes sums over more than 128 regions in float64
    below 2^53, and the runtime must also round known quotients correctly.

    Args:
        scorer: the network, with its head and geometry; its weights are copied.
        rule: vote or double-masking.
        threat: the deployed patch.
        tolerance: maximum change of `z` outside a patch's footprint, which counts for the attacker as in
            `bagcert.rules.guard`; 0 if locality is exact.

    Raises:
        UsageError: a rule that cannot be exported, sums too large for float32, or too many windows.
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
        """Runs `decide`, without certificates for images out of range; also returns `z` and the range check."""
        z, in_range = self.net(images), self.image_range(images)
        label, _, margin, scores = self.decide(z)
        margin = self.image_range.refuse(margin, in_range)
        return label, margin >= 0, margin, scores, z, in_range

    def decide(self, z: Float[Tensor, "batch classes rows cols"]) -> Decision:
        """Computes label, certified, margin and integer scores from real-valued scores."""
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
        """Returns the worst scores for the label within the tolerance: its own lower, all others higher."""
        if self.binary:
            room = self.tolerance * (1 + ROUNDING) + z.abs() * ROUNDING
            below, above = (z - room > 0).float(), (z + room > 0).float()
        else:
            # Clip at twice the range: values beyond it cannot return within the tolerance, and room stays finite.
            wide = (z * self.scale).clamp(2.0 * self.low, 2.0 * self.high)
            room = self.tolerance * self.scale * (1 + ROUNDING) + wide.abs() * ROUNDING
            below, above = ((wide + room * sign).round().clamp(self.low, self.high) for sign in (-1, 1))
        scores = self.head(z)
        slack = torch.maximum(above - scores, scores - below)  # as in `bagcert.scores.slack_of`
        slack = torch.where(z.abs() <= LARGEST, slack, float(self.high - self.low))  # NaN and infinities
        own = (self.rule.index == label[:, None])[:, :, None, None]
        return torch.where(own, scores - slack, scores + slack).clamp(self.low, self.high)

    def _scaled(self, z: Tensor) -> Tensor:
        """Scales and clips scores. Clipping before rounding is equivalent, since the limits are integers."""
        return (z * self.scale).clamp(float(self.low), float(self.high))

    def _counts(self, levels: Float[Tensor, "batch classes regions"]) -> Bool[Tensor, " batch"]:
        """Returns whether this runtime computes sums just below the limit exactly, from inputs unknown in advance."""
        ones = (levels[:, -1:] >= 0).to(self.large.dtype)  # levels and attention weights are never negative
        known = ones * self.large
        by_sum, by_product = known.sum(2), (known @ self.ones)[..., 0]
        counts = (by_sum[:, 0] - by_sum[:, 1] == 1) & (by_product[:, 0] - by_product[:, 1] == 1)
        return counts & self.rule.computes(ones[:, :, :1])
