"""PatchGuard++: an alert when the feature map without some window confidently says another class.

Source: Xiang & Mittal, PatchGuard++, 2021; the rule and its proof in `bagcert.rules.confident_detection`.
Guarantee: detection: every attacked version of a certified image keeps its prediction or raises the alert. It does not
say that an image without an alert has the label of the clean scene.
Where it differs from the publication: scores are integers; masks are the maximal windows of the threat, whose last row
and column of placements are among them; both comparisons with tau are rounded against the defense; an alert on a clean
image counts against clean accuracy.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from torch import Tensor

from bagcert.defenses.base import Detector, ScoreMapDefense
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import Rule, get_rule
from bagcert.rules.confident_detection import alerts, check_confidence, confident_detection
from bagcert.scores import ScoreMap, require_sum
from bagcert.threat import PatchLike


class PatchGuardPlusPlus(ScoreMapDefense, Detector):
    """A region scorer deployed with detection by confident masks.

    Args:
        scorer: the network. Real scores are its integers over the scale of its fixed-point head.
        confidence: tau, at least 0 and below 1: how sure a mask must be to raise the alert. At 0 this is the rule
            "detection". Higher, fewer images raise the alert and fewer are certified.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`; masks are built for it.
        name: for tables.

    Raises:
        UsageError: tau out of range, or a network that pools regions by attention.
    """

    rule = "detection"

    def __init__(
        self, scorer: RegionScorer, confidence: float = 0.0, *, patch: PatchLike = 5, name: str = "patchguard++"
    ) -> None:
        require_sum(scorer.readout, "PatchGuard++")
        self.confidence = float(confidence)
        self.scale = scorer.scale if scorer.head == "fixed-point" else 1.0
        check_confidence(self.confidence, self.scale)
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

    def alert(
        self,
        images: np.ndarray | Tensor,
        patch: PatchLike | None = None,
        *,
        placements: np.ndarray | str | Path | None = None,
    ) -> Bool[Tensor, " batch"]:
        """Which images raise the alert: some confident mask says another class than `predict`.

        Raises:
            UsageError: bad images or patch.
        """
        score_map = self.score_map(images)
        return alerts(
            score_map, self.threat(score_map, patch, placements), confidence=self.confidence, scale=self.scale
        )

    def named_rule(self, name: str) -> Rule:
        """Rules as in `bagcert.rules`, detection with this defense's tau."""
        if name != self.rule:
            return get_rule(name)
        return replace(
            get_rule(name), certify=partial(confident_detection, confidence=self.confidence, scale=self.scale)
        )
