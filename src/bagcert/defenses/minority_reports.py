"""Minority Reports: a mask slid over the image detects patches, for any classifier.

Source: McCoyd et al., Minority Reports Defense, 2020; docs/method.md, "Detection".

Guarantee: detection. If all masked predictions on an image equal the plain one, every attacked version of it keeps
that prediction or raises the alert: the mask that hides the patch still says what it said. It does not say that an
image without alert has the label of the clean scene.

Different from the publication: its grid of masks leaves out positions at the border, so that a patch in a corner is
hidden by no mask; here the masks hide every placement, corners included. And the alert needs no voting over
neighboring masks: one masked prediction that differs, or does not lead beyond rounding, raises it.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from bagcert.certificate import Certificate
from bagcert.defenses.base import Detector
from bagcert.defenses.pixel_defense import PixelDefense
from bagcert.defenses.pixel_masks import MaskedClassifier, PixelMasks
from bagcert.scores import exact_arithmetic
from bagcert.threat import PatchLike, PatchThreatModel

RULE = "minority-reports"


class MinorityReports(PixelDefense, Detector):
    """A classifier with an alarm that goes off when hiding some part of the image changes its answer.

    Args:
        model: images [batch, 3, height, width] in [0, 1] to logits [batch, classes]; normalization is its own layer.
            It is put into eval mode.
        class_names: one per logit.
        image_size: (height_px, width_px) it is meant for.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`; the masks are built for it.
        stride: pixels between masks; masks are `stride - 1` px larger than the patch.
        name: for tables.
        fill: what masked pixels become, one value or one per channel: the mean color of the data.
        batch_size: masked images per forward pass.
        tolerance: in logits. A masked prediction that leads by less raises the alert, too, since the same masked
            image may be rounded otherwise in another batch.

    Raises:
        UsageError: fewer than two classes, a patch that does not fit, or an argument out of its range.

    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> defense = MinorityReports(model, ("red", "green", "blue"), (8, 8), patch=2, stride=2)
    >>> defense.alert(np.full((1, 8, 8, 3), (0, 90, 0), dtype=np.uint8)).tolist()
    [False]
    """

    rule = RULE
    guarantee = "detection"

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        image_size: tuple[int, int],
        *,
        patch: PatchLike = 5,
        stride: int = 1,
        name: str = "minority-reports",
        fill: float | Sequence[float] = 0.5,
        batch_size: int = 256,
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__(model, class_names, image_size, patch=patch, name=name)
        self.stride = stride
        self.masked = MaskedClassifier(self.classifier, fill, batch_size, tolerance)
        self.masks(self.deployed_threat())

    def masks(self, threat: PatchThreatModel) -> PixelMasks:
        """The masks against a threat: every one of its patches lies inside one of them.

        Raises:
            UsageError: more than 3,000 masks.
        """
        return PixelMasks.strided(threat, self.stride)

    def forward_passes(self, threat: PatchThreatModel, certify: bool) -> int:
        """The most passes that one image costs: one for the answer; one per mask as well for alert or certificate."""
        return 1 + (len(self.masks(threat)) if certify else 0)

    def predict(
        self,
        images: np.ndarray | Tensor,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: np.ndarray | str | Path | None = None,
    ) -> Int[Tensor, " batch"]:
        """The plain label, whatever the patch, alert or not; ask `alert` whether to act on it.

        Raises:
            UsageError: as for `certify`.
        """
        batch, _ = self.check_inputs(images, patch, rule, placements)
        with exact_arithmetic(batch.device):
            return self.classifier.predict(batch)

    def alert(
        self,
        images: np.ndarray | Tensor,
        patch: PatchLike | None = None,
        *,
        placements: np.ndarray | str | Path | None = None,
    ) -> Bool[Tensor, " batch"]:
        """Does some masked prediction differ from the plain one? True exactly where `certify` does not certify."""
        return ~self.certify(images, patch, placements=placements).certified

    def certify(
        self,
        images: np.ndarray | Tensor,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: np.ndarray | str | Path | None = None,
    ) -> Certificate:
        """The plain label, and whether every masked prediction equals it: then no attack changes it without an alert.

        The margin counts agreement, not scores: 0 where all masks agree (certified), -1 elsewhere.
        `worst_placement` holds the rectangles of a mask (not a patch), [batch, K, 4] for K patches: the first that
        disagrees; where certified, the one with the smallest lead. A mask that leaves no pixel agrees with nothing.

        Args:
            images: uint8 [batch, height, width, 3], or float [batch, 3, height, width] in [0, 1].
            patch: what the masks are built for; the deployed patch when absent.
            rule: "minority-reports" or nothing.
            placements: where patches may lie, as for `BagCert.certify`; the masks are those of all placements.

        Raises:
            UsageError: bad images or patch, another rule, too many masks, or logits that do not fit the class names.
        """
        batch, threat = self.check_inputs(images, patch, rule, placements)
        device = batch.device
        masks = self.masks(threat).to(device)
        alone = torch.arange(len(masks), device=device).repeat(2, 1)  # a mask with itself
        certified, worst = [], []
        with exact_arithmetic(device):
            label = self.classifier.predict(batch)
            for some, its in zip(batch.split(self.masked.batch_size), label.split(self.masked.batch_size), strict=True):
                agrees, at, _ = self.masked.agreement(some, masks, its, alone)
                certified.append(agrees)
                worst.append(masks.rectangles[at])
        holds, mask = torch.cat(certified), torch.cat(worst)
        if bool(masks.whole.any()):
            holds = torch.zeros_like(holds)
        return Certificate(label, holds, holds.long() - 1, mask, RULE, threat)
