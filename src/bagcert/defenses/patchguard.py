"""PatchGuard: a region scorer whose classes are each counted without the window that holds most of their evidence.

Source: Xiang et al., PatchGuard, USENIX Security 2021; the rule and its proof in `bagcert.rules.robust_masking`.
Guarantee: recovery, a lower bound: no patch of the threat changes the prediction of a certified image.
Where it differs from the publication: evidence is integers, bounded, so that huge evidence under a patch cannot swallow
the rest of a float sum; windows are the maximal ones of the threat on any grid; the bound for T > 0 divides by 1 - T.
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
    """A region scorer deployed with robust masking.

    Args:
        scorer: the network; its positive scores are the evidence, so its head should be a fixed-point one.
        threshold: T as an exact fraction: a `Fraction`, an int, or a text such as "1/5". A class's strongest window is
            left out if it holds more than this share of the class's evidence; 0: always.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`; masks are built for it.
        name: for tables.

    Raises:
        UsageError: the threshold is not such a fraction, at least 0 and below 1; or the network pools regions by
            attention.
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
        """The scorer's own map. Raises UsageError for bad images."""
        return self.scorer.score_map(images)

    def named_rule(self, name: str) -> Rule:
        """Rules as in `bagcert.rules`, robust masking with this defense's threshold."""
        if name != self.rule:
            return get_rule(name)
        return replace(
            get_rule(name),
            certify=partial(robust_masking, threshold=self.threshold),
            predict=partial(robust_masking_prediction, threshold=self.threshold),
        )
