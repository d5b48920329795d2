"""Base class of defenses whose score map comes from a region scorer."""

from bagcert.data.photo import Images
from bagcert.defenses.base import ScoreMapDefense
from bagcert.nets.region_scorer import RegionScorer
from bagcert.scores import ScoreMap
from bagcert.threat import PatchLike


class RegionDefense(ScoreMapDefense):
    """Base class of defenses that apply a rule to the score map of a region scorer.

    Args:
        scorer: the network. It is put into eval mode.
        rule: the deployed rule, a name from `bagcert.rules.RULES`.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`.
        name: name of the defense in tables.
    """

    def __init__(self, scorer: RegionScorer, rule: str, patch: PatchLike, name: str) -> None:
        self.scorer = scorer.eval()
        self.class_names, self.image_size = scorer.class_names, scorer.image_size
        self.rule, self.patch, self.name = rule, patch, name

    @property
    def locality_checked(self) -> bool:
        """Whether the network's locality was measured on its device; see `BagCert.check_locality`."""
        return self.scorer.locality_checked

    def score_map(self, images: Images) -> ScoreMap:
        """Compute the score map of a batch; the images must not be too small for the network."""
        return self.scorer.score_map(images)
