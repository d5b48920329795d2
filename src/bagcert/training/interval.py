"""Interval bound training: the loss of the worst logits over all patch contents in a box.

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

GROWTH = 0.5  # share of all steps over which the boxes grow from points to all patch contents in [0, 1]


class BoundedLoss:
    """The loss `w * CE(z) + CE(worst logits)`. The caller computes the first term; this class bounds the second.

    Args:
        scorer: its network is a sequence of layers with bounds that ends with a 1x1 convolution.
        threat: in every step, each image gets one random attack of this threat.
        full_weight: w.

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
        """Computes one loss per image."""
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
        """Bounds the lead of each class's logit over the label's logit; differentiable.

        Args:
            size: 1 for all contents in [0, 1]; a smaller value shrinks the box around the image by that factor.
            labels: labels of the images. The column of the label is 0.
        """
        center = torch.where(hidden, images + size * (0.5 - images), images)
        box = Box(center, 0.5 * size * hidden.expand_as(images).to(images.dtype))
        for layer in self.layers:
            box = through(layer, box)
        lower = margin_bounds(box, self.last.weight[:, :, 0, 0], self.last.bias, labels)
        own = F.one_hot(labels, lower.shape[1]).bool()
        return -lower.masked_fill(own, 0)
