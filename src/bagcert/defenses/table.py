"""Every defense by name: which training its network needs, and how the network is deployed.

A new defense is one file beside this one and one line in `DEFENSES`; a new training is one line in `TRAININGS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from bagcert.defenses.bagcert import BagCert
from bagcert.defenses.base import Defense
from bagcert.defenses.clipped_bagnet import ClippedBagNet
from bagcert.defenses.derandomized_smoothing import DerandomizedSmoothing
from bagcert.defenses.interval_bounds import IntervalBounds
from bagcert.defenses.minority_reports import MinorityReports
from bagcert.defenses.patchcleanser import PatchCleanser
from bagcert.defenses.patchguard import PatchGuard
from bagcert.defenses.patchguard_pp import PatchGuardPlusPlus
from bagcert.defenses.undefended import Undefended
from bagcert.errors import UsageError, nearest
from bagcert.nets.classifier import MeanScores, in_sequence
from bagcert.nets.region_scorer import RegionScorer


@dataclass(frozen=True)
class Training:
    """How the network of a defense is trained, as changes to a recipe.

    Attributes:
        sees: "regions" (a small receptive field), "whole" (every region of the network sees the whole image) or
            "plain" (a network without batch norm and shortcuts, which bounds of its layers need).
        changes: `section.key=value`; {patch}, {column} and {block} are sizes in pixels.
        passes: what a training step costs, in steps of plain training; its network is narrower by as much.
    """

    sees: Literal["regions", "whole", "plain"]
    changes: tuple[str, ...]
    passes: int = 1


TRAININGS: dict[str, Training] = {
    "double-masking": Training("regions", ("loss.name=double-masking",)),
    "binary": Training("regions", ("loss.name=smooth-margin", "model.head=binary", "defense.rule=vote")),
    "clipped": Training("regions", ("loss.name=clipped",)),
    "masked-features": Training("regions", ("loss.name=masked-features",)),
    "cutout": Training("whole", ("loss.name=cross-entropy", "augment.cutout={patch}", "defense.rule=vote")),
    "columns": Training(
        "whole",
        (
            "loss.name=cross-entropy",
            "augment.ablation=column",
            "augment.ablation_size={column}",
            "defense.rule=vote",
        ),
    ),
    "blocks": Training(
        "whole",
        ("loss.name=cross-entropy", "augment.ablation=block", "augment.ablation_size={block}", "defense.rule=vote"),
    ),
    "interval-bounds": Training(
        "plain",
        ("loss.name=interval-bounds", "optimizer.name=adamw", "optimizer.learning_rate=5e-3", "defense.rule=vote"),
        passes=3,  # the network itself, and center and radius of its boxes
    ),
}


@dataclass(frozen=True)
class Setting:
    """What a defense is built from.

    Attributes:
        scorer: its trained network.
        patch: what it is deployed against.
        column_px, block_px: what an ablation of smoothing keeps.
    """

    scorer: RegionScorer
    patch: str
    column_px: int
    block_px: int

    @property
    def classifier(self) -> tuple[MeanScores, tuple[str, ...], tuple[int, int]]:
        """The network as an ordinary classifier, its class names, and the size of its images."""
        return MeanScores(self.scorer), self.scorer.class_names, self.scorer.image_size


@dataclass(frozen=True)
class Entry:
    """A defense of the benchmark.

    Attributes:
        training: the name of its network's training.
        deploy: from the trained network to the defense.
        slow: takes so many passes per image that a benchmark looks at a part of the images only.
    """

    training: str
    deploy: Callable[[Setting], Defense]
    slow: bool = False


DEFENSES: dict[str, Entry] = {
    "undefended": Entry("cutout", lambda at: Undefended(*at.classifier)),
    "bagcert-vote": Entry("binary", lambda at: BagCert(at.scorer, "vote", patch=at.patch)),
    "bagcert-double-masking": Entry("double-masking", lambda at: BagCert(at.scorer, "double-masking", patch=at.patch)),
    "clipped-bagnet": Entry("clipped", lambda at: ClippedBagNet(at.scorer, patch=at.patch)),
    "patchguard": Entry("masked-features", lambda at: PatchGuard(at.scorer, patch=at.patch)),
    "patchguard++": Entry("masked-features", lambda at: PatchGuardPlusPlus(at.scorer, patch=at.patch)),
    "column-smoothing": Entry(
        "columns",
        lambda at: DerandomizedSmoothing(*at.classifier, ablation="column", size_px=at.column_px, patch=at.patch),
    ),
    "column-smoothing-levine-feizi": Entry(
        "columns",
        lambda at: DerandomizedSmoothing(
            *at.classifier, ablation="column", size_px=at.column_px, rule="levine-feizi", patch=at.patch
        ),
    ),
    "block-smoothing": Entry(
        "blocks",
        lambda at: DerandomizedSmoothing(*at.classifier, ablation="block", size_px=at.block_px, patch=at.patch),
        slow=True,
    ),
    "patchcleanser": Entry("cutout", lambda at: PatchCleanser(*at.classifier, patch=at.patch), slow=True),
    "minority-reports": Entry(
        "cutout", lambda at: MinorityReports(*at.classifier, patch=at.patch, stride=2), slow=True
    ),
    "interval-bounds": Entry(
        "interval-bounds",
        lambda at: IntervalBounds(in_sequence(at.scorer), *at.classifier[1:], patch=at.patch),
        slow=True,
    ),
}


def list_defenses() -> list[str]:
    """The names of all defenses that `bagcert benchmark` compares, as in `DEFENSES`."""
    return list(DEFENSES)


def get_entry(name: str) -> Entry:
    """The defense of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in DEFENSES:
        raise UsageError(f"unknown defense {name!r}{nearest(name, DEFENSES)}")
    return DEFENSES[name]
