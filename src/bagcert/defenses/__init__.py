"""Certified defenses. Each has the methods `predict` and `certify`, which do not use labels."""

from typing import TYPE_CHECKING

from bagcert.io.lazy import lazy_names

__all__ = [
    "DEFENSES",
    "BagCert",
    "ClippedBagNet",
    "Defense",
    "DerandomizedSmoothing",
    "Detector",
    "FailSafe",
    "IntervalBounds",
    "MinorityReports",
    "PatchCleanser",
    "PatchGuard",
    "PatchGuardPlusPlus",
    "PixelDefense",
    "ScoreMapDefense",
    "Undefended",
]

if TYPE_CHECKING:
    from bagcert.defenses.bagcert import BagCert
    from bagcert.defenses.base import Defense, Detector, ScoreMapDefense
    from bagcert.defenses.clipped_bagnet import ClippedBagNet
    from bagcert.defenses.derandomized_smoothing import DerandomizedSmoothing
    from bagcert.defenses.failsafe import FailSafe
    from bagcert.defenses.interval_bounds import IntervalBounds
    from bagcert.defenses.minority_reports import MinorityReports
    from bagcert.defenses.patchcleanser import PatchCleanser
    from bagcert.defenses.patchguard import PatchGuard
    from bagcert.defenses.patchguard_pp import PatchGuardPlusPlus
    from bagcert.defenses.pixel_defense import PixelDefense
    from bagcert.defenses.table import DEFENSES
    from bagcert.defenses.undefended import Undefended

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "DEFENSES": "bagcert.defenses.table",
        "BagCert": "bagcert.defenses.bagcert",
        "ClippedBagNet": "bagcert.defenses.clipped_bagnet",
        "Defense": "bagcert.defenses.base",
        "DerandomizedSmoothing": "bagcert.defenses.derandomized_smoothing",
        "Detector": "bagcert.defenses.base",
        "FailSafe": "bagcert.defenses.failsafe",
        "IntervalBounds": "bagcert.defenses.interval_bounds",
        "MinorityReports": "bagcert.defenses.minority_reports",
        "PatchCleanser": "bagcert.defenses.patchcleanser",
        "PatchGuard": "bagcert.defenses.patchguard",
        "PatchGuardPlusPlus": "bagcert.defenses.patchguard_pp",
        "PixelDefense": "bagcert.defenses.pixel_defense",
        "ScoreMapDefense": "bagcert.defenses.base",
        "Undefended": "bagcert.defenses.undefended",
    },
)
