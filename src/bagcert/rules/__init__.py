"""Rules: integer score maps in, predictions and certificates out. Pure: no network, no files, no labels.

A new rule is one module with a function `(ScoreMap, PatchThreatModel) -> Certificate` and one line in `RULES`.
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
    """One way to turn a score map into an answer with a proof.

    Attributes:
        name: as in recipes and on the command line.
        certify: the certificate of every image of a score map, its deployed prediction included.
        predict: the deployed prediction alone, int64 [batch]; the same as that of `certify`.
        guarantee: "recovery" (no attack changes the answer) or "detection" (none does without an alert).
        summary: one line.
        pools: whether it takes any aggregation of the kept regions; otherwise class scores must be sums over regions.
    """

    name: str
    certify: Callable[[ScoreMap, PatchThreatModel], Certificate]
    predict: Callable[[ScoreMap, PatchThreatModel], Tensor]
    guarantee: str
    summary: str
    pools: bool = False


def sum_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Tensor:
    """The class with the largest sum over all regions, whatever the threat.

    Raises:
        UsageError: class scores are not sums over regions.
    """
    require_sum(score_map, "vote")
    return score_map.predict()


def plain_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Tensor:
    """The class with the largest sum over all regions, whatever the threat."""
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
    """The rule of that name.

    Raises:
        UsageError: there is none.
    """
    if name in RULES:
        return RULES[name]
    likely = name.lower().replace("_", "-")
    raise UsageError(f"there is no rule {name!r}{nearest(likely, RULES, cutoff=0.4)}")
