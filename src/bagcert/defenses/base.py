"""The interface of all defenses, and the part that defenses with a score map and a rule have in common."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.errors import UsageError
from bagcert.rules import Rule, get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchLike, PatchThreatModel


class Defense(ABC):
    """A deployed classifier: it predicts and certifies, and neither takes a label.

    `certify(images).prediction` equals `predict(images)`, whatever the batch.

    Attributes:
        class_names: one per class index.
        image_size: (height_px, width_px) it is meant for.
        rule: the name of the deployed rule.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`.
        name: for tables.
        weights_sha256: of the weights file, for loaded models.
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
        """What a certificate says: "recovery", "detection", or "none" where nothing is certified."""

    @abstractmethod
    def predict(
        self,
        images: np.ndarray | Tensor,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: np.ndarray | str | Path | None = None,
    ) -> Int[Tensor, " batch"]:
        """The class index that the defense answers for each image; arguments as for `certify`."""

    @abstractmethod
    def certify(
        self,
        images: np.ndarray | Tensor,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: np.ndarray | str | Path | None = None,
    ) -> Certificate:
        """Prediction, proof, margin and worst placement for each image.

        Args:
            images: uint8 [batch, height, width, 3], or float [batch, 3, height, width] in [0, 1].
            patch: an attacker in the notation of `PatchThreatModel.parse`; the deployed patch when absent.
            rule: the deployed rule when absent.
            placements: where patches may lie, a boolean [height, width] or a mask image; everywhere when absent.

        Raises:
            UsageError: bad images, patch or rule.
        """

    @abstractmethod
    def forward_passes(self, threat: PatchThreatModel, certify: bool) -> int:
        """Passes through the network per image, at most."""


class Detector(Defense):
    """A defense that also raises alerts: no attack changes the prediction on a certified image without one."""

    @abstractmethod
    def alert(
        self,
        images: np.ndarray | Tensor,
        patch: PatchLike | None = None,
        *,
        placements: np.ndarray | str | Path | None = None,
    ) -> Bool[Tensor, " batch"]:
        """Which images raise the alert; arguments as for `certify`."""


def deployed_or(patch: PatchLike | None, deployed: PatchLike, placements: object) -> PatchLike:
    """The patch asked about, or else the deployed one.

    Raises:
        UsageError: allowed placements beside a threat model, which has its own.
    """
    chosen = deployed if patch is None else patch
    if isinstance(chosen, PatchThreatModel) and placements is not None:
        raise UsageError("`placements` cannot be combined with a PatchThreatModel; set `allowed` on the threat model")
    return chosen


class ScoreMapDefense(Defense):
    """A defense whose predictions and certificates follow from one score map; a subclass computes that map.

    `rule` is a name from `bagcert.rules.RULES`.
    """

    @abstractmethod
    def score_map(self, images: np.ndarray | Tensor) -> ScoreMap:
        """Integer scores of a batch: uint8 [batch, height, width, 3] or float [batch, 3, height, width] in [0, 1]."""

    @property
    def guarantee(self) -> str:
        """What a certificate of the deployed rule says: "recovery" or "detection"."""
        return self.named_rule(self.rule).guarantee

    def named_rule(self, name: str) -> Rule:
        """The rule of that name as this defense deploys it.

        Raises:
            UsageError: there is none.
        """
        return get_rule(name)

    def predict(
        self,
        images: np.ndarray | Tensor,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: np.ndarray | str | Path | None = None,
    ) -> Int[Tensor, " batch"]:
        """What the deployed rule answers on each image, as in `certify`."""
        score_map = self.score_map(images)
        return self.named_rule(rule or self.rule).predict(score_map, self.threat(score_map, patch, placements))

    def certify(
        self,
        images: np.ndarray | Tensor,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: np.ndarray | str | Path | None = None,
    ) -> Certificate:
        """Prediction, proof, margin and worst placement for each image.

        The certificate is marked `locality: unchecked` where nothing was measured: see `Certificate`.

        Args:
            images: uint8 [batch, height, width, 3], or float [batch, 3, height, width] in [0, 1].
            patch: an attacker in the notation of `PatchThreatModel.parse`; the deployed patch when absent.
            rule: a name from `bagcert.rules.RULES`; the deployed rule when absent.
            placements: where patches may lie, a boolean [height, width] or a mask image; everywhere when absent.

        Raises:
            UsageError: bad images, patch or rule.
        """
        certificate = self.certify_scores(self.score_map(images), patch, rule=rule, placements=placements)
        if certificate.locality == "exact" and not self.locality_checked:
            return replace(certificate, locality="unchecked")
        return certificate

    @property
    def locality_checked(self) -> bool:
        """Whether it is known that scores outside a patch's reach stand still: measured, or true by construction."""
        return True

    def certify_scores(
        self,
        score_map: ScoreMap,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: np.ndarray | str | Path | None = None,
    ) -> Certificate:
        """Like `certify`, from a score map at hand: further patches and rules cost no forward pass."""
        return self.named_rule(rule or self.rule).certify(score_map, self.threat(score_map, patch, placements))

    def threat(
        self, score_map: ScoreMap, patch: PatchLike | None = None, placements: np.ndarray | str | Path | None = None
    ) -> PatchThreatModel:
        """The threat model for images of the map's size.

        Raises:
            UsageError: a patch that is none, or allowed placements beside a threat model that has its own.
        """
        chosen = deployed_or(patch, self.patch, placements)
        return PatchThreatModel.parse(chosen, score_map.grid.image_size, placements)

    def forward_passes(self, threat: PatchThreatModel | None = None, certify: bool = True) -> int:
        """Passes through the network per image."""
        return 1
