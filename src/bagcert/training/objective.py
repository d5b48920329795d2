"""The objective of a recipe: augmentation of a batch, and one loss per image."""

from collections.abc import Callable

import torch
from torch import Tensor

from bagcert.defenses.derandomized_smoothing import ablate
from bagcert.errors import UsageError
from bagcert.nets.attention_pooling import attention_masking_loss
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import get_rule
from bagcert.scores import require_sum
from bagcert.threat import PatchThreatModel
from bagcert.training import losses
from bagcert.training.augment import (
    cutout,
    random_color,
    random_crop,
    random_flip,
    random_positions,
    random_resized_crop,
)
from bagcert.training.random import Source
from bagcert.training.recipe import Recipe

Objective = Callable[[Tensor, Tensor, Source, Tensor | None], Tensor]
"""(Real-valued scores, labels, random numbers, target probabilities or None for the labels) -> one loss per image."""


def make_objective(recipe: Recipe, scorer: RegionScorer, threat: PatchThreatModel, device: torch.device) -> Objective:
    """Returns the recipe's loss for the scores of this network."""
    loss = recipe.loss
    windows = scorer.grid().windows(threat)
    masked = loss.name == "masked-features" or scorer.readout is not None
    masks = losses.window_masks(windows, device) if masked else torch.empty(0)
    if scorer.readout is not None:
        if loss.name != "double-masking":
            raise UsageError(f"the attention-pooling head is trained with loss.name=double-masking, got {loss.name}")
        if not get_rule(recipe.defense.rule).pools:
            require_sum(scorer.readout, f"the rule {recipe.defense.rule}", "use double-masking or detection")
    binary = scorer.form if scorer.head == "binary" else None

    def objective(z: Tensor, labels: Tensor, generator: Source, targets: Tensor | None = None) -> Tensor:
        smoothing = loss.label_smoothing if targets is None else 0.0  # the targets are smoothed
        if scorer.readout is not None:
            return attention_masking_loss(scorer.readout, z, labels, masks, loss.full_weight, smoothing, targets)
        scores = z.float() if binary is None else binary.straight_through(z.float())
        if loss.name == "margin":
            value = losses.margin_loss(scores, labels, loss.margin)
        elif loss.name == "smooth-margin":
            value = losses.smooth_margin_loss(scores, labels, loss.margin, loss.temperature, smoothing, targets)
        elif loss.name in ("cross-entropy", "interval-bounds"):  # of the latter, the term of unchanged images
            value = losses.cross_entropy_loss(scores, labels, smoothing, targets)
        elif loss.name == "clipped":
            value = losses.clipped_loss(scores, labels, loss.temperature, loss.label_smoothing)
        elif loss.name == "masked-features":
            value = losses.masked_features_loss(scores, labels, masks, generator, loss.label_smoothing)
        else:
            temperature = 1.0 if binary is None else loss.temperature
            value = losses.double_masking_loss(
                scores, labels, windows, loss.full_weight, smoothing, temperature, targets
            )
        if loss.one_hot_penalty:
            value = value + loss.one_hot_penalty * losses.one_hot_penalty(scores)
        return value

    return objective


def network_input(
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    generator: Source,
    scorer: RegionScorer,
    objective: Objective,
    autocast: torch.autocast,
) -> Tensor:
    """Augments uint8 [batch, 3, height, width], scales it to [0, 1] and, if the recipe says so, ablates it."""
    batch = augment(images, recipe, generator)
    with autocast:
        batch = hardest_cutout(batch, labels, recipe, generator, scorer, objective)
    batch = batch.float() / 255
    if recipe.augment.ablation != "none":
        positions = random_positions(len(batch), (batch.shape[2], batch.shape[3]), generator)
        batch = ablate(batch, positions, recipe.augment.ablation, recipe.augment.ablation_size)
    return batch.contiguous(memory_format=torch.channels_last)


def augment(images: Tensor, recipe: Recipe, generator: Source) -> Tensor:
    """Applies the recipe's augmentation to uint8 [batch, 3, height, width]."""
    if recipe.augment.resized_crop:
        size = recipe.model.image_size or (images.shape[2], images.shape[3])
        images = random_resized_crop(images, size, recipe.augment.resized_crop, generator)
    if recipe.augment.crop:
        images = random_crop(images, recipe.augment.crop, generator, recipe.augment.crop_mode)
    if recipe.augment.flip:
        images = random_flip(images, generator)
    images = random_color(images, recipe.augment.color, generator)
    if recipe.augment.cutout and recipe.augment.cutout_candidates == 1:
        images = cutout(images, recipe.augment.cutout, generator)
    return images


@torch.no_grad()
def hardest_cutout(
    images: Tensor, labels: Tensor, recipe: Recipe, generator: Source, scorer: RegionScorer, objective: Objective
) -> Tensor:
    """Applies to each image the one of `cutout_candidates` random cutout squares with the largest loss.

    Source: the greedy worst-mask cutout of Saha et al., "Revisiting Image Classifier Training for Improved Certified
    Robust Defense against Adversarial Patches", TMLR 2023, with random candidates for their mask sets.
    """
    if not recipe.augment.cutout or recipe.augment.cutout_candidates == 1:
        return images
    scorer.eval()  # candidates must not update the batch statistics
    candidates, values = [], []
    for _ in range(recipe.augment.cutout_candidates):
        candidates.append(cutout(images, recipe.augment.cutout, generator))
        values.append(objective(scorer(candidates[-1].float() / 255), labels, generator, None))
    worst = torch.stack(values).argmax(0)
    return torch.stack(candidates)[worst, torch.arange(len(images), device=images.device)]
