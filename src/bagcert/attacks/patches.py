"""Patches as tensors: pasting them, drawing placements, and checking that an attack stayed inside its threat model.

Several patches of several shapes share one form: contents [rows, patches, height, width, channels] on a canvas of the
largest shape, and placements [rows, patches, 4] of `[top, left, height, width]` in pixels, of which each content uses
its upper left part.
"""

from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bagcert.threat import PatchThreatModel


def canvas_size(threat: PatchThreatModel) -> tuple[int, int]:
    """(height_px, width_px) that holds every shape of the threat."""
    return max(h for h, _ in threat.shapes), max(w for _, w in threat.shapes)


def every_placement(threat: PatchThreatModel) -> Int[Tensor, "placements 4"]:
    """All maximal placements of one patch, the last row and column included, in the order (shape, top, left)."""
    return _every_placement(threat)


def nearest_placements(threat: PatchThreatModel, rectangles: Int[Tensor, "*rows 4"]) -> Int[Tensor, "*rows 4"]:
    """The admissible placement nearest to the middle of each rectangle: itself where it is one.

    Certificates of masking on pixels name masks, which are larger than patches.
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
    """Placements drawn with equal chances for every shape and position."""
    places = every_placement(threat)
    drawn = torch.randint(0, len(places), (count, threat.patches), generator=generator)
    return places[drawn]


def paste(images: Tensor, contents: Tensor, placements: Int[Tensor, "rows patches 4"]) -> Tensor:
    """Images [rows, height, width, channels] with each row's patches on them; a later patch covers an earlier one.

    Differentiable in `contents`. A placement may stick out of the image; what sticks out is cut off.
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
    """What the images show at the placements: contents [rows, patches, *size, channels]; beyond the border repeated."""
    row = torch.arange(len(images), device=images.device)[:, None, None, None]
    i = placements[:, :, 0, None] + torch.arange(size[0], device=images.device)
    j = placements[:, :, 1, None] + torch.arange(size[1], device=images.device)
    i, j = i.clamp(max=images.shape[1] - 1), j.clamp(max=images.shape[2] - 1)
    return images[row, i[:, :, :, None], j[:, :, None, :]]


def stays_inside(
    threat: PatchThreatModel, images: Tensor, patched: Tensor, placements: Int[Tensor, "rows patches 4"]
) -> Bool[Tensor, " rows"]:
    """Does each patched image differ from its original only inside admissible placements of the threat?

    Looked at pixel by pixel and shared with nothing that pastes, so that it may be believed.
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


@lru_cache(maxsize=16)
def _every_placement(threat: PatchThreatModel) -> Tensor:
    parts = []
    for shape in threat.maximal_shapes:
        corners = torch.as_tensor(threat.corners(shape))
        parts.append(torch.cat([corners, torch.tensor(shape).expand(len(corners), 2)], 1))
    return torch.cat(parts)
