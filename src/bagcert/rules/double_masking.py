"""Double masking on the score map. Masking a window is a subtraction, so all labels cost a single forward pass."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.rules.attention_masking import attention_double_masking, attention_prediction
from bagcert.rules.guard import guarded
from bagcert.rules.masks import CHUNK_ELEMENTS, Windows, chunks, majority, per_image
from bagcert.rules.union_masking import union_double_masking, union_prediction
from bagcert.rules.window_pairs import worst_pairs
from bagcert.scores import ScoreMap, exact_arithmetic, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel


@guarded
def double_masking(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """Certify the double-masking prediction: it must have the largest score outside every pair of masks.

    margin = min over c != y and mask pairs m, m' of T_c - sum over (m or m') of (s_y - s_c) - 1[c < y], where y is
    the deployed prediction (`double_masking_prediction`); at most -1 if some pair covers all regions.

    Guarantee: recovery. No patch of the threat changes the prediction of a certified image. The margin is the exact
    minimum over all pairs. `worst_placement` is [batch, 2, 4] (for K patches [batch, 2K, 4]): a pair that attains the
    minimum, chosen deterministically for an image and a threat.

    Source: Xiang et al., PatchCleanser, USENIX Security 2022, and PatchCURE, USENIX Security 2024;
    docs/method.md, "Double masking".

    Raises:
        UsageError: several patches have too many mask unions.
    """
    if score_map.readout is not None:
        return attention_double_masking(score_map, threat)
    if threat.patches > 1:
        return union_double_masking(score_map, threat)
    windows = Windows.of(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction = torch.empty_like(margin)
    pair = torch.empty(batch, 2, dtype=torch.int64, device=device)
    with exact_arithmetic(device):
        for images in chunks(batch, per_image(score_map, windows)):
            levels = score_map.levels(images)
            total, sums = levels.sum((2, 3)), windows.sums(levels)
            label = _prediction(windows, levels, total, sums)
            margin[images], pair[images] = worst_pairs(windows, levels, total, sums, label)
            prediction[images] = label
    if bool(windows.completed.any()):
        margin.clamp_(max=-1)
    return Certificate(prediction, margin >= 0, margin, windows.placements[pair], "double-masking", threat)


def double_masking_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Int[Tensor, " batch"]:
    """Compute the double-masking prediction of each image.

    If the labels y(m) of all single masks agree, the prediction is that label. Otherwise let k be the majority of the
    y(m), with ties going to the lowest index. The prediction is y(m) of the first mask m with y(m) != k for which all
    pairs (m, m') give the label y(m), or k if there is no such mask. A mask or pair that covers all regions has no
    label and agrees with no label. If no mask has a label, the plain prediction is returned.

    Source: Xiang et al., PatchCleanser, USENIX Security 2022, Algorithm 1; docs/method.md, "Double masking".

    Raises:
        UsageError: several patches have too many mask unions.
    """
    if score_map.readout is not None:
        return attention_prediction(score_map, threat)
    if threat.patches > 1:
        return union_prediction(score_map, threat)
    windows = Windows.of(score_map, threat)
    prediction = torch.empty(len(score_map), dtype=torch.int64, device=score_map.scores.device)
    with exact_arithmetic(prediction.device):
        for images in chunks(len(score_map), per_image(score_map, windows)):
            levels = score_map.levels(images)
            prediction[images] = _prediction(windows, levels, levels.sum((2, 3)), windows.sums(levels))
    return prediction


def _prediction(
    windows: Windows,
    levels: Float[Tensor, "batch classes rows cols"],
    total: Float[Tensor, "batch classes"],
    sums: Float[Tensor, "batch classes windows"],
) -> Int[Tensor, " batch"]:
    """Compute the prediction from a chunk of levels and their sums over the whole map and over every window."""
    first = lowest_argmax(total[..., None] - sums)
    unlabelled = ~windows.keep | (windows.sizes == levels[0, 0].numel())
    first = first.masked_fill(unlabelled, -1)
    answer = majority(first, levels.shape[1], lowest_argmax(total))
    # Disagreeing masks, sorted by (image, mask). A mask cannot pass if one of its pairs covers all regions.
    open_ = (first >= 0) & (first != answer[:, None]) & ~windows.completed
    image, mask = open_.nonzero(as_tuple=True)
    label = first[image, mask]
    # Most disagreeing masks have a pair in which the majority label wins, so checking that one class first is cheap.
    regions = levels[0, 0].numel()
    survives = torch.empty_like(image, dtype=torch.bool)
    for rows in chunks(len(image), max(regions, len(windows))):
        i, k, c = image[rows], label[rows], answer[image[rows]]
        survives[rows] = _keeps_lead(windows, mask[rows], levels[i, k] - levels[i, c], (c < k).to(levels.dtype))
    image, mask, label = image[survives], mask[survives], label[survives]
    while len(image):  # each round checks the next disagreeing mask of every undecided image
        turn = torch.ones_like(image, dtype=torch.bool)
        turn[1:] = image[1:] != image[:-1]
        for rows in turn.nonzero()[:, 0].split(
            max(1, CHUNK_ELEMENTS // (levels.shape[1] * max(regions, len(windows))))
        ):
            i, k = image[rows], label[rows]
            penalty = tie_penalty(k, levels.shape[1]).to(levels.dtype)
            passes = _keeps_lead(windows, mask[rows], levels[i, k][:, None] - levels[i], penalty).all(1)
            answer[i[passes]] = k[passes]
            open_[i[passes]] = False
        rest = ~turn & open_[image, mask]
        image, mask, label = image[rest], mask[rest], label[rest]
    return answer


def _keeps_lead(windows: Windows, mask: Tensor, lead: Float[Tensor, "rows *classes m n"], penalty: Tensor) -> Tensor:
    """Whether the lead outside `mask` and every second mask is at least `penalty`."""
    outside = ~windows.masks[mask]
    lead = lead * (outside if lead.ndim == 3 else outside[:, None])
    worst = windows.without_gaps(windows.sums(lead), -torch.inf).amax(-1)
    return lead.sum((-2, -1)) - worst >= penalty
