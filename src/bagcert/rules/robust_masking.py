"""Robust masking: every class is counted without the window that holds most of its evidence.

A patch that shouts for a class is masked with that class; a patch that silences the label costs its own window and one
more. Evidence is the score clipped below at 0, an integer, so that nothing under a patch can swallow the rest of a sum.

Source: Xiang et al., PatchGuard, USENIX Security 2021. Where it differs: evidence is integers, ties go to the lowest
class in prediction and certificate alike, every rival class is looked at, and rivals are bounded by their evidence
outside the window over 1 - T (the bound of the public code left that division out until 12/2021).
"""

from fractions import Fraction
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.errors import UsageError
from bagcert.rules.guard import guarded, require_sum
from bagcert.rules.mask_sets import MaskSet
from bagcert.rules.masks import chunks
from bagcert.scores import ScoreMap, exact_arithmetic, exact_dtype, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel

MOST_DENOMINATOR = 10**6
_NO_THRESHOLD = Fraction(0)
_MOST = torch.iinfo(torch.int64).max


def robust_masking(score_map: ScoreMap, threat: PatchThreatModel, *, threshold: object = _NO_THRESHOLD) -> Certificate:
    """Certifies the robust-masking prediction against a patch in every window it can reach.

    With e_c = max(s_c, 0) and y the deployed prediction: margin = min over windows w and c != y of
    LB(w) - floor(UB_c(w)) - 1[c < y], where LB(w) is the evidence for y outside w less the largest window of what is
    left, and UB_c(w) = sum outside w of e_c, over 1 - T; at most -1 where two windows leave no region. K patches: the
    windows are all unions of K.

    Guarantee: sound, a lower bound. Evidence v for y inside w raises its sum by v and its largest window by at most v,
    so that 0 is the worst. Evidence for a rival beyond T / (1 - T) of what it has outside w gets its window masked.
    `worst_placement` is [batch, K, 4] for K patches, of the first mask that attains the margin among those that bounds
    leave open. T = 0 is named "robust-masking" in certificates, others "robust-masking:T".

    Source: Xiang et al., PatchGuard, USENIX Security 2021, section 4.

    Args:
        score_map: scores of any range; what is negative is no evidence.
        threat: whose windows are masked; prediction and certificate belong to it.
        threshold: T, see `exact_share`; a window is masked for a class if its share of the class exceeds T.

    Raises:
        UsageError: a threshold that is no such share, scores too large for it, or several patches with more unions
            of windows than can be enumerated.
    """
    require_sum(score_map, "robust-masking")
    share = exact_share(threshold)
    return guarded(partial(_certify, share=share))(score_map, threat)


def robust_masking_prediction(
    score_map: ScoreMap, threat: PatchThreatModel, *, threshold: object = _NO_THRESHOLD
) -> Int[Tensor, " batch"]:
    """The class with most evidence, each without its largest window if that holds more than T of it; `robust_masking`.

    Raises:
        UsageError: as there.
    """
    require_sum(score_map, "robust-masking")
    share = exact_share(threshold)
    masks = MaskSet.of(score_map, threat)
    prediction = torch.empty(len(score_map), dtype=torch.int64, device=score_map.scores.device)
    with exact_arithmetic(prediction.device):
        for images in chunks(len(score_map), masks.elements * score_map.classes):
            evidence = _evidence(score_map, images, share)
            prediction[images] = _prediction(evidence.sum((2, 3)), _sums(masks, evidence), share)
    return prediction


def exact_share(threshold: object) -> Fraction:
    """T as an exact fraction.

    Args:
        threshold: a `Fraction`, an int, or a text such as "1/5" or "0.2"; at least 0, below 1, its denominator at
            most 10^6. A float is refused: 0.2 is not one fifth there.

    Raises:
        UsageError: anything else.

    >>> exact_share("0.2")
    Fraction(1, 5)
    """
    expected = f"a masking threshold is an exact share such as '1/5', at least 0 and below 1; got {threshold!r}"
    if not isinstance(threshold, Fraction | int | str) or isinstance(threshold, bool):
        raise UsageError(expected)
    try:
        share = Fraction(threshold)
    except (ValueError, ZeroDivisionError):
        raise UsageError(expected) from None
    if not 0 <= share < 1:
        raise UsageError(expected)
    if share.denominator > MOST_DENOMINATOR:
        raise UsageError(
            f"a masking threshold has a denominator of at most {MOST_DENOMINATOR:,}, got {share.denominator:,}"
        )
    return share


def _certify(score_map: ScoreMap, threat: PatchThreatModel, share: Fraction) -> Certificate:
    masks = MaskSet.of(score_map, threat)
    margin = torch.empty(len(score_map), dtype=torch.int64, device=score_map.scores.device)
    prediction, worst = torch.empty_like(margin), torch.empty_like(margin)
    with exact_arithmetic(margin.device):
        for images in chunks(len(score_map), masks.elements * score_map.classes):
            evidence = _evidence(score_map, images, share)
            total, sums = evidence.sum((2, 3)), _sums(masks, evidence)
            label = _prediction(total, sums, share)
            margin[images], worst[images] = _worst_mask(masks, evidence, total, sums, label, share)
            prediction[images] = label
    if bool(masks.completed.any()):
        margin.clamp_(max=-1)
    rule = f"robust-masking:{share}" if share else "robust-masking"
    return Certificate(prediction, margin >= 0, margin, masks.placements[worst], rule, threat)


def _evidence(score_map: ScoreMap, images: slice, share: Fraction) -> Float[Tensor, "batch classes m n"]:
    """Scores clipped below at 0, in a type in which their sums are exact."""
    rows, cols = score_map.grid.map_size
    most = max(1, score_map.high) * rows * cols
    if most * share.denominator >= 2**62:
        raise UsageError(f"sums of scores up to {score_map.high} are too large for the masking threshold {share}")
    return score_map.scores[images].clamp(min=0).to(exact_dtype(max(1, score_map.high), rows * cols))


def _sums(masks: MaskSet, evidence: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch masks"]:
    """Sums over every mask; 0 in gaps, which is never more than a window has."""
    return masks.without_gaps(masks.sums(evidence), 0.0)


def _prediction(
    total: Float[Tensor, "batch classes"], sums: Float[Tensor, "batch classes masks"], share: Fraction
) -> Int[Tensor, " batch"]:
    total, most = total.long(), sums.amax(2).long()
    masked = most * share.denominator > total * share.numerator
    return lowest_argmax(total - most * masked)


def _worst_mask(
    masks: MaskSet,
    evidence: Float[Tensor, "batch classes m n"],
    total: Float[Tensor, "batch classes"],
    sums: Float[Tensor, "batch classes masks"],
    label: Int[Tensor, " batch"],
    share: Fraction,
) -> tuple[Int[Tensor, " batch"], Int[Tensor, " batch"]]:
    """The margin of each image and a mask that attains it.

    The mask that comes closest if nothing overlaps is settled first; then every mask that could be worse.
    """
    every = torch.arange(len(evidence), device=evidence.device)
    left = (total[..., None] - sums).long()
    rivals = left * share.denominator // (share.denominator - share.numerator)
    rivals += tie_penalty(label, evidence.shape[1])[..., None]
    rivals[every, label] = -_MOST  # the label is no rival of itself
    lead = left[every, label] - rivals.amax(1)
    floor = lead - sums[every, label].amax(1, keepdim=True).long()
    if masks.gaps is not None:
        floor.masked_fill_(masks.gaps, _MOST)

    def settled(image: Tensor, mask: Tensor) -> Tensor:
        rest = evidence[image, label[image]] * masks.outside(mask)
        return lead[image, mask] - _sums(masks, rest).amax(1).long()

    margins = torch.full_like(floor, _MOST)
    first = lowest_argmax(-floor)
    margins[every, first] = settled(every, first)
    image, mask = (floor < margins[every, first][:, None]).nonzero(as_tuple=True)
    for rows in chunks(len(image), masks.elements):
        margins[image[rows], mask[rows]] = settled(image[rows], mask[rows])
    margin, worst = margins.min(1)
    return margin, worst
