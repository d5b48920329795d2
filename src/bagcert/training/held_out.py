"""Validation during training: accuracy of the deployed defense on held-out images."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from bagcert.defenses.derandomized_smoothing import DerandomizedSmoothing
from bagcert.nets.classifier import MeanScores
from bagcert.nets.heads import scale_of
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import get_rule
from bagcert.threat import PatchThreatModel
from bagcert.training.recipe import Recipe

__all__ = ["scale_of", "validate", "validation_scores"]


def validation_scores(scorer: RegionScorer, pixels: np.ndarray, batch: int = 250) -> Iterator[Tensor]:
    """Iterates over real-valued scores of uint8 [images, height, width, 3], batch by batch to limit memory."""
    return (scorer.real_scores(pixels[i : i + batch]) for i in range(0, len(pixels), batch))


def validate(
    scorer: RegionScorer, pixels: np.ndarray, labels: np.ndarray, recipe: Recipe, threat: PatchThreatModel
) -> dict[str, int | float]:
    """Measures clean and certified accuracy of the model on held-out images, with the recipe's rule."""
    pixels = pixels[: recipe.train.validate_images]
    if recipe.augment.ablation != "none":
        smoothing = DerandomizedSmoothing(
            MeanScores(scorer),
            scorer.class_names,
            threat.image_size,
            ablation=recipe.augment.ablation,
            size_px=recipe.augment.ablation_size,
        )
        certificates = [smoothing.certify(pixels, threat, rule=recipe.defense.rule)]
    else:
        if scorer.head == "fixed-point":
            scorer.scale = scale_of(validation_scores(scorer, pixels))
        rule = get_rule(recipe.defense.rule)
        certificates = [
            rule.certify(scorer.to_scores(z, threat.image_size), threat) for z in validation_scores(scorer, pixels)
        ]
    right = torch.cat([found.prediction.cpu() for found in certificates]) == torch.from_numpy(labels[: len(pixels)])
    certified = torch.cat([found.certified.cpu() for found in certificates])
    return {
        "validation_images": len(pixels),
        "clean_accuracy": right.float().mean().item(),
        "certified_accuracy": (right & certified).float().mean().item(),
    }
