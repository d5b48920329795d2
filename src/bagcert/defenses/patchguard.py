"""PatchGuard: a region scorer with robust masking, which masks the window with the most evidence of each class.

Source: Xiang et al., PatchGuard, USENIX Security 2021; rule and proof in `bagcert.rules.robust_masking`.
Guarantee: recovery: no patch of the threat changes the prediction of a certified image. The margin is a lower bound.
Differences from the publication: the evidence is a bounded integer, so large evidence under a patch cannot absorb the
rest of a floating-point sum; the windows are the maximal ones of the threat on any grid; the bound for T > 0 divides by
1 - T.
"""

from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np
from torch import Tensor

from bagcert.defenses.base import ScoreMapDefense
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import Rule, get_rule
from bagcert.rules.robust_masking import exact_share, robust_masking, robust_masking_prediction
from bagcert.scores import ScoreMap, require_sum
from bagcert.threat import PatchLike


class PatchGuard(ScoreMapDefense):
    """Region scorer deployed with robust masking.

    Args:
        scorer: the network. Its positive scores are the evidence, so it should have a fixed-point head.
        threshold: T in [0, 1) as an exact fraction: a `Fraction`, an int, or a string such as "1/5". The strongest
            window of a class is masked if it holds more than this share of the evidence of the class; 0 masks always.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`; the masks are built for it.
        name: name of the defense in tables.

    Raises:
        UsageError: invalid threshold, or a network that pools regions by attention.
    """

    rule = "robust-masking"

    def __init__(
        self,
        scorer: RegionScorer,
        threshold: Fraction | int | str = Fraction(0),
        *,
        patch: PatchLike = 5,
        name: str = "patchguard",
    ) -> None:
        require_sum(scorer.readout, "PatchGuard")
        self.threshold = exact_share(threshold)
        self.scorer = scorer.eval()
        self.class_names, self.image_size = scorer.class_names, scorer.image_size
        self.patch, self.name = patch, name

    @property
    def locality_checked(self) -> bool:
        """Whether the network's locality was measured on its device; see `BagCert.check_locality`."""
        return self.scorer.locality_checked

    def score_map(self, images: np.ndarray | Tensor) -> ScoreMap:
        """Compute the score map of the scorer.

        Raises:
            UsageError: invalid images.
        """
        return self.scorer.score_map(images)

    def named_rule(self, name: str) -> Rule:
        """Look up a rule by name; robust masking gets the threshold of this defense."""
        if name != self.rule:
            return get_rule(name)
        return replace(
            get_rule(name),
            certify=partial(robust_masking, threshold=self.threshold),
            predict=partial(robust_masking_prediction, threshold=self.threshold),
        )
