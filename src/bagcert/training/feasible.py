"""Check before training whether any image can be certified with a network's geometry, rule and patch."""

import torch

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules import Rule, get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from bagcert.training.recipe import Recipe

CERTIFIED_LOSSES = ("double-masking", "margin", "smooth-margin", "clipped", "masked-features")
"""Losses for certified region scorers. The others train networks for other kinds of defenses."""


def require_certifiable(recipe: Recipe, grid: RegionGrid, threat: PatchThreatModel) -> None:
    """Refuses a recipe whose model could never certify an image.

    Tests an ideal score map, in which every region votes for one class with the largest score.

    Raises:
        UsageError: even this map is not certified. The message names patch sizes that can be certified.
    """
    if recipe.loss.name not in CERTIFIED_LOSSES or recipe.augment.ablation != "none":
        return
    rule = get_rule(recipe.defense.rule)
    if _certifies(rule, grid, threat):
        return
    height, width = grid.image_size
    low, high = 0, min(height, width)
    while high - low > 1:  # the larger a square, the less can be certified
        middle = (low + high) // 2
        if _certifies(rule, grid, PatchThreatModel.parse(middle, grid.image_size)):
            low = middle
        else:
            high = middle
    hint = (
        f"squares of up to {low}x{low} px ({100 * low * low / (height * width):.1f}%) can be"
        if low
        else "no other patch can be either; choose a model.architecture with a smaller receptive field or stride"
    )
    seen = "x".join(map(str, grid.receptive_field)) + " px"
    raise UsageError(
        f"no image could ever be certified against the patch {threat} by {recipe.defense.rule}: in images of "
        f"{height}x{width} px, with regions that see {seen}, patches reach too many of the regions; {hint}"
    )


def _certifies(rule: Rule, grid: RegionGrid, threat: PatchThreatModel) -> bool:
    scores = torch.zeros(1, 2, *grid.map_size, dtype=torch.int16)
    scores[:, 0] = 1
    return bool(rule.certify(ScoreMap(scores, 0, 1, grid), threat).certified[0])
