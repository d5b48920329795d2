"""Undefended baseline: an ordinary classifier with the interface of a defense and no certificates."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bagcert.certificate import Certificate
from bagcert.data.photo import Images, as_batch
from bagcert.defenses.base import Defense, Placements
from bagcert.errors import UsageError
from bagcert.scores import lowest_argmax
from bagcert.threat import PatchLike, PatchThreatModel

RULE = "none"
_AT_ONCE = 256


class Undefended(Defense):
    """Ordinary classifier with the interface of a defense. It certifies no image.

    Args:
        model: maps images [batch, 3, height, width] in [0, 1] to logits [batch, classes]; it includes its own
            normalization. It is put into eval mode.
        class_names: class names by logit index.
        image_size: (height_px, width_px) of the images for which the network is built.
        name: name of the defense in tables.

    Raises:
        UsageError: fewer than two classes.

    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> defense = Undefended(model, ("red", "green", "blue"), (8, 8))
    >>> defense.predict(torch.tensor([0, 9, 0], dtype=torch.uint8).expand(1, 8, 8, 3)).tolist()
    [1]
    """

    rule = RULE
    guarantee = "none"
    patch: PatchLike = 1

    def __init__(
        self, model: nn.Module, class_names: Sequence[str], image_size: tuple[int, int], *, name: str = "undefended"
    ) -> None:
        if len(class_names) < 2:
            raise UsageError(f"a classifier needs at least two class names, got {len(class_names)}")
        self.model = model.eval()
        self.class_names = tuple(class_names)
        self.image_size = (image_size[0], image_size[1])
        self.name = name

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        weight = next(self.model.parameters(), None)
        return torch.device("cpu") if weight is None else weight.device

    def forward_passes(self, threat: PatchThreatModel | None = None, certify: bool = True) -> int:
        """Number of forward passes per image."""
        return 1

    def logits(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Compute the logits of images in [0, 1], differentiable.

        Raises:
            UsageError: the model does not return one logit per class.
        """
        logits = self.model(images)
        if logits.shape != (len(images), len(self.class_names)):
            raise UsageError(
                f"the model must give [batch, {len(self.class_names)}] logits for its class names, "
                f"got {list(logits.shape)}"
            )
        return logits

    def predict(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Int[Tensor, " batch"]:
        """Predict the class with the largest logit; ties go to the lowest index. `patch` has no influence."""
        if rule not in (None, RULE):
            raise UsageError(f"an undefended classifier has no rule {rule!r}; leave it out, or give {RULE!r}")
        self.model.eval()
        with torch.no_grad():
            parts = [self.logits(part.to(self.device)).float() for part in as_batch(images).split(_AT_ONCE)]
        return lowest_argmax(torch.cat(parts))

    def certify(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Certificate:
        """Compute the predictions; no image is certified and all margins are -1.

        `worst_placement` is the first admissible placement. The only rule is "none".
        """
        batch = as_batch(images)
        prediction = self.predict(batch, rule=rule)
        height, width = batch.shape[2:]
        threat = PatchThreatModel.parse(self.patch if patch is None else patch, (height, width), placements)
        shape = threat.maximal_shapes[0]
        top, left = threat.corners(shape)[0]
        first = torch.tensor([int(top), int(left), *shape], device=prediction.device)
        worst = first.expand(len(prediction), 1, 4).contiguous()
        none = torch.zeros_like(prediction, dtype=torch.bool)
        return Certificate(prediction, none, torch.full_like(prediction, -1), worst, RULE, threat)
