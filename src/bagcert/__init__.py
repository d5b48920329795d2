"""Certified defense against adversarial patches, in one forward pass."""

from typing import TYPE_CHECKING

from bagcert.io.lazy import lazy_names

__version__ = "0.2.0"

__all__ = ["BagCert", "Certificate", "FailSafe", "PatchThreatModel", "RegionGrid", "RegionScorer", "ScoreMap", "load"]

if TYPE_CHECKING:
    from bagcert.certificate import Certificate
    from bagcert.defenses.bagcert import BagCert, load
    from bagcert.defenses.failsafe import FailSafe
    from bagcert.grid import RegionGrid
    from bagcert.nets.region_scorer import RegionScorer
    from bagcert.scores import ScoreMap
    from bagcert.threat import PatchThreatModel

# Heavy modules load on first use, so that `bagcert --help` answers at once.
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BagCert": "bagcert.defenses.bagcert",
        "Certificate": "bagcert.certificate",
        "FailSafe": "bagcert.defenses.failsafe",
        "PatchThreatModel": "bagcert.threat",
        "RegionGrid": "bagcert.grid",
        "RegionScorer": "bagcert.nets.region_scorer",
        "ScoreMap": "bagcert.scores",
        "load": "bagcert.defenses.bagcert",
    },
)
