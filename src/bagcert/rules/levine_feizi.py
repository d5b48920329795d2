"""The location-free vote certificate of Levine and Feizi: counting how many regions one patch can reach."""

import torch

from bagcert.certificate import Certificate
from bagcert.rules.guard import guarded, require_sum
from bagcert.rules.masks import Windows
from bagcert.scores import ScoreMap, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel


@guarded
def levine_feizi(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """Certifies the plain sum by counting: margin = min over c != y of T_c - 1[c < y] - 2 u K max |R|.

    Guarantee: a lower bound, never above that of `vote`; kept for comparison. `worst_placement` [batch, K, 4] is
    for each of K patches the first placement of those that reach the most regions.

    Source: Levine & Feizi, NeurIPS 2020; docs/method.md, "Vote".

    Raises:
        UsageError: the threat is for images of another size.
    """
    require_sum(score_map, "levine-feizi")
    windows = Windows.of(score_map, threat)
    sums = score_map.class_sums
    prediction = lowest_argmax(sums)
    sizes = windows.sizes.masked_fill(~windows.keep, -1)
    largest = lowest_argmax(sizes[None])
    lead = sums.gather(1, prediction[:, None]) - sums - tie_penalty(prediction, score_map.classes)
    lead.scatter_(1, prediction[:, None], torch.iinfo(torch.int64).max)
    margin = lead.amin(1) - 2 * score_map.span * threat.patches * sizes[largest]
    placement = windows.placements[largest].expand(len(score_map), threat.patches, 4)
    return Certificate(prediction, margin >= 0, margin, placement.contiguous(), "levine-feizi", threat)
