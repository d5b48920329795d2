"""Training on interval bounds: the loss of the worst logits that a box of patch contents allows.

Source: Chiang et al., Certified Defenses for Adversarial Patches, ICLR 2020 (one random placement per image and step,
the cheapest of their variants); Gowal et al., 2018 (the clean term, and boxes that grow as training goes on).
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bagcert.defenses.interval_bounds import boxes_of
from bagcert.defenses.interval_layers import Box, flat_layers, margin_bounds, through
from bagcert.defenses.pixel_masks import covered
from bagcert.nets.classifier import in_sequence
from bagcert.nets.region_scorer import RegionScorer
from bagcert.threat import PatchThreatModel
from bagcert.training.random import Source, draw

GROWTH = 0.5
"""The share of all steps over which boxes grow from points to every content a patch may have."""


class BoundedLoss:
    """`w * CE(z) + CE(worst logits)`: the first term is the caller's, the second is bounded here.

    Args:
        scorer: its network is a sequence of layers with bounds, of which the last is a 1x1 convolution.
        threat: each image gets one attack of it in every step, at random.
        full_weight: w.
        device: of the images.

    Raises:
        UsageError: a network of another kind, or a threat with more than 20,000 attacks.
    """

    def __init__(
        self, scorer: RegionScorer, threat: PatchThreatModel, full_weight: float, device: torch.device
    ) -> None:
        *self.layers, _ = flat_layers(in_sequence(scorer))
        last = list(scorer.net.children())[-1]  # itself: the sequence has a copy of its weights
        assert isinstance(last, nn.Conv2d)
        self.last = last
        self.full_weight = full_weight
        self.boxes = boxes_of(threat).to(device)

    def __call__(
        self,
        clean: Float[Tensor, " batch"],
        images: Float[Tensor, "batch channels height width"],
        labels: Int[Tensor, " batch"],
        share: float,
        generator: Source,
    ) -> Float[Tensor, " batch"]:
        """One loss per image.

        Args:
            clean: the loss of the unchanged images.
            images: in [0, 1].
            labels: their classes.
            share: of all steps that are done, from 0 to 1.
            generator: chooses the attacks.
        """
        chosen = draw(len(self.boxes), len(images), generator)
        hidden = covered(self.boxes[chosen], (images.shape[2], images.shape[3]))[:, None]
        worst = self.worst_logits(images, hidden, min(1.0, share / GROWTH), labels)
        bounded = F.cross_entropy(worst.float(), labels, reduction="none")
        return self.full_weight * clean + bounded

    def worst_logits(
        self,
        images: Float[Tensor, "batch channels height width"],
        hidden: Bool[Tensor, "batch 1 height width"],
        size: float,
        labels: Int[Tensor, " batch"],
    ) -> Float[Tensor, "batch classes"]:
        """For each class, how far its logit can get ahead of the label's; differentiable.

        Args:
            images: in [0, 1].
            hidden: the pixels under a patch.
            size: 1 for every content in [0, 1]; less for contents that lie nearer to the image by that factor.
            labels: of the images; each has 0 in its own column.
        """
        center = torch.where(hidden, images + size * (0.5 - images), images)
        box = Box(center, 0.5 * size * hidden.expand_as(images).to(images.dtype))
        for layer in self.layers:
            box = through(layer, box)
        lower = margin_bounds(box, self.last.weight[:, :, 0, 0], self.last.bias, labels)
        own = F.one_hot(labels, lower.shape[1]).bool()
        return -lower.masked_fill(own, 0)
