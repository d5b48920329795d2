"""The guard: sound certificates for score maps whose values may change slightly when they are recomputed.

If the arithmetic of a backend is not exactly local, a score outside a patch's reach can change by up to the `slack` of
the map. Every rule derives its proof from sums of s_y - s_c over regions that the patch does not reach (plus a term for
the reach that does not depend on the scores). It is therefore enough to prove the prediction on the map where each of
these differences is as small as the slack permits. See docs/method.md, "Locality is checked".
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
    """Check that the class scores of a map are sums of region scores.

    Raises:
        UsageError: the map has a readout, so its class scores are not sums.
    """
    scores.require_sum(score_map.readout, f"the rule {rule}", "use double-masking or detection")


def guarded(certify: Certify) -> Certify:
    """Wrap a rule so that it accounts for the slack of a score map. Maps without slack go to the rule unchanged.

    The prediction y is that of the given scores. The margin is that of `ScoreMap.worst_case` if the rule also predicts
    y there; otherwise it is at most -1.

    Guarantee: sound if no score outside the reach of a patch changes by more than the slack. The margin is never larger
    than the margin without slack. The certificate is marked "measured" because the slack comes from a measurement.
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
