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

from bagcert.defenses.region_defense import RegionDefense
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import Rule, get_rule
from bagcert.rules.robust_masking import exact_share, robust_masking, robust_masking_prediction
from bagcert.scores import require_sum
from bagcert.threat import PatchLike


class PatchGuard(RegionDefense):
    """Region scorer deployed with robust masking.

    Args:
        scorer: the network. Its positive scores are the evidence, so it should have a fixed-point head.
        threshold: T in [0, 1) as an exact fraction: a `Fraction`, an int, or a string such as "1/5". The strongest
            window of a class is masked if it holds more than this share of the evidence of the class; 0 masks always.
        patch, name: as for `RegionDefense`.

    Raises:
        UsageError: invalid threshold, or a network that pools regions by attention.
    """

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
        super().__init__(scorer, "robust-masking", patch, name)

    def named_rule(self, name: str) -> Rule:
        """Look up a rule by name; robust masking gets the threshold of this defense."""
        if name != self.rule:
            return get_rule(name)
        return replace(
            get_rule(name),
            certify=partial(robust_masking, threshold=self.threshold),
            predict=partial(robust_masking_prediction, threshold=self.threshold),
        )
