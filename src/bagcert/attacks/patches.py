"""Patches as tensors: pasting, placements, and the check that an attack stays inside its threat model.

Patches of several shapes have a common representation: contents [rows, patches, height, width, channels] of the size of
the largest shape, and placements [rows, patches, 4] of `[top, left, height, width]` in pixels. A smaller patch uses the
upper left part of its content.
"""

from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bagcert.threat import PatchThreatModel


def canvas_size(threat: PatchThreatModel) -> tuple[int, int]:
    """(height_px, width_px) large enough for every shape of the threat."""
    return max(h for h, _ in threat.shapes), max(w for _, w in threat.shapes)


@lru_cache(maxsize=16)
def every_placement(threat: PatchThreatModel) -> Int[Tensor, "placements 4"]:
    """All maximal placements of one patch, sorted by (shape, top, left)."""
    parts = []
    for shape in threat.maximal_shapes:
        corners = torch.as_tensor(threat.corners(shape))
        parts.append(torch.cat([corners, torch.tensor(shape).expand(len(corners), 2)], 1))
    return torch.cat(parts)


def nearest_placements(threat: PatchThreatModel, rectangles: Int[Tensor, "*rows 4"]) -> Int[Tensor, "*rows 4"]:
    """Replace each rectangle by the admissible placement with the nearest center; admissible placements are unchanged.

    Needed because certificates of pixel-masking defenses report masks, which are larger than patches.
    """
    shapes = torch.tensor(threat.maximal_shapes)
    flat = rectangles.reshape(-1, 4)
    foreign = ~(flat[:, None, 2:] == shapes).all(2).any(1) | (threat.allowed is not None)
    distinct, which = flat[foreign].unique(dim=0, return_inverse=True)
    places = every_placement(threat)
    middle, others = (torch.cat([2 * one[:, :2] + one[:, 2:], one[:, 2:]], 1).double() for one in (distinct, places))
    nearest = flat.clone()
    distances = torch.cdist(middle, others, compute_mode="donot_use_mm_for_euclid_dist")
    nearest[foreign] = places[distances.min(1).indices][which]
    return nearest.view_as(rectangles)


def random_placements(
    threat: PatchThreatModel, count: int, generator: torch.Generator
) -> Int[Tensor, "count patches 4"]:
    """Draw placements uniformly over all shapes and positions."""
    places = every_placement(threat)
    drawn = torch.randint(0, len(places), (count, threat.patches), generator=generator)
    return places[drawn]


def paste(images: Tensor, contents: Tensor, placements: Int[Tensor, "rows patches 4"]) -> Tensor:
    """Paste patches onto images [rows, height, width, channels]; later patches cover earlier ones.

    Differentiable with respect to `contents`. Parts of a patch outside the image are cut off.
    """
    height, width = images.shape[1:3]
    row = torch.arange(len(images), device=images.device)[:, None, None]
    for k in range(placements.shape[1]):
        top, left, tall, wide = placements[:, k].unbind(1)
        i = torch.arange(height, device=images.device)[None] - top[:, None]
        j = torch.arange(width, device=images.device)[None] - left[:, None]
        inside = ((i >= 0) & (i < tall[:, None]))[:, :, None] & ((j >= 0) & (j < wide[:, None]))[:, None, :]
        i, j = i.clamp(0, contents.shape[2] - 1), j.clamp(0, contents.shape[3] - 1)
        images = torch.where(inside[..., None], contents[row, k, i[:, :, None], j[:, None, :]], images)
    return images


def cut(images: Tensor, placements: Int[Tensor, "rows patches 4"], size: tuple[int, int]) -> Tensor:
    """Cut contents [rows, patches, *size, channels] out of images; pixels beyond the border are repeated."""
    row = torch.arange(len(images), device=images.device)[:, None, None, None]
    i = placements[:, :, 0, None] + torch.arange(size[0], device=images.device)
    j = placements[:, :, 1, None] + torch.arange(size[1], device=images.device)
    i, j = i.clamp(max=images.shape[1] - 1), j.clamp(max=images.shape[2] - 1)
    return images[row, i[:, :, :, None], j[:, :, None, :]]


def stays_inside(
    threat: PatchThreatModel, images: Tensor, patched: Tensor, placements: Int[Tensor, "rows patches 4"]
) -> Bool[Tensor, " rows"]:
    """Whether each patched image differs from its original only inside admissible placements of the threat.

    The check compares pixels directly and shares no code with `paste`, so that it is independent of it.
    """
    fine = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    if placements.shape[1] > threat.patches or images.shape != patched.shape or images.dtype != patched.dtype:
        return fine
    for row, patches in enumerate(placements.tolist()):
        differs = (images[row] != patched[row]).any(-1)
        for top, left, height, width in patches:
            if not threat.allows(top, left, height, width):
                break
            differs[top : top + height, left : left + width] = False
        else:
            fine[row] = not bool(differs.any())
    return fine
