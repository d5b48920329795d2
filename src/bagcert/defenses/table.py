"""Registry of all defenses: the training that their network needs, and how the network is deployed.

To add a defense, add a module to this package and an entry to `DEFENSES`. To add a training, add an entry to
`TRAININGS`.
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
    """Training of the network of a defense, as changes to a recipe.

    Attributes:
        sees: type of network: "regions" (small receptive field), "whole" (every region sees the whole image) or "plain"
            (without batch norm and shortcuts, as needed for interval bounds).
        changes: recipe changes `section.key=value`; {patch}, {column} and {block} are replaced by sizes in pixels.
        passes: cost of a training step relative to plain training; the network is made narrower accordingly.
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
        ("loss.name=cross-entropy", "augment.ablation=column", "augment.ablation_size={column}", "defense.rule=vote"),
    ),
    "blocks": Training(
        "whole",
        ("loss.name=cross-entropy", "augment.ablation=block", "augment.ablation_size={block}", "defense.rule=vote"),
    ),
    "interval-bounds": Training(
        "plain",
        ("loss.name=interval-bounds", "optimizer.name=adamw", "optimizer.learning_rate=5e-3", "defense.rule=vote"),
        passes=3,  # the network, and centers and radii of boxes
    ),
}


@dataclass(frozen=True)
class Setting:
    """Inputs from which a defense is built.

    Attributes:
        column_px, block_px: widths in pixels of the column bands and blocks of derandomized smoothing.
    """

    scorer: RegionScorer
    patch: str
    column_px: int
    block_px: int

    @property
    def classifier(self) -> tuple[MeanScores, tuple[str, ...], tuple[int, int]]:
        """The network as an image classifier, its class names, and its image size."""
        return MeanScores(self.scorer), self.scorer.class_names, self.scorer.image_size


@dataclass(frozen=True)
class Entry:
    """A defense of the benchmark.

    Attributes:
        training: name of the training of its network, a key of `TRAININGS`.
        deploy: builds the defense from the trained network.
        slow: whether the defense needs so many passes per image that the benchmark uses only part of the images.
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
    """List the names of all defenses that `bagcert benchmark` compares."""
    return list(DEFENSES)


def get_entry(name: str) -> Entry:
    """Look up a defense by name.

    Raises:
        UsageError: unknown name.
    """
    if name not in DEFENSES:
        raise UsageError(f"unknown defense {name!r}{nearest(name, DEFENSES)}")
    return DEFENSES[name]
