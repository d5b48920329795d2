"""Clipped BagNet: local logits squeezed into a bounded range, so that no region counts for more than any other.

t = tanh(0.05 z - 1) of every class and region, s = round(1000 (1 + t) / 2) from 0 to 1000, and the rule "vote".

Source: Zhang et al., Clipped BagNet, Deep Learning and Security Workshop 2020.
Guarantee: that of the rule; "vote" is exact for the sum of the clipped scores.
Where it differs from the publication: scores are integers, so that sums are exact on any device; every rival class is
looked at in every window, since the clean runner-up is not always the one a patch can raise most; a tie goes to the
lowest class index in prediction and certificate alike.
"""

from functools import cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from bagcert.defenses.base import ScoreMapDefense
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap, require_sum, slack_of
from bagcert.threat import PatchLike

LEVELS = 1000
SLOPE, SHIFT = 0.05, 1.0


class ClippedBagNet(ScoreMapDefense):
    """A region scorer whose real scores are clipped by a tanh, deployed with a rule.

    Args:
        scorer: the network; its own head is not used. One that `bagcert.load` has measured keeps its tolerance.
        rule: the deployed rule, a name from `bagcert.rules.RULES`.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`.
        name: for tables.

    Raises:
        UsageError: there is no such rule, or the network pools regions by attention.
    """

    def __init__(
        self, scorer: RegionScorer, rule: str = "vote", *, patch: PatchLike = 5, name: str = "clipped-bagnet"
    ) -> None:
        require_sum(scorer.readout, "Clipped BagNet")
        get_rule(rule)
        self.scorer = scorer.eval()
        self.class_names, self.image_size = scorer.class_names, scorer.image_size
        self.rule, self.patch, self.name = rule, patch, name

    @property
    def locality_checked(self) -> bool:
        """Whether the network's locality was measured on its device; see `BagCert.check_locality`."""
        return self.scorer.locality_checked

    def score_map(self, images: np.ndarray | Tensor) -> ScoreMap:
        """Scores from 0 to 1000 of a batch, on the scorer's grid for images of this size.

        Raises:
            UsageError: bad images, or too small for the network.
        """
        batch = self.scorer.as_batch(images)
        grid = self.scorer.grid((batch.shape[2], batch.shape[3]))  # says what an image that is too small lacks
        z, tolerance = self.scorer.forward_batch(batch), self.scorer.tolerance
        slack = slack_of(z, tolerance, clipped, LEVELS) if tolerance > 0 else None
        return ScoreMap(clipped(z), 0, LEVELS, grid, slack)


def clipped(z: Float[Tensor, "batch classes rows cols"]) -> Int[Tensor, "batch classes rows cols"]:
    """round(1000 (1 + tanh(0.05 z - 1)) / 2) as int16, halves upward, with NaN as 0; never falling where `z` rises.

    It counts how many of the 1000 values of `z` at which the rounded score steps up (in float32) are not above `z`.
    Comparisons alone: the same on every device, whatever its tanh.

    >>> clipped(torch.tensor([[[[-1e9, 0.0, 20.0, 1e9, float("nan")]]]])).flatten().tolist()
    [0, 119, 500, 1000, 0]
    """
    steps = torch.as_tensor(_steps(), device=z.device)
    known = z.float().nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
    return torch.bucketize(known.contiguous(), steps, right=True).to(torch.int16)


@cache
def _steps() -> np.ndarray:
    """The float32 [1000] at which a score becomes 1, 2, ... 1000, ascending."""
    halves = (np.arange(1, LEVELS + 1) - 0.5) / LEVELS
    return ((np.arctanh(2 * halves - 1) + SHIFT) / SLOPE).astype(np.float32)
