"""Certificates: what a rule says of each image. They never see the true label."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Int
from torch import Tensor

from bagcert.threat import PatchThreatModel


@dataclass(frozen=True, eq=False)
class Certificate:
    """Prediction and proof for a batch of images, under one rule and one threat model.

    Attributes:
        prediction: int64 [batch], what the deployed rule answers on each image.
        certified: boolean [batch]: no attack within the threat changes that answer (for the detection rule:
            changes it without an alert).
        margin: int64 [batch], in units of the score map; certified exactly where it is >= 0. How many units
            the answer holds by in the worst case, or how many are missing.
        worst_placement: int64 [batch, 4] or [batch, windows, 4], each `[top, left, height, width]` in pixels:
            where a patch comes closest to changing the answer (two windows for double masking).
        rule, threat: what was asked.
        locality: "exact", or "measured" where it rests on a measured tolerance: scores that may move outside a patch's
            reach counted for the attacker. A measurement is no bound, hence the mark. See docs/method.md, "Locality is checked".
    """

    prediction: Int[Tensor, " batch"]
    certified: Bool[Tensor, " batch"]
    margin: Int[Tensor, " batch"]
    worst_placement: Int[Tensor, "batch *windows 4"]
    rule: str
    threat: PatchThreatModel
    locality: Literal["exact", "measured"] = "exact"

    def __len__(self) -> int:
        """How many images."""
        return len(self.prediction)
