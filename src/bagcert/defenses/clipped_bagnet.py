"""Clipped BagNet: local logits are clipped to a bounded range, which limits the influence of every region.

For every class and region t = tanh(0.05 z - 1) and s = round(1000 (1 + t) / 2), from 0 to 1000. The rule is "vote".

Source: Zhang et al., Clipped BagNet, Deep Learning and Security Workshop 2020.
Guarantee: that of the rule; "vote" is exact for the sum of the clipped scores.
Differences from the publication: scores are integers, so sums are exact on any device; every other class is considered
in every window, since the clean runner-up is not always the class that a patch can raise most; ties go to the lowest
class index in both prediction and certificate.
"""

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bagcert.data.photo import Images
from bagcert.defenses.region_defense import RegionDefense
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap, require_sum, slack_of
from bagcert.threat import PatchLike

LEVELS = 1000
SLOPE, SHIFT = 0.05, 1.0


class ClippedBagNet(RegionDefense):
    """Region scorer whose real-valued scores are clipped by a tanh, deployed with a rule.

    Args:
        scorer: the network; its head is not used. The tolerance measured by `bagcert.load` is kept.
        rule, patch, name: as for `RegionDefense`.

    Raises:
        UsageError: unknown rule, or a network that pools regions by attention.
    """

    def __init__(
        self, scorer: RegionScorer, rule: str = "vote", *, patch: PatchLike = 5, name: str = "clipped-bagnet"
    ) -> None:
        require_sum(scorer.readout, "Clipped BagNet")
        get_rule(rule)
        super().__init__(scorer, rule, patch, name)

    def score_map(self, images: Images) -> ScoreMap:
        """Compute the score map of a batch, with scores from 0 to 1000."""
        batch = self.scorer.as_batch(images)
        grid = self.scorer.grid((batch.shape[2], batch.shape[3]))  # gives a clear error if the image is too small
        z, tolerance = self.scorer.forward_batch(batch), self.scorer.tolerance
        slack = slack_of(z, tolerance, clipped, LEVELS) if tolerance > 0 else None
        return ScoreMap(clipped(z), 0, LEVELS, grid, slack)


def clipped(z: Float[Tensor, "batch classes rows cols"]) -> Int[Tensor, "batch classes rows cols"]:
    """Compute round(1000 (1 + tanh(0.05 z - 1)) / 2) as int16, rounding halves up; NaN becomes 0. Monotone in `z`.

    The score is the number of thresholds (float32 values of `z` at which the rounded score increases) that are at most
    `z`. This needs only comparisons, so the result is the same on every device.

    >>> clipped(torch.tensor([[[[-1e9, 0.0, 20.0, 1e9, float("nan")]]]])).flatten().tolist()
    [0, 119, 500, 1000, 0]
    """
    steps = torch.as_tensor(_steps(), device=z.device)
    known = z.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.bucketize(known.contiguous(), steps, right=True).to(torch.int16)


@cache
def _steps() -> np.ndarray:
    """Thresholds at which the score becomes 1, 2, ... 1000, float32 [1000], ascending."""
    halves = (np.arange(1, LEVELS + 1) - 0.5) / LEVELS
    return ((np.arctanh(2 * halves - 1) + SHIFT) / SLOPE).astype(np.float32)
