"""The location-independent vote certificate of Levine and Feizi, based on the number of regions a patch can reach."""

import torch

from bagcert.certificate import Certificate
from bagcert.rules.guard import guarded, require_sum
from bagcert.rules.masks import Windows
from bagcert.scores import ScoreMap, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel


@guarded
def levine_feizi(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """Certify the plain sum from the largest number of reachable regions.

    margin = min over c != y of T_c - 1[c < y] - 2 u K max |R|.

    Guarantee: recovery, with a margin that is a lower bound and never above that of `vote`; included for comparison.
    `worst_placement` is [batch, K, 4] for K patches: the first placement that reaches the most regions.

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
