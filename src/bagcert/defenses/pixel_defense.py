"""Base class of defenses that wrap an ordinary image classifier."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from bagcert.data.photo import Images, as_batch
from bagcert.defenses.base import Defense, Placements, deployed_or
from bagcert.defenses.undefended import Undefended
from bagcert.errors import UsageError
from bagcert.threat import PatchLike, PatchThreatModel


class PixelDefense(Defense):
    """Base class of defenses that wrap an image classifier. Each has exactly one rule.

    Args:
        model: maps images [batch, 3, height, width] in [0, 1] to logits [batch, classes]; it includes its own
            normalization. It is put into eval mode.
        class_names: class names by logit index.
        image_size: (height_px, width_px) of the images for which the network is built.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`.
        name: name of the defense in tables.

    Raises:
        UsageError: fewer than two classes, a patch that does not fit, or another argument out of range.
    """

    def __init__(
        self, model: nn.Module, class_names: Sequence[str], image_size: tuple[int, int], *, patch: PatchLike, name: str
    ) -> None:
        self.classifier = Undefended(model, class_names, image_size, name=name)
        self.class_names, self.image_size = self.classifier.class_names, self.classifier.image_size
        self.patch, self.name = patch, name

    @property
    def device(self) -> torch.device:
        """Device of the network."""
        return self.classifier.device

    def deployed_threat(self) -> PatchThreatModel:
        """Threat model of the deployed patch for images of size `image_size`."""
        return PatchThreatModel.parse(self.patch, self.image_size)

    def check_inputs(
        self, images: Images, patch: PatchLike | None, rule: str | None, placements: Placements
    ) -> tuple[Float[Tensor, "batch 3 height width"], PatchThreatModel]:
        """Convert the arguments of `certify` to images on the device of the network and a threat model for their size.

        Raises:
            UsageError: invalid images or patch, or another rule.
        """
        if rule not in (None, self.rule):
            raise UsageError(f"this defense has no rule {rule!r}; leave it out, or give {self.rule!r}")
        chosen = deployed_or(patch, self.patch, placements)
        batch = as_batch(images).to(self.device)
        return batch, PatchThreatModel.parse(chosen, (batch.shape[2], batch.shape[3]), placements)
