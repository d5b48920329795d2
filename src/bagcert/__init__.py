"""Certified defense against adversarial patches, in one forward pass."""

from typing import TYPE_CHECKING

from bagcert.io.deprecated import find_moved_modules
from bagcert.io.lazy import lazy_names

__version__ = "0.2.0"

__all__ = [
    "BagCert",
    "Certificate",
    "FailSafe",
    "PatchThreatModel",
    "RegionGrid",
    "RegionScorer",
    "ScoreMap",
    "attack",
    "evaluate",
    "export",
    "list_defenses",
    "list_models",
    "load",
    "load_dataset",
    "regionalize",
    "train",
]

if TYPE_CHECKING:
    from bagcert.attacks import attack
    from bagcert.certificate import Certificate
    from bagcert.data import load_dataset
    from bagcert.defenses.bagcert import BagCert, list_models, load
    from bagcert.defenses.failsafe import FailSafe
    from bagcert.defenses.table import list_defenses
    from bagcert.evaluation.evaluate import evaluate
    from bagcert.exporting.writer import export
    from bagcert.grid import RegionGrid
    from bagcert.nets.region_scorer import RegionScorer
    from bagcert.nets.regionalize import regionalize
    from bagcert.scores import ScoreMap
    from bagcert.threat import PatchThreatModel
    from bagcert.training.api import train

# Modules are loaded on first use to keep `bagcert --help` fast. To add a public name, add it here, to `__all__` and to
# the imports above, and add its module to docs/api.md.
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
        "attack": "bagcert.attacks",
        "evaluate": "bagcert.evaluation.evaluate",
        "export": "bagcert.exporting.writer",
        "list_defenses": "bagcert.defenses.table",
        "list_models": "bagcert.defenses.bagcert",
        "load": "bagcert.defenses.bagcert",
        "load_dataset": "bagcert.data",
        "regionalize": "bagcert.nets.regionalize",
        "train": "bagcert.training.api",
    },
)

find_moved_modules()
