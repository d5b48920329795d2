"""Interval bound propagation against patches: bounds on the logits of a small network.

Source: Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020; Gowal et al., 2018 (the last layer merged
into the difference of classes).

Guarantee: recovery. If the lower bound of z_y - z_c is positive for every other class c and every placement of the
patch, no patch content changes the prediction y. The bound is incomplete: an image that is not certified may be robust.

Differences from the publication: every placement is bounded, including the last row and column; several patches and
shapes are supported; rounding errors are included (`bagcert.defenses.interval_layers`). Training of such networks is in
`bagcert.training.interval`.
"""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bagcert.certificate import Certificate
from bagcert.data.photo import Images
from bagcert.defenses.base import Placements
from bagcert.defenses.interval_layers import Box, flat_layers, last_layer, margin_bounds, through
from bagcert.defenses.pixel_defense import PixelDefense
from bagcert.defenses.pixel_masks import covered, unions
from bagcert.errors import UsageError
from bagcert.scores import exact_arithmetic, lowest_argmax
from bagcert.threat import PatchLike, PatchThreatModel

RULE = "interval-bounds"
MOST_BOXES = 20_000
UNITS_PER_LOGIT = 1000
_LIMIT = 2**53  # limit of margins; float64 represents every integer up to it


class IntervalBounds(PixelDefense):
    """Certified defense that bounds the activations of a small network for each placement of the patch.

    The network is copied to float64, where the rounding error of a prediction is far below the error included in the
    bound. After further training, create a new `IntervalBounds`.

    Args:
        model: `nn.Sequential` of Conv2d, Linear, ReLU, Flatten, AvgPool2d, BatchNorm2d and the package's `Normalize`
            (Identity and Dropout have no effect), mapping images [batch, 3, height, width] in [0, 1] to logits.
        class_names, image_size, patch, name: as for `PixelDefense`.
        batch_size: number of boxes propagated at once.

    Raises:
        UsageError: as for `PixelDefense`, or a layer cannot be bounded or has hooks.

    >>> model = nn.Sequential(nn.AvgPool2d(8), nn.Flatten())
    >>> defense = IntervalBounds(model, ("red", "green", "blue"), (8, 8), patch=2)
    >>> image = torch.tensor([0, 51, 0], dtype=torch.uint8).expand(1, 8, 8, 3)
    >>> defense.certify(image).margin.tolist()  # 0.2 * 60 / 64 - 4 / 64 logits, less a little for rounding
    [124]
    """

    rule = RULE
    guarantee = "recovery"

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        image_size: tuple[int, int],
        *,
        patch: PatchLike = 5,
        name: str = "interval-bounds",
        batch_size: int = 256,
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, got {batch_size}")
        flat_layers(model)
        weight = next(model.parameters(), None)
        home = "cpu" if weight is None or weight.device.type == "mps" else weight.device  # mps does not support float64
        exact = deepcopy(model).to(home, torch.float64)
        super().__init__(exact, class_names, image_size, patch=patch, name=name)
        self.layers = flat_layers(exact)
        self.batch_size = batch_size
        boxes_of(self.deployed_threat())

    def forward_passes(self, threat: PatchThreatModel, certify: bool) -> int:
        """Number of passes per image: one to predict, plus one per placement to certify (each about three passes)."""
        return 1 + (len(boxes_of(threat)) if certify else 0)

    def predict(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Int[Tensor, " batch"]:
        """Predict the class with the largest float64 logit; ties go to the lowest index. `patch` has no influence."""
        batch, _ = self.check_inputs(images, patch, rule, placements)
        return self._labels(batch)

    def certify(
        self,
        images: Images,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: Placements = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Certificate:
        """Compute prediction and certificate of each image.

        The margin is floor(1000 * b) with b the smallest lower bound of z_y - z_c. It is at least 0 if b is positive
        (certified) and at most -1 otherwise. `worst_placement` is the first placement with the smallest bound,
        [batch, K, 4] for K patches. At most 20,000 placements or unions of placements are supported. `on_progress` is
        called with (number of propagated boxes, total number of boxes) over all images.
        """
        batch, threat = self.check_inputs(images, patch, rule, placements)
        label = self._labels(batch)
        boxes = boxes_of(threat).to(batch.device)
        total = len(batch) * len(boxes)
        bounds = torch.empty(total, dtype=torch.float64, device=batch.device)
        with exact_arithmetic(batch.device):
            for some in torch.arange(total, device=batch.device).split(self.batch_size):
                image, box = some // len(boxes), some % len(boxes)
                bounds[some] = self._lower_bounds(batch[image], boxes[box], label[image])
                on_progress(int(some[-1]) + 1, total)
        least, at = (-bounds.unflatten(0, (len(batch), len(boxes)))).max(1)  # ties go to the first placement
        units = torch.floor(-least * UNITS_PER_LOGIT).clamp(-_LIMIT, _LIMIT).long()
        certified = least < 0
        margin = torch.where(certified, units.clamp(min=0), units.clamp(max=-1))
        return Certificate(label, certified, margin, boxes[at], RULE, threat)

    def check_inputs(
        self, images: Images, patch: PatchLike | None, rule: str | None, placements: Placements
    ) -> tuple[Float[Tensor, "batch 3 height width"], PatchThreatModel]:
        """Convert the arguments of `certify` as for all pixel defenses, with images in float64."""
        flat_layers(self.classifier.model)  # hooks may have been added since construction
        batch, threat = super().check_inputs(images, patch, rule, placements)
        return batch.double(), threat

    def _labels(self, batch: Float[Tensor, "batch 3 height width"]) -> Int[Tensor, " batch"]:
        self.classifier.model.eval()
        try:
            with exact_arithmetic(batch.device):
                return torch.cat([lowest_argmax(self.classifier.logits(some)) for some in batch.split(self.batch_size)])
        except RuntimeError as error:
            size = tuple(batch.shape[2:])
            if size == self.image_size:
                raise
            meant = "x".join(map(str, self.image_size))
            raise UsageError(f"the network is for images of {meant} px, got {size[0]}x{size[1]} px: {error}") from error

    def _lower_bounds(
        self,
        images: Float[Tensor, "rows 3 height width"],
        boxes: Int[Tensor, "rows patches 4"],
        label: Int[Tensor, " rows"],
    ) -> Float[Tensor, " rows"]:
        """Lower bounds of z_y - z_c over all other classes c and all contents of the patches."""
        hidden = covered(boxes, (images.shape[2], images.shape[3]))[:, None]
        box = Box(images.masked_fill(hidden, 0.5), 0.5 * hidden.expand_as(images).double())
        layers, last = last_layer(self.layers)
        for layer in layers:
            box = through(layer, box)
        weight, bias = (None, None) if last is None else (last.weight, last.bias)
        return margin_bounds(box, weight, bias, label).amin(1)


def boxes_of(threat: PatchThreatModel) -> Int[Tensor, "boxes patches 4"]:
    """All placements of the patches of a threat, each `[top, left, height, width]` in pixels.

    Raises:
        UsageError: there are more than 20,000.
    """
    rectangles: list[tuple[int, ...]] = []
    for shape in threat.maximal_shapes:
        rectangles += [(top, left, *shape) for top, left in threat.corners(shape).tolist()]
    return unions(rectangles, threat.patches, MOST_BOXES, "interval bounds need few placements and few patches")
