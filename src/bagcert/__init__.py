"""Certified defence against adversarial patches, in one forward pass."""

from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

# Heavy modules load on first use, so that `bagcert --help` answers at once.
_HOMES = {
    "BagCert": "bagcert.defenses.bagcert",
    "Certificate": "bagcert.certificate",
    "FailSafe": "bagcert.defenses.failsafe",
    "PatchThreatModel": "bagcert.threat",
    "RegionGrid": "bagcert.grid",
    "RegionScorer": "bagcert.nets.region_scorer",
    "ScoreMap": "bagcert.scores",
    "load": "bagcert.defenses.bagcert",
    "regionalize": "bagcert.nets.regionalize",
}

__all__ = [
    "BagCert",
    "Certificate",
    "FailSafe",
    "PatchThreatModel",
    "RegionGrid",
    "RegionScorer",
    "ScoreMap",
    "load",
    "regionalize",
]

if TYPE_CHECKING:
    from bagcert.certificate import Certificate
    from bagcert.defenses.bagcert import BagCert, load
    from bagcert.defenses.failsafe import FailSafe
    from bagcert.grid import RegionGrid
    from bagcert.nets.region_scorer import RegionScorer
    from bagcert.nets.regionalize import regionalize
    from bagcert.scores import ScoreMap
    from bagcert.threat import PatchThreatModel


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        from importlib import import_module

        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'bagcert' has no attribute {name!r}")
