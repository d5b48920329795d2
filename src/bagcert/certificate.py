"""Per-image result of certification: prediction, verdict, margin and worst placement. No true labels are involved."""

from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Int
from torch import Tensor

from bagcert.threat import PatchThreatModel


@dataclass(frozen=True, eq=False)
class Certificate:
    """Predictions and certificates for a batch of images, for one rule and one threat model.

    Attributes:
        prediction: int64 [batch], prediction of the deployed rule for each image.
        certified: boolean [batch], True if no attack within the threat changes the prediction. For detection: if no
            attack changes it without raising an alert.
        margin: int64 [batch], worst-case lead of the prediction in units of the score map. An image is certified if
            and only if its margin is >= 0.
        worst_placement: int64 [batch, windows, 4], each `[top, left, height, width]` in pixels: the placements at which
            patches come closest to changing the prediction. One window per patch of the threat, or two for double
            masking.
        locality: "exact" if scores outside a patch's reach do not change. "measured" if they can change slightly and
            the certificate accounts for the measured change; a measurement is not a proven bound. "unchecked" if the
            locality of the network was not measured on this device, as for `BagCert(scorer)` without
            `check_locality`. See docs/method.md, "Locality is checked".
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
