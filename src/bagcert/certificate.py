"""Per-image result of certification: prediction, verdict, margin and worst placement. No true labels are involved."""

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
        worst_placement: int64 [batch, windows, 4], each `[top, left, height, width]` in pixels: where patches come
            closest to changing the answer. One window per patch of the threat; two for double masking.
        rule, threat: what was asked.
        locality: "exact" where scores outside a patch's reach do not move. "measured" where they may move a little, and
            what may move counted for the attacker; a measurement is not a bound, hence the mark. "unchecked" where the
            network's locality was not measured on this device, as in `BagCert(scorer)` without `check_locality`. See
            docs/method.md, "Locality is checked".
    """

    prediction: Int[Tensor, " batch"]
    certified: Bool[Tensor, " batch"]
    margin: Int[Tensor, " batch"]
    worst_placement: Int[Tensor, "batch windows 4"]
    rule: str
    threat: PatchThreatModel
    locality: Literal["exact", "measured", "unchecked"] = "exact"

    def __len__(self) -> int:
        """Number of images."""
        return len(self.prediction)
