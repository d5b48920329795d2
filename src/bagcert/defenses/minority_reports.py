"""Minority Reports: detection of patches by masking every part of the image, for any classifier.

Source: McCoyd et al., Minority Reports Defense, 2020; docs/method.md, "Detection".

Guarantee: detection. If all masked predictions on an image equal the plain prediction, every attacked version keeps
that prediction or raises the alert, because the mask that covers the patch gives the same prediction as before. The
guarantee does not say that an image without an alert has the label of the clean scene.

Differences from the publication: its mask grid omits positions at the border, so no mask covers a patch in a corner;
here the masks cover every placement. There is no voting over neighboring masks: the alert is raised by a single masked
prediction that differs, or whose lead is within the rounding tolerance.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

from bagcert.certificate import Certificate
from bagcert.data.photo import Images
from bagcert.defenses.base import Detector, Placements
from bagcert.defenses.pixel_defense import PixelDefense
from bagcert.defenses.pixel_masks import MaskedClassifier, PixelMasks
from bagcert.scores import exact_arithmetic
from bagcert.threat import PatchLike, PatchThreatModel

RULE = "minority-reports"


class MinorityReports(PixelDefense, Detector):
    """Classifier that raises an alert if masking some part of the image changes its prediction.

    Args:
        model, class_names, image_size, patch, name: as for `PixelDefense`.
        stride: distance between masks in pixels; masks are `stride - 1` px larger than the patch.
        fill: value of masked pixels, one value or one per channel, typically the mean color of the data.
        batch_size: number of masked images per forward pass.
        tolerance: in logits. A masked prediction with a smaller lead also raises the alert, since the same masked
            image may be rounded differently in another batch.

    Raises:
        UsageError: as for `PixelDefense`, or more than 3,000 masks.

    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> defense = MinorityReports(model, ("red", "green", "blue"), (8, 8), patch=2, stride=2)
    >>> defense.alert(torch.tensor([0, 90, 0], dtype=torch.uint8).expand(1, 8, 8, 3)).tolist()
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
        """Build the masks for a threat; every patch of the threat is covered by a mask. The limit is 3,000 masks."""
        return PixelMasks.strided(threat, self.stride)

    def forward_passes(self, threat: PatchThreatModel, certify: bool) -> int:
        """Number of passes per image: one to predict, plus one per mask for alert or certificate."""
        return 1 + (len(self.masks(threat)) if certify else 0)

    def predict(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Int[Tensor, " batch"]:
        """Predict without masks; `patch` has no influence. Use `alert` to find out whether an image may be attacked."""
        batch, _ = self.check_inputs(images, patch, rule, placements)
        with exact_arithmetic(batch.device):
            return self.classifier.predict(batch)

    def alert(
        self, images: Images, patch: PatchLike | None = None, *, placements: Placements = None
    ) -> Bool[Tensor, " batch"]:
        """Which images raise the alert: some masked prediction differs. The negation of `certify(...).certified`."""
        return ~self.certify(images, patch, placements=placements).certified

    def certify(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Certificate:
        """Compute the plain prediction and certify it if every masked prediction equals it.

        The margin is 0 if all masks agree (certified) and -1 otherwise. `worst_placement` contains the rectangles of a
        mask (not of a patch), [batch, K, 4] for K patches: the first mask that disagrees or, for certified images, the
        mask with the smallest lead. A mask that covers all pixels never agrees. The masks cover all placements, also if
        `placements` restricts them.
        """
        batch, threat = self.check_inputs(images, patch, rule, placements)
        device = batch.device
        masks = self.masks(threat).to(device)
        alone = torch.arange(len(masks), device=device).repeat(2, 1)  # each mask paired with itself
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
