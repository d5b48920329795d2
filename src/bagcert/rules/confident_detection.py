"""Detection with a confidence threshold: alert if a masked prediction differs from the plain one and is confident.

The confidence is a softmax of real numbers. It is compared with the threshold tau twice: on the clean image, where
every mask must reach it, and on the attacked image, where the mask over the patch must still reach it. The integer sums
under that mask are the same both times. The softmax is computed from them in float64 on the CPU, with an error far
below `ROUNDING`, and both comparisons leave that much room: a certificate requires tau + ROUNDING, and an alert is
raised from tau - ROUNDING on. The two comparisons therefore agree on every device, batch and library version.

Source: Xiang & Mittal, PatchGuard++, 2021; docs/method.md, "Detection", is tau = 0.
"""

from collections.abc import Iterator
from functools import partial

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.errors import UsageError
from bagcert.rules.detection import detection
from bagcert.rules.guard import guarded, require_sum
from bagcert.rules.mask_sets import MaskSet
from bagcert.rules.masks import chunks
from bagcert.scores import ScoreMap, exact_arithmetic
from bagcert.threat import PatchThreatModel

ROUNDING = 2.0**-30


def confident_detection(
    score_map: ScoreMap, threat: PatchThreatModel, *, confidence: float = 0.0, scale: float = 1.0
) -> Certificate:
    """Certify that no attack changes the plain prediction without raising an alert (see `alerts`).

    An image is certified if every masked prediction equals the plain prediction with a confidence of at least tau. The
    confidence is the softmax, at that class, of the mean real scores (integers divided by `scale`) of the regions
    outside the mask. The margin is that of `detection`, but at most -1 if a mask is not confident.

    Guarantee: sound for detection. The mask over the patch gives the clean label with the same confidence as before, so
    any other prediction raises the alert. With tau = 0 the rule equals `detection`; only then does the absence of an
    alert imply a certificate. For K patches the masks are all unions of K windows.

    Args:
        score_map: scores of a batch.
        threat: threat model whose windows are the masks.
        confidence: threshold tau in [0, 1).
        scale: integer units per unit of the real scores.

    Raises:
        UsageError: `confidence` or `scale` is out of range, or several patches have too many mask unions.
    """
    require_sum(score_map, "confident-detection")
    check_confidence(confidence, scale)
    return guarded(partial(_certify, confidence=confidence, scale=scale))(score_map, threat)


def alerts(
    score_map: ScoreMap, threat: PatchThreatModel, *, confidence: float = 0.0, scale: float = 1.0
) -> Bool[Tensor, " batch"]:
    """Which images raise an alert: some masked prediction differs from the plain one with a confidence of at least tau.

    A mask that covers all regions always raises the alert.

    Raises:
        UsageError: as for `confident_detection`.
    """
    require_sum(score_map, "confident-detection")
    check_confidence(confidence, scale)
    prediction = score_map.predict()
    raised = torch.empty(len(score_map), dtype=torch.bool, device=prediction.device)
    for images, left, regions in _masked_sums(score_map, threat):
        label = left.max(1).indices  # ties go to the lowest index
        sure = _softmax(left, regions, scale).amax(1) >= confidence - ROUNDING
        raised[images] = ((label != prediction[images][:, None].cpu()) & sure | (regions == 0)).any(1).to(raised.device)
    return raised


def check_confidence(confidence: float, scale: float) -> None:
    """Check that `confidence` lies in [0, 1) and that `scale` is positive and finite.

    Raises:
        UsageError: a value is out of range.
    """
    if not 0 <= confidence < 1:
        raise UsageError(f"a confidence threshold must be at least 0 and below 1, got {confidence}")
    if not 0 < scale < float("inf"):
        raise UsageError(f"the scale of the scores must be positive and finite, got {scale}")


def _certify(score_map: ScoreMap, threat: PatchThreatModel, confidence: float, scale: float) -> Certificate:
    found = detection(score_map, threat)
    if confidence == 0:
        return found
    sure = torch.empty_like(found.certified)
    for images, left, regions in _masked_sums(score_map, threat):
        label = found.prediction[images].cpu()
        own = _softmax(left, regions, scale)[torch.arange(len(label)), label]
        sure[images] = (own >= confidence + ROUNDING).all(1).to(sure.device)
    margin = torch.where(sure, found.margin, found.margin.clamp(max=-1))
    name = f"detection:{confidence:g}"
    return Certificate(found.prediction, margin >= 0, margin, found.worst_placement, name, threat)


def _softmax(
    left: Float[Tensor, "batch classes masks"], regions: Float[Tensor, " masks"], scale: float
) -> Float[Tensor, "batch classes masks"]:
    return (left / (scale * regions.clamp(min=1))).softmax(1)


def _masked_sums(
    score_map: ScoreMap, threat: PatchThreatModel
) -> Iterator[tuple[slice, Float[Tensor, "batch classes masks"], Float[Tensor, " masks"]]]:
    """Yield slices of images, their exact class sums outside every mask, and the number of regions outside every mask.

    The tensors are float64 on the CPU.
    """
    device = score_map.scores.device
    masks = MaskSet.of(score_map, threat)
    regions = (masks.regions - masks.sizes[masks.keep]).cpu().double()
    for images in chunks(len(score_map), score_map.classes * masks.elements):
        with exact_arithmetic(device):
            levels = score_map.levels(images)
            left = (levels.sum((2, 3))[..., None] - masks.sums(levels))[..., masks.keep].cpu().double()
        yield images, left + score_map.low * regions, regions
