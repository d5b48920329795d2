"""PatchGuard++: an alert is raised if masking some window of the feature map confidently gives another class.

Source: Xiang & Mittal, PatchGuard++, 2021; rule and proof in `bagcert.rules.confident_detection`.
Guarantee: detection: every attacked version of a certified image keeps its prediction or raises the alert. The
guarantee does not say that an image without an alert has the label of the clean scene.
Differences from the publication: scores are integers; masks are the maximal windows of the threat, including the last
row and column of placements; both comparisons with tau are rounded against the defense; an alert on a clean image
counts against clean accuracy.
"""

from dataclasses import replace
from functools import partial

from jaxtyping import Bool
from torch import Tensor

from bagcert.data.photo import Images
from bagcert.defenses.base import Detector, Placements
from bagcert.defenses.region_defense import RegionDefense
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import Rule, get_rule
from bagcert.rules.confident_detection import alerts, check_confidence, confident_detection
from bagcert.scores import require_sum
from bagcert.threat import PatchLike


class PatchGuardPlusPlus(RegionDefense, Detector):
    """Region scorer deployed with detection by confident masked predictions.

    Args:
        scorer: the network. Real-valued scores are its integers divided by the scale of its fixed-point head.
        confidence: tau in [0, 1), the confidence that a masked prediction needs to raise the alert. With 0 this is the
            rule "detection". With a higher value fewer images raise the alert and fewer are certified.
        patch, name: as for `RegionDefense`.

    Raises:
        UsageError: `confidence` is out of range, or the network pools regions by attention.
    """

    def __init__(
        self, scorer: RegionScorer, confidence: float = 0.0, *, patch: PatchLike = 5, name: str = "patchguard++"
    ) -> None:
        require_sum(scorer.readout, "PatchGuard++")
        self.confidence = float(confidence)
        self.scale = scorer.scale if scorer.head == "fixed-point" else 1.0
        check_confidence(self.confidence, self.scale)
        super().__init__(scorer, "detection", patch, name)

    def alert(
        self, images: Images, patch: PatchLike | None = None, *, placements: Placements = None
    ) -> Bool[Tensor, " batch"]:
        """Which images raise the alert: some confident masked prediction differs from `predict`."""
        score_map = self.score_map(images)
        threat = self.threat(score_map, patch, placements)
        return alerts(score_map, threat, confidence=self.confidence, scale=self.scale)

    def named_rule(self, name: str) -> Rule:
        """Look up a rule by name; detection gets the confidence threshold of this defense."""
        if name != self.rule:
            return get_rule(name)
        return replace(
            get_rule(name), certify=partial(confident_detection, confidence=self.confidence, scale=self.scale)
        )
