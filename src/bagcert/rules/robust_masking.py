"""Robust masking: the evidence of each class is summed without the window that holds most of it.

If a patch raises the evidence of a wrong class, the masking of that class removes the patch. If a patch suppresses the
evidence of the correct class, that class loses at most the window of the patch and one more window. The evidence is the
integer score clipped below at 0, so large values under a patch cannot absorb the rest of a sum by rounding.

Source: Xiang et al., PatchGuard, USENIX Security 2021. Differences: the evidence is integer; ties go to the lowest
class in both prediction and certificate; every other class is considered; other classes are bounded by their evidence
outside the window divided by 1 - T (the published code omitted this division until December 2021).
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
    """Certify the robust-masking prediction against a patch in every window.

    Let e_c = max(s_c, 0) and let y be the deployed prediction. margin = min over windows w and c != y of
    LB(w) - floor(UB_c(w)) - 1[c < y]. LB(w) is the evidence for y outside w minus the largest window sum of that
    remaining evidence. UB_c(w) is the sum of e_c outside w, divided by 1 - T. The margin is at most -1 if two windows
    cover all regions. For K patches the windows are all unions of K windows.

    Guarantee: recovery; the margin is a lower bound. Evidence v for y inside w raises the sum of y by v and its largest
    window by at most v, so v = 0 is the worst case. If another class has more evidence inside w than T / (1 - T) times
    its evidence outside w, its window is masked. `worst_placement` is [batch, K, 4] for K patches: the first mask that
    attains the margin among the masks that the bounds do not exclude. In certificates the rule is named
    "robust-masking" for T = 0 and "robust-masking:T" otherwise.

    Source: Xiang et al., PatchGuard, USENIX Security 2021, section 4.

    Args:
        score_map: scores of any range; negative scores count as no evidence.
        threat: threat model whose windows are masked; both prediction and certificate depend on it.
        threshold: T, see `exact_share`. A window is masked for a class if it holds more than this share of the
            evidence of the class.

    Raises:
        UsageError: invalid threshold, scores too large for it, or several patches with too many unions of windows.
    """
    require_sum(score_map, "robust-masking")
    share = exact_share(threshold)
    return guarded(partial(_certify, share=share))(score_map, threat)


def robust_masking_prediction(
    score_map: ScoreMap, threat: PatchThreatModel, *, threshold: object = _NO_THRESHOLD
) -> Int[Tensor, " batch"]:
    """Predict the class with the most evidence after masking the largest window of each class.

    The largest window of a class is masked only if it holds more than the share T of its evidence. Arguments are those
    of `robust_masking`.

    Raises:
        UsageError: as for `robust_masking`.
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
    """Convert a masking threshold T to an exact fraction.

    Args:
        threshold: a `Fraction`, an int, or a string such as "1/5" or "0.2", in [0, 1) and with a denominator of at
            most 10^6. Floats are rejected because the float 0.2 is not exactly one fifth.

    Raises:
        UsageError: any other value.

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
    """Scores clipped below at 0, in a dtype in which their sums are exact."""
    rows, cols = score_map.grid.map_size
    most = max(1, score_map.high) * rows * cols
    if most * share.denominator >= 2**62:
        raise UsageError(f"sums of scores up to {score_map.high} are too large for the masking threshold {share}")
    return score_map.scores[images].clamp(min=0).to(exact_dtype(max(1, score_map.high), rows * cols))


def _sums(masks: MaskSet, evidence: Float[Tensor, "*batch m n"]) -> Float[Tensor, "*batch masks"]:
    """Sums over every mask, with 0 in gaps; window sums are never below 0, so gaps do not change a maximum."""
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
    """Compute the margin of each image and a mask that attains it.

    The mask with the smallest lower bound is evaluated first, then every mask whose lower bound is below that result.
    """
    every = torch.arange(len(evidence), device=evidence.device)
    left = (total[..., None] - sums).long()
    rivals = left * share.denominator // (share.denominator - share.numerator)
    rivals += tie_penalty(label, evidence.shape[1])[..., None]
    rivals[every, label] = -_MOST  # exclude the label itself
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
