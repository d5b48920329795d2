"""Detection by one mask that has to be sure: an alert where a masked prediction differs and is confident.

Confidence is a softmax of real numbers, and it is compared with a threshold twice: on the clean image, where every mask
must reach it, and on the attacked one, where the mask over the patch must still reach it. That mask sees the same
integer sums both times. They are turned into float64 on the CPU, which is off by far less than `ROUNDING`, and each
comparison gives that much away: a certificate needs tau + ROUNDING, an alert is raised from tau - ROUNDING on. So no
device, batch or library can make the two disagree.

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
    """Certifies that an attack changes the plain prediction only with an alert of `alerts`.

    An image is certified if every masked prediction is the plain one, with a confidence of at least tau: the softmax,
    at that class, of the mean real scores (integers over `scale`) of the regions that the mask leaves. The margin is
    that of `detection`, at most -1 where a mask is not confident.

    Guarantee: sound for detection. The mask over the patch says the clean label with the same confidence as before, so
    another prediction raises the alert. tau = 0 is `detection`; then, and only then, no alert means certified.
    K patches: the masks are all unions of K windows.

    Args:
        score_map: the scores of a batch.
        threat: whose windows are the masks.
        confidence: tau, at least 0 and below 1.
        scale: integers per unit of the real scores.

    Raises:
        UsageError: tau or scale out of range; several patches lead to more mask unions than can be enumerated.
    """
    require_sum(score_map, "confident-detection")
    check_confidence(confidence, scale)
    return guarded(partial(_certify, confidence=confidence, scale=scale))(score_map, threat)


def alerts(
    score_map: ScoreMap, threat: PatchThreatModel, *, confidence: float = 0.0, scale: float = 1.0
) -> Bool[Tensor, " batch"]:
    """Does some mask say another class than the plain prediction, with a confidence of at least tau?

    A mask that leaves no region raises the alert always.

    Raises:
        UsageError: as `confident_detection`.
    """
    require_sum(score_map, "confident-detection")
    check_confidence(confidence, scale)
    prediction = score_map.predict()
    raised = torch.empty(len(score_map), dtype=torch.bool, device=prediction.device)
    for images, left, regions in _masked_sums(score_map, threat):
        label = left.max(1).indices  # the lowest among equals
        sure = _softmax(left, regions, scale).amax(1) >= confidence - ROUNDING
        raised[images] = ((label != prediction[images][:, None].cpu()) & sure | (regions == 0)).any(1).to(raised.device)
    return raised


def check_confidence(confidence: float, scale: float) -> None:
    """Refuses a tau outside [0, 1) and a scale that is not positive and finite.

    Raises:
        UsageError: either.
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
    """Some images, their sums outside every mask, exact, and how many regions each mask leaves; float64 on the CPU."""
    device = score_map.scores.device
    masks = MaskSet.of(score_map, threat)
    regions = (masks.regions - masks.sizes[masks.keep]).cpu().double()
    for images in chunks(len(score_map), score_map.classes * masks.elements):
        with exact_arithmetic(device):
            levels = score_map.levels(images)
            left = (levels.sum((2, 3))[..., None] - masks.sums(levels))[..., masks.keep].cpu().double()
        yield images, left + score_map.low * regions, regions
