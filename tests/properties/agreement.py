"""Counts on how many random tiny cases the rules and the oracle agree.

python -m tests.properties.agreement --cases 3000 --json
"""

import numpy as np

from bagcert.rules import RULES
from tests import oracle
from tests.properties.cases import Case, attacked, build, from_generator
from tests.properties.command import run


def expected(case: Case, image: int) -> dict[str, tuple[int, int]]:
    """(prediction, margin) of every rule, from the definitions."""
    scores, low, high = case.scores[image], case.score_map.low, case.score_map.high
    masks, windows, patches = case.masks, case.windows, case.threat.patches
    return {
        "vote": oracle.vote(scores, windows, low, high, patches),
        "levine-feizi": oracle.levine_feizi(scores, windows, low, high, patches),
        "double-masking": oracle.double_masking(scores, masks),
        "detection": oracle.detection(scores, masks),
        "robust-masking": oracle.robust_masking(scores, masks),
    }


def has_tie(scores: np.ndarray, masks: list[np.ndarray]) -> bool:
    """Do two classes share the largest sum, over all regions or outside a mask?"""
    for outside in [np.ones(scores.shape[1:], dtype=bool), *(~mask for mask in masks)]:
        sums = scores[:, outside].astype(int).sum(1)
        if (sums == sums.max()).sum() > 1:
            return True
    return False


def breaks(case: Case, image: int, rule: str, answer: int) -> bool:
    """Does some attack change the answer (for detection: without an alert)?"""
    maps = case.with_scores(attacked(case, image))
    changed = (RULES[rule].predict(maps, case.threat) != answer).numpy()
    if rule == "detection":
        return any(not oracle.alert(scores, case.masks) for scores in maps.scores.numpy()[changed])
    return bool(changed.any())


def count(cases: int, seed: int = 0, attack_every: int = 1) -> dict[str, int]:
    """Runs `cases` cases of two images each; attacks every `attack_every`-th."""
    choose = from_generator(np.random.default_rng(seed))
    totals = {"cases": 0, "images": 0, "certified": 0, "disagreements": 0, "ties": 0}
    totals |= {"attacked_certificates": 0, "broken_certificates": 0, "vote_certified_not_double_masking": 0}
    for number in range(cases):
        case = build(choose)
        certificates = {name: rule.certify(case.score_map, case.threat) for name, rule in RULES.items()}
        agree, tie, masks = True, False, case.masks
        for image in range(len(case.score_map)):
            totals["images"] += 1
            tie |= has_tie(case.scores[image], masks)
            for name, (label, margin) in expected(case, image).items():
                found = certificates[name]
                same = (int(found.prediction[image]), int(found.margin[image])) == (label, margin)
                agree &= same and bool(found.certified[image]) == (margin >= 0)
                totals["certified"] += bool(found.certified[image])
                if found.certified[image] and number % attack_every == 0:
                    totals["attacked_certificates"] += 1
                    totals["broken_certificates"] += breaks(case, image, name, label)
            agree &= bool(certificates["double-masking"].certified[image]) == oracle.double_masking_certified(
                case.scores[image], masks
            )
            one_patch_anywhere = case.threat.patches == 1 and case.threat.allowed is None
            if one_patch_anywhere and not any((a | b).all() for a in masks for b in masks):
                lost = certificates["vote"].certified[image] & ~certificates["double-masking"].certified[image]
                totals["vote_certified_not_double_masking"] += bool(lost)
        totals["cases"] += 1
        totals["disagreements"] += not agree
        totals["ties"] += tie
    return totals


if __name__ == "__main__":
    run(count, "agreement", __doc__, cases=3000, attack_every=1)
