"""The vote certificate of BagCert: no change of the scores inside one window changes the class with the largest sum."""

import torch
from jaxtyping import Float
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.rules.guard import guarded, require_sum
from bagcert.rules.masks import Windows, chunks, per_image
from bagcert.scores import ScoreMap, exact_arithmetic, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel


@guarded
def vote(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """Certify the prediction by the sum of region scores.

    margin = min over windows R and c != y of T_c - sum_R(u + s_y - s_c) - 1[c < y].

    Guarantee: recovery. For one patch the margin is exact: no tighter certificate of the sum follows from the score map
    alone. For K patches it is a lower bound, since the union of K reaches costs at most the K largest window damages.
    `worst_placement` is [batch, K, 4] for K patches and refers to the class with the smallest margin (ties go to the
    lowest class). If there are fewer than K windows, the last placement is repeated.

    Source: Metzen & Yatsura, ICLR 2021, section 3; docs/method.md, "Vote".

    Raises:
        UsageError: the threat is for images of another size.
    """
    require_sum(score_map, "vote")
    windows = Windows.of(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction = torch.empty_like(margin)
    worst = torch.empty(batch, threat.patches, dtype=torch.int64, device=device)
    with exact_arithmetic(device):
        for images in chunks(batch, per_image(score_map, windows)):
            levels = score_map.levels(images)
            sums = levels.sum((2, 3))
            label = lowest_argmax(sums)
            damage = _damage(windows, levels, label, score_map.span)
            lead = _own(sums, label) - sums - tie_penalty(label, score_map.classes)
            left = lead.long() - _largest(damage, threat.patches).long().sum(2)
            left.scatter_(1, label[:, None], torch.iinfo(torch.int64).max)  # exclude the label itself
            margin[images], rival = left.min(1)
            worst[images] = _largest_first(windows, _own(damage, rival), threat.patches)
            prediction[images] = label
    return Certificate(prediction, margin >= 0, margin, windows.placements[worst], "vote", threat)


def _own(values: Tensor, label: Tensor) -> Tensor:
    """Select values[b, label[b]]; the class dimension is kept for [batch, classes], dropped for [batch, classes, n]."""
    own = values[torch.arange(len(values), device=values.device), label]
    return own[:, None] if values.ndim == 2 else own


def _damage(windows: Windows, levels: Tensor, label: Tensor, span: int) -> Float[Tensor, "batch classes windows"]:
    """The most an attacker can reduce the lead over each class in each window: sum of u + s_y - s_c, 0 in gaps."""
    sums = windows.sums(levels)
    damage = (_own(sums, label) + span * windows.sizes)[:, None] - sums
    return windows.without_gaps(damage, 0.0)  # damages are never negative


def _largest(damage: Tensor, patches: int) -> Float[Tensor, "batch classes patches"]:
    if patches == 1:
        return damage.amax(2, keepdim=True)
    return damage.topk(min(patches, damage.shape[2]), dim=2).values


def _largest_first(windows: Windows, damage: Float[Tensor, "batch windows"], patches: int) -> Tensor:
    """The windows [batch, patches] with the largest damages; ties go to the first, the last is repeated if too few."""
    order = windows.without_gaps(damage, -1.0).sort(dim=1, descending=True, stable=True).indices
    order = order[:, : min(patches, int(windows.keep.sum()))]
    return torch.cat([order, order[:, -1:].expand(-1, patches - order.shape[1])], 1)
