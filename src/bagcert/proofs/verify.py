"""Independent checker for certificate records, using only numpy and the standard library.

The checker consists of this module (rules), `bagcert.proofs.claim` (threat and windows) and `bagcert.proofs.maps`
(scores and evidence). These modules import only each other, numpy and the standard library, and share no code with the
code that they check. They enumerate every placement, class, mask and pair of masks. Symbols are those of
docs/method.md. docs/records.md describes what a successful check proves and what it does not.
"""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement
from math import comb, inf, prod
from typing import Any, NamedTuple

import numpy as np

from bagcert.proofs.claim import (
    MOST_CELLS,
    Claim,
    FaultError,
    need,
    read_claim,
)
from bagcert.proofs.maps import Evidence, Scores, read_evidence, read_readout, read_scores

MOST_WORK = 2**38
"""Limit for the number of multiplications over all classes or all pairs of masks."""


@dataclass(frozen=True)
class VerifyResult:
    """Result of a check.

    Attributes:
        ok: whether the check succeeded.
        reason: explanation in one sentence.
        fault: what failed: the "record" itself, its "proof", or a "limit" of the checker; empty if nothing failed.
    """

    ok: bool
    reason: str
    fault: str = ""


class Answer(NamedTuple):
    """Result of a rule: the prediction, the margin, and the margin attained at the recorded worst placements."""

    prediction: int
    margin: float
    attained: float


def verify_record(record: dict[str, Any], readout: dict[str, Any] | None = None) -> VerifyResult:
    """Verify a record by recomputing prediction, margin and certificate from its map and geometry.

    Args:
        record: the parsed record.
        readout: the parsed readout for attention pooling; the record must contain its hash.

    Returns:
        The verdict. Malformed records give a negative verdict rather than an exception.
    """
    return _checked("record", lambda: _verify_record(record, readout))


def verify_readout(readout: dict[str, Any]) -> VerifyResult:
    """Verify the form of a parsed readout and the hash of its integers."""
    return _checked("readout", lambda: VerifyResult(True, f"a readout of {read_readout(readout).classes} classes"))


def _checked(what: str, check: Callable[[], VerifyResult]) -> VerifyResult:
    try:
        return check()
    except FaultError as error:
        return VerifyResult(False, error.reason, error.fault)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, zlib.error) as error:
        return VerifyResult(False, f"the {what} is malformed ({type(error).__name__}: {str(error)[:200]!r})", "record")


def _verify_record(record: dict[str, Any], readout: dict[str, Any] | None) -> VerifyResult:
    version, masked = record["record_version"], record["threat"]["allowed"] is not None
    need(version in (1, 2, 3) and type(version) is int, f"the record version is {version}, this checks 1, 2 and 3")
    need(masked or version != 2, "a record of version 2 must restrict placements")
    need(not masked or version != 1, "version 1 left out smaller patches within a mask; certify the image again")
    if version == 3:
        rule, evidence = record["rule"], read_evidence(record, readout)
        need(rule in POOLING_RULES or rule not in SUM_RULES, f"the rule {rule} needs class scores that are sums")
        answer = POOLING_RULES[rule](read_claim(record, evidence.map_size), evidence)
    else:
        answer = with_slack(record)
    margin = int(answer.margin)
    for name, found in (("prediction", answer.prediction), ("margin", margin), ("certified", margin >= 0)):
        said = record["verdict"][name]
        need(type(said) is type(found) and said == found, f"the {name} is {found}, not {said}", "proof")
    attained = int(answer.attained)
    need(attained == margin, f"the worst placement leaves {attained}, the margin is {margin}", "proof")
    return VerifyResult(True, f"{'' if margin >= 0 else 'not '}certified, with margin {margin}, as recorded")


# Rules for sums of region scores


def with_slack(record: dict[str, Any]) -> Answer:
    """Apply a rule for sums, accounting for the slack of the scores.

    With slack, the rule is also applied to the map that is worst for the prediction within the slack. If the prediction
    is the same there, the margin on that map counts; otherwise the margin is at most -1.
    """
    scores = read_scores(record)
    claim = read_claim(record, scores.map_size)
    rule = SUM_RULES[record["rule"]]
    answer = rule(claim, scores)
    if scores.slack is None:
        return answer
    sign = np.where(np.arange(len(scores.s)) == answer.prediction, -1, 1)[:, None, None]
    worst = rule(claim, replace(scores, s=(scores.s + sign * scores.slack).clip(scores.low, scores.high)))
    if worst.prediction == answer.prediction:
        return worst
    return Answer(answer.prediction, min(answer.margin, -1), min(answer.attained, -1))


def vote(claim: Claim, scores: Scores) -> Answer:
    """Vote: predict the class with the largest sum.

    margin = min over l and c != y of T_c - sum over R(l) of (u + Delta_c) - [c < y].

    For K patches the K largest damages of different windows are subtracted.
    """
    limit_work(claim, scores)
    y, u = plain_answer(scores), scores.high - scores.low
    worst = {(each.height, each.width, each.rows.tobytes(), each.cols.tobytes()): each for each in claim.worst}
    margins, attained = [], []
    for c, lead in leads_of_sums(scores, y):
        damage = u + scores.s[y] - scores.s[c]
        largest = largest_damages(claim, damage)
        margins.append(lead - largest.sum())
        # With fewer windows than patches the worst placements contain duplicates, which count once.
        attained.append(lead - sum(each.rows @ damage @ each.cols for each in worst.values()))
    return Answer(y, min(margins), min(attained))


def levine_feizi(claim: Claim, scores: Scores) -> Answer:
    """Levine and Feizi: predict the class with the largest sum.

    margin = min over c != y of T_c - [c < y], minus K times 2 u for each region of the largest R(l).
    """
    limit_work(claim, scores)
    y, u = plain_answer(scores), scores.high - scores.low
    damage = np.full_like(scores.s[0], 2 * u)
    margins, attained = [], []
    for _, lead in leads_of_sums(scores, y):
        margins.append(lead - largest_damages(claim, damage).max() * claim.patches)
        attained.append(lead - sum(each.rows @ damage @ each.cols for each in claim.worst))
    return Answer(y, min(margins), min(attained))


def limit_work(claim: Claim, scores: Scores) -> None:
    """Raise `FaultError` if checking all classes and windows would exceed `MOST_WORK`."""
    classes = len(scores.s)
    work = sum((each.rows.size + each.keep.size) * each.cols.shape[1] + 2**6 * each.keep.size for each in claim.windows)
    need(classes * work <= MOST_WORK, f"{classes:,} classes are too many to check", "limit")


def leads_of_sums(scores: Scores, y: int) -> Iterator[tuple[int, float]]:
    """Yield each class c != y and its lead T_c - [c < y]."""
    sums = scores.s.sum((1, 2))
    for c in range(len(sums)):
        if c != y:
            yield c, sums[y] - sums[c] - (c < y)


def largest_damages(claim: Claim, damage: np.ndarray) -> np.ndarray:
    """The K largest sums of a map [m, n] over different windows; all sums if there are fewer than K windows."""
    sums = np.concatenate([(each.rows @ damage @ each.cols.T)[each.keep] for each in claim.windows])
    return np.partition(sums, -min(claim.patches, len(sums)))[-claim.patches :]


def robust_masking(claim: Claim, scores: Scores) -> Answer:
    """Robust masking: predict the class with the most evidence max(s, 0), each class without its strongest mask.

    margin = min over m and c != y of (evidence for y outside m and outside the strongest second mask) - (evidence for c
    outside m) - [c < y]; at most -1 if a pair of masks covers all regions.
    """
    outside = kept_by_masks(claim, scores)
    positive = replace(scores, s=scores.s.clip(0))
    y = int(positive.class_scores(outside).min(0).argmax())

    def least(keep: np.ndarray) -> float:
        strongest = positive.class_scores(outside * keep)[:, y].min()
        rivals = positive.class_scores(keep[None])[0] + (np.arange(len(scores.s)) < y)
        return strongest - np.delete(rivals, y).max()

    empty = -1.0 if any(leaves_nothing(outside * keep) for keep in outside) else inf
    return Answer(y, min(empty, *map(least, outside)), min(empty, least(kept_by_worst(claim))))


# Rules for sums of region scores and for attention pooling


def detection(claim: Claim, scores: Scores | Evidence) -> Answer:
    """Detection: predict the class with the largest score over all regions.

    margin = min over m and c != y of (lead of y over c outside m) - [c < y]; at most -1 if a mask covers all regions.
    """
    outside = kept_by_masks(claim, scores)
    y = plain_answer(scores)
    empty = -1.0 if leaves_nothing(outside) else inf
    return Answer(y, min(empty, margin_of(scores, outside, y)), min(empty, margin_of_worst(claim, scores, y)))


def double_masking(claim: Claim, scores: Scores) -> Answer:
    """Double masking: predict by `double_masking_answer`.

    margin = min over pairs m, m' and c != y of (lead of y over c outside both) - [c < y]; at most -1 if a pair covers
    all regions.
    """
    outside = kept_by_masks(claim, scores)
    y = double_masking_answer(scores, outside)
    empty = -1.0 if any(leaves_nothing(outside * keep) for keep in outside) else inf
    margin = min(margin_of(scores, pairs, y) for pairs in pairs_of_masks(outside))
    return Answer(y, min(empty, margin), min(empty, margin_of_worst(claim, scores, y)))


def double_masking_of_pooling(claim: Claim, evidence: Evidence) -> Answer:
    """Double masking for attention pooling.

    As `double_masking`, but if the minimum over single masks is negative, it is the margin, without pairs.
    """
    outside = kept_by_masks(claim, evidence)
    y = double_masking_answer(evidence, outside)
    empty = -1.0 if any(leaves_nothing(outside * keep) for keep in outside) else inf
    margin = margin_of(evidence, outside, y)
    if margin >= 0:
        margin = min(margin_of(evidence, pairs, y) for pairs in pairs_of_masks(outside))
    return Answer(y, min(empty, margin), min(empty, margin_of_worst(claim, evidence, y)))


def double_masking_answer(scores: Scores | Evidence, outside: np.ndarray) -> int:
    """Double-masking prediction from single and second masks.

    If all single-mask labels y(m) agree, the prediction is that label. Otherwise let k be their majority. The first
    mask m with y(m) != k whose label is unchanged under every second mask determines the prediction y(m); without such
    a mask, the prediction is k.
    """
    labels = answers(scores, outside)
    found = [label for label in labels if label is not None]
    if not found:
        return plain_answer(scores)
    k = int(np.bincount(found).argmax())
    for keep, label in zip(outside, labels, strict=True):
        if label not in (None, k) and set(answers(scores, outside * keep)) == {label}:
            return label
    return k


def plain_answer(scores: Scores | Evidence) -> int:
    """The class with the largest score over all regions; ties go to the lowest class."""
    return int(scores.class_scores(np.ones((1, prod(scores.map_size)))).argmax())


def answers(scores: Scores | Evidence, kept: np.ndarray) -> list[int | None]:
    """The label of each set of kept regions: the lowest class with the largest score, or None for an empty set."""
    labels = np.where(kept.any(axis=1), scores.class_scores(kept).argmax(1), -1)
    return [None if label < 0 else label for label in labels.tolist()]


def margin_of(scores: Scores | Evidence, kept: np.ndarray, y: int) -> float:
    """Minimum of z_y - z_c - [c < y] over sets of kept regions and c != y; empty sets are ignored."""
    z = scores.class_scores(kept[kept.any(1)])
    leads = (z[:, [y]] - z - (np.arange(z.shape[1]) < y)).astype(float)
    return np.delete(leads, y, axis=1).min(initial=inf)


def margin_of_worst(claim: Claim, scores: Scores | Evidence, y: int) -> float:
    """`margin_of` for the regions outside the recorded worst placements."""
    return margin_of(scores, kept_by_worst(claim)[None], y)


def kept_by_masks(claim: Claim, scores: Scores | Evidence) -> np.ndarray:
    """Regions outside each mask as 0 and 1, [masks, regions]. The masks are all unions of K windows, in order."""
    regions = prod(scores.map_size)
    windows = sum(int(each.keep.sum()) for each in claim.windows)
    count = comb(windows + claim.patches - 1, claim.patches)
    fits = count**2 * scores.work <= MOST_WORK and count * regions <= MOST_CELLS
    need(fits, f"{count:,} masks are too many to check in pairs", "limit")
    outside = []
    for each in claim.windows:
        outside += [1 - np.outer(each.rows[i], each.cols[j]).ravel() for i, j in np.argwhere(each.keep)]
    unions = combinations_with_replacement(outside, claim.patches)
    return np.array([np.prod(members, axis=0) for members in unions], dtype=float)


def kept_by_worst(claim: Claim) -> np.ndarray:
    """Regions outside the recorded worst placements as 0 and 1, [regions]."""
    return np.prod([1 - np.outer(each.rows, each.cols).ravel() for each in claim.worst], axis=0)


def pairs_of_masks(outside: np.ndarray) -> Iterator[np.ndarray]:
    """Yield, for each mask, the regions outside it and each mask from it on, [masks, regions]."""
    for number, keep in enumerate(outside):
        yield outside[number:] * keep


def leaves_nothing(kept: np.ndarray) -> bool:
    """Whether at least one of the sets of kept regions is empty."""
    return not kept.any(1).all()


SUM_RULES: dict[str, Callable[[Claim, Scores], Answer]] = {
    "vote": vote,
    "levine-feizi": levine_feizi,
    "double-masking": double_masking,
    "detection": detection,
    "robust-masking": robust_masking,
}
POOLING_RULES: dict[str, Callable[[Claim, Evidence], Answer]] = {
    "double-masking": double_masking_of_pooling,
    "detection": detection,
}
