"""Detection with single masks: an alert is raised if some masked prediction differs from the plain prediction."""

import torch

from bagcert.certificate import Certificate
from bagcert.rules.attention_masking import attention_detection
from bagcert.rules.guard import guarded
from bagcert.rules.mask_sets import MaskSet
from bagcert.rules.masks import chunks
from bagcert.scores import ScoreMap, exact_arithmetic, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel


@guarded
def detection(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """Certify that no attack changes the plain prediction without raising an alert.

    margin = min over c != y and masks m of T_c - sum over m of (s_y - s_c) - 1[c < y], where y is the plain
    prediction; at most -1 if some mask covers all regions. An image is certified if and only if it raises no alert.
    For K patches the masks are all unions of K windows.

    Guarantee: sound for detection, with an exact margin: every attacked version of a certified image keeps the
    prediction y or raises the alert. The guarantee does not say that an image without an alert has the label of the
    clean scene. `worst_placement` is [batch, K, 4] for K patches: the first mask that attains the margin for the
    lowest such class.

    Source: McCoyd et al., Minority Reports, 2020; Xiang & Mittal, PatchGuard++, 2021; docs/method.md, "Detection".

    Raises:
        UsageError: several patches have too many mask unions.
    """
    if score_map.readout is not None:
        return attention_detection(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    masks = MaskSet.of(score_map, threat)
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction, worst = torch.empty_like(margin), torch.empty_like(margin)
    with exact_arithmetic(device):
        for images in chunks(batch, score_map.classes * masks.elements):
            levels = score_map.levels(images)
            total = levels.sum((2, 3))
            sums = masks.sums(levels)
            label = lowest_argmax(total)
            every = torch.arange(len(label), device=device)
            removed = sums[every, label][:, None] - sums
            most, mask = masks.without_gaps(removed, -torch.inf).max(2)
            left = total[every, label][:, None] - total - tie_penalty(label, score_map.classes) - most
            left[every, label] = torch.inf  # exclude the label itself
            least, rival = left.min(1)
            margin[images], prediction[images], worst[images] = least.long(), label, mask[every, rival]
    if bool(masks.whole.any()):
        margin.clamp_(max=-1)
    return Certificate(prediction, margin >= 0, margin, masks.placements[worst], "detection", threat)
