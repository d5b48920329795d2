"""The guard: certificates from scores that may be a little off wherever they are computed again.

Where a backend's arithmetic is not bit for bit local, a score outside a patch's reach can move by the map's `slack`.
Every rule proves its answer from sums of s_y - s_c over regions that the patch does not reach (plus a term for the
reach that does not depend on the scores), so it is enough to prove it on the map where each of these differences is
as small as the slack allows. See docs/method.md, "Locality is checked".
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps

import torch

from bagcert import scores
from bagcert.certificate import Certificate
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

Certify = Callable[[ScoreMap, PatchThreatModel], Certificate]


def require_sum(score_map: ScoreMap, rule: str) -> None:
    """Refuses a map whose class scores are not sums of region scores.

    Raises:
        UsageError: the map has a readout.
    """
    scores.require_sum(score_map.readout, f"the rule {rule}", "use double-masking or detection")


def guarded(certify: Certify) -> Certify:
    """A rule that counts the slack of a score map for the attacker; without slack, the rule itself.

    The prediction stays that of the scores as they are. With y that prediction and margins as the rule defines them:
    margin = that of y on `ScoreMap.worst_case`, where the rule answers y there as well; else at most -1.

    Guarantee: sound if no score outside the reach of a patch moves by more than the slack; the margin is never above
    the one without slack. The certificate is marked "measured", since the slack stems from a measurement.
    """

    @wraps(certify)
    def guard(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
        if score_map.slack is None:
            return certify(score_map, threat)
        found = certify(replace(score_map, slack=None), threat)
        worst = certify(score_map.worst_case(found.prediction), threat)
        same = worst.prediction == found.prediction
        margin = torch.where(same, worst.margin, found.margin.clamp(max=-1))
        return Certificate(
            found.prediction,
            margin >= 0,
            margin,
            torch.where(same[:, None, None], worst.worst_placement, found.worst_placement),
            found.rule,
            threat,
            "measured",
        )

    return guard
