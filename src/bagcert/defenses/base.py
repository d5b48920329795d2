"""Base classes of defenses: the common interface, and defenses that apply a rule to a score map."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.data.photo import Images
from bagcert.errors import UsageError
from bagcert.rules import Rule, get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchLike, PatchThreatModel

Placements = np.ndarray | str | Path | None
"""Where patches may lie: boolean [height, width], the path of a mask image, or None for everywhere."""


class Defense(ABC):
    """Base class of all defenses: a deployed classifier with predictions and certificates.

    `certify(images).prediction` equals `predict(images)` for every batch.

    Attributes:
        class_names: class names by class index.
        image_size: (height_px, width_px) of the images for which the network is built.
        rule: name of the deployed rule.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`.
        name: name of the defense in tables.
        weights_sha256: SHA-256 of the weights file of a loaded model; empty otherwise.
    """

    weights_sha256 = ""

    class_names: tuple[str, ...]
    image_size: tuple[int, int]
    rule: str
    patch: PatchLike
    name: str

    @property
    @abstractmethod
    def guarantee(self) -> str:
        """Type of guarantee of a certificate: "recovery", "detection", or "none" if nothing is certified."""

    @abstractmethod
    def predict(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Int[Tensor, " batch"]:
        """Predict the class index of each image; arguments as for `certify`."""

    @abstractmethod
    def certify(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Certificate:
        """Compute prediction, certificate, margin and worst placement of each image.

        Args:
            images: uint8 [batch, height, width, 3], or float [batch, 3, height, width] in [0, 1].
            patch: the patch, in the notation of `PatchThreatModel.parse`; default: the deployed patch.
            rule: name of the rule; default: the deployed rule.
            placements: where patches may lie: boolean [height, width] or path of a mask image; default: everywhere.

        Raises:
            UsageError: invalid images, patch or rule.
        """

    @abstractmethod
    def forward_passes(self, threat: PatchThreatModel, certify: bool) -> int:
        """Maximum number of forward passes per image, for `certify` or for `predict`."""


class Detector(Defense):
    """Base class of defenses that raise alerts: no attack changes a certified prediction without raising an alert."""

    @abstractmethod
    def alert(
        self, images: Images, patch: PatchLike | None = None, *, placements: Placements = None
    ) -> Bool[Tensor, " batch"]:
        """Which images raise the alert; arguments as for `certify`."""


def deployed_or(patch: PatchLike | None, deployed: PatchLike, placements: object) -> PatchLike:
    """Return `patch`, or the deployed patch if it is None.

    Raises:
        UsageError: `placements` is combined with a threat model, which defines its own placements.
    """
    chosen = deployed if patch is None else patch
    if isinstance(chosen, PatchThreatModel) and placements is not None:
        raise UsageError("`placements` cannot be combined with a PatchThreatModel; set `allowed` on the threat model")
    return chosen


class ScoreMapDefense(Defense):
    """Base class of defenses that apply a rule from `bagcert.rules.RULES` to a score map, computed by the subclass."""

    @abstractmethod
    def score_map(self, images: Images) -> ScoreMap:
        """Compute the score map of images uint8 [batch, height, width, 3] or float [batch, 3, height, width]."""

    @property
    def guarantee(self) -> str:
        """Type of guarantee of the deployed rule: "recovery" or "detection"."""
        return self.named_rule(self.rule).guarantee

    def named_rule(self, name: str) -> Rule:
        """Look up a rule by name, with the parameters of this defense."""
        return get_rule(name)

    def predict(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Int[Tensor, " batch"]:
        """Predict the class index of each image; arguments as for `certify`."""
        score_map = self.score_map(images)
        return self.named_rule(rule or self.rule).predict(score_map, self.threat(score_map, patch, placements))

    def certify(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Certificate:
        """Compute prediction, certificate, margin and worst placement of each image.

        `rule` is a name from `bagcert.rules.RULES`. The certificate is marked `locality: unchecked` if locality was not
        measured; see `Certificate`.
        """
        certificate = self.certify_scores(self.score_map(images), patch, rule=rule, placements=placements)
        if certificate.locality == "exact" and not self.locality_checked:
            return replace(certificate, locality="unchecked")
        return certificate

    @property
    def locality_checked(self) -> bool:
        """Whether locality is known, by measurement or by construction, so certificates are not marked "unchecked"."""
        return True

    def certify_scores(
        self,
        score_map: ScoreMap,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: Placements = None,
    ) -> Certificate:
        """Certify from an existing score map, so that other patches and rules need no further forward pass."""
        return self.named_rule(rule or self.rule).certify(score_map, self.threat(score_map, patch, placements))

    def threat(
        self, score_map: ScoreMap, patch: PatchLike | None = None, placements: Placements = None
    ) -> PatchThreatModel:
        """Create the threat model for the image size of a score map; arguments as for `certify`."""
        chosen = deployed_or(patch, self.patch, placements)
        return PatchThreatModel.parse(chosen, score_map.grid.image_size, placements)

    def forward_passes(self, threat: PatchThreatModel | None = None, certify: bool = True) -> int:
        """Number of forward passes per image."""
        return 1
