"""Certification rules: pure functions from integer score maps to predictions and certificates.

Rules use no network, files or labels. To add a rule, write a module with a function
`(ScoreMap, PatchThreatModel) -> Certificate` and add one line to `RULES`.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.errors import UsageError, nearest
from bagcert.rules import detection, double_masking, levine_feizi, robust_masking, vote
from bagcert.rules.guard import require_sum
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel


@dataclass(frozen=True)
class Rule:
    """A certification rule: how predictions and certificates are computed from a score map.

    Attributes:
        name: name of the rule in recipes and on the command line.
        certify: computes a `Certificate` for every image of a score map, including the deployed prediction.
        predict: computes the deployed prediction only, int64 [batch]; equal to the prediction of `certify`.
        guarantee: "recovery" (no attack changes the prediction of a certified image) or "detection" (no attack
            changes it without raising an alert).
        summary: one-line description.
        pools: whether the rule accepts any aggregation of the kept regions. If False, class scores must be sums over
            regions.
    """

    name: str
    certify: Callable[[ScoreMap, PatchThreatModel], Certificate]
    predict: Callable[[ScoreMap, PatchThreatModel], Tensor]
    guarantee: str
    summary: str
    pools: bool = False


def sum_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Tensor:
    """Return the class with the largest sum over all regions; `threat` is ignored.

    Raises:
        UsageError: class scores are not sums over regions.
    """
    require_sum(score_map, "vote")
    return score_map.predict()


def plain_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Tensor:
    """Return the class with the largest score over all regions; `threat` is ignored."""
    return score_map.predict()


RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        Rule("vote", vote.vote, sum_prediction, "recovery", "class sums that no single window can overturn"),
        Rule(
            "levine-feizi",
            levine_feizi.levine_feizi,
            sum_prediction,
            "recovery",
            "class sums further apart than any patch has regions; weaker than vote, for comparison",
        ),
        Rule(
            "double-masking",
            double_masking.double_masking,
            double_masking.double_masking_prediction,
            "recovery",
            "the same answer with any two windows left out; certifies more than vote",
            pools=True,
        ),
        Rule(
            "detection",
            detection.detection,
            plain_prediction,
            "detection",
            "the same answer with any one window left out; an attack may cause an alert instead of a wrong answer",
            pools=True,
        ),
        Rule(
            "robust-masking",
            robust_masking.robust_masking,
            robust_masking.robust_masking_prediction,
            "recovery",
            "most evidence with the strongest window of each class left out, as PatchGuard does",
        ),
    )
}


def get_rule(name: str) -> Rule:
    """Look up a rule by name.

    Raises:
        UsageError: unknown name.
    """
    if name in RULES:
        return RULES[name]
    likely = name.lower().replace("_", "-")
    raise UsageError(f"unknown rule {name!r}{nearest(likely, RULES, cutoff=0.4)}")
