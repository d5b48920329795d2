"""Candidate placements and target classes for attacks, ranked by the margins of the certificate.

Let m be a window that contains all regions a patch reaches, and c a target class. The attacker cannot change the lead
of y over c outside m, and the possible gain grows with the number of regions inside m. Against double masking, an
attack at m can succeed only if c leads y outside m and some second mask m', so such pairs come first.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from bagcert.attacks.patches import every_placement, random_placements
from bagcert.attacks.surrogate import PlainSurrogate, Surrogate
from bagcert.attacks.victim import Victim
from bagcert.rules.masks import CHUNK_ELEMENTS, Windows

RIVALS = 3
_HOPELESS = 1e9  # added to the sort key of candidates that cannot succeed


@dataclass(frozen=True)
class Candidates:
    """Placements to attack on each image, most promising first.

    Attributes:
        placement: int64 [batch, candidates, patches, 4], `[top, left, height, width]` in pixels.
        rival: int64 [batch, candidates, rivals], target classes, most promising first.
        left_out: int64 [batch, candidates, rivals], window index of the second mask of double masking that favors each
            target class most; -1 if there is none.
    """

    placement: Int[Tensor, "batch candidates patches 4"]
    rival: Int[Tensor, "batch candidates rivals"]
    left_out: Int[Tensor, "batch candidates rivals"]

    def __len__(self) -> int:
        """Number of candidates per image."""
        return self.placement.shape[1]


def candidates(victim: Victim, surrogate: Surrogate, count: int | None, generator: torch.Generator) -> Candidates:
    """Choose `count` candidates per image, or every placement if `count` is None.

    If `count` is at least four, the worst placement of the certificate comes first (both windows for double masking),
    and the last quarter is drawn at random, so that an error in the ranking cannot exclude a placement.
    """
    if count is None or count < 4:
        return _ranked(victim, surrogate, count, generator)
    patches = victim.threat.patches
    worst = victim.worst_placement
    worst = worst[:, : worst.shape[1] // patches * patches].unflatten(1, (-1, patches))[:, :2]
    drawn = count // 4
    ranked = _ranked(victim, surrogate, count - drawn - worst.shape[1], generator)
    anywhere = random_placements(victim.threat, len(victim) * drawn, generator).unflatten(0, (len(victim), drawn))
    # Use the classes and masks of the best placement for placements without a ranking.
    at = torch.tensor([0] * worst.shape[1] + list(range(len(ranked))) + [0] * drawn)
    return Candidates(torch.cat([worst, ranked.placement, anywhere], 1), ranked.rival[:, at], ranked.left_out[:, at])


def _ranked(victim: Victim, surrogate: Surrogate, count: int | None, generator: torch.Generator) -> Candidates:
    if surrogate.windows is None:
        assert isinstance(surrogate, PlainSurrogate)
        return _by_saliency(victim, surrogate, count)
    parts = []
    windows = surrogate.windows
    each = surrogate.clean.shape[1] * max(len(windows), surrogate.clean[0, 0].numel())
    for some in torch.arange(len(victim)).split(max(1, CHUNK_ELEMENTS // each)):
        parts.append(_by_windows(victim, surrogate, windows, some, count, generator))
    return Candidates(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


def _by_windows(
    victim: Victim, surrogate: Surrogate, windows: Windows, some: Tensor, count: int | None, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    label = victim.prediction[some].to(surrogate.device)
    maps = surrogate.clean[some.to(surrogate.device)]
    own = torch.arange(len(label), device=label.device)
    with torch.no_grad():
        outside = _leads_outside(surrogate, windows, maps, label)
        alone = surrogate.class_scores(maps.flatten(2).mT).mT  # [images, classes, regions]
    gain = (alone[own, label][:, None] - alone).abs().flatten(1).quantile(0.98, dim=1)  # typical gain from one region
    if surrogate.pools:  # a pooled score depends on the mean over regions
        gain = gain / alone.shape[2]
    key = outside - gain[:, None, None] * windows.sizes
    left_out = torch.full_like(key, -1, dtype=torch.int64)
    if victim.rule == "double-masking":
        with torch.no_grad():
            pair, left_out = _worst_partner(surrogate, windows, maps, label)
        key = key + _HOPELESS * (pair > 0)
    elif victim.rule == "detection":
        key = key + _HOPELESS * (outside > 0)
    key[own, label] = torch.inf
    key = windows.without_gaps(key, torch.inf)
    best, rivals = key.sort(dim=1, stable=True)
    rivals, best = rivals[:, : min(RIVALS, outside.shape[1] - 1)], best[:, 0]
    order = best.argsort(dim=1, stable=True)[:, : int(windows.keep.sum())]
    placement = windows.placements.cpu()[order.cpu()]
    if count is None:
        # All placements, with the classes and masks of the best window.
        places = every_placement(victim.threat)
        placement = places[None].expand(len(label), -1, -1)
        order = order[:, :1].expand(-1, len(places))
    else:
        order = order[:, torch.arange(count) % order.shape[1]]
        placement = placement[:, torch.arange(count) % placement.shape[1]]
    rival = rivals.gather(2, order[:, None].expand(-1, rivals.shape[1], -1))
    mask = left_out.gather(1, rivals).gather(2, order[:, None].expand(-1, rivals.shape[1], -1))
    return _with_others(victim, placement, generator), rival.transpose(1, 2).cpu(), mask.transpose(1, 2).cpu()


def _leads_outside(surrogate: Surrogate, windows: Windows, maps: Tensor, label: Tensor) -> Tensor:
    """Lead of the label over each class outside each window, [images, classes, windows]."""
    sums = maps.sum((2, 3))[..., None] - windows.sums(maps)
    scores = surrogate.class_scores(sums.mT).mT
    return scores[torch.arange(len(label), device=label.device), label][:, None] - scores


def _worst_partner(surrogate: Surrogate, windows: Windows, maps: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
    """For each class and window m, the smallest lead outside m and a second window, and the index of that window."""
    least, partner = [], []
    for mask in windows.masks:
        leads = _leads_outside(surrogate, windows, maps * ~mask, label)
        smallest, at = windows.without_gaps(leads, torch.inf).min(2)
        least.append(smallest)
        partner.append(at)
    return torch.stack(least, 2), torch.stack(partner, 2)


def _by_saliency(victim: Victim, surrogate: PlainSurrogate, count: int | None) -> Candidates:
    """Rank placements by the sum of the absolute gradient that they cover."""
    saliency = surrogate.saliency().cpu().double()
    integral = torch.nn.functional.pad(saliency.cumsum(1).cumsum(2), (1, 0, 1, 0))
    places = every_placement(victim.threat)
    top, left, bottom, right = places[:, 0], places[:, 1], places[:, 0] + places[:, 2], places[:, 1] + places[:, 3]
    covered = integral[:, bottom, right] - integral[:, top, right] - integral[:, bottom, left] + integral[:, top, left]
    order = covered.argsort(dim=1, descending=True, stable=True)
    if count is not None:
        order = order[:, torch.arange(count) % order.shape[1]]
    logits = surrogate.clean[:, :, 0, 0].cpu().scatter(1, victim.prediction[:, None], -torch.inf)
    rival = logits.argsort(dim=1, descending=True, stable=True)[:, : min(RIVALS, logits.shape[1] - 1)]
    rival = rival[:, None].repeat(1, order.shape[1], 1)
    placement = _with_others(victim, places[order], torch.Generator().manual_seed(0))
    return Candidates(placement, rival, torch.full_like(rival, -1))


def _with_others(victim: Victim, placement: Tensor, generator: torch.Generator) -> Tensor:
    """Combine each candidate with random other candidates of the image for several patches.

    Returns [batch, candidates, patches, 4].
    """
    patches = victim.threat.patches
    count = placement.shape[1]
    parts = [placement]
    for _ in range(patches - 1):
        parts.append(placement[:, torch.randint(0, count, (count,), generator=generator)])
    return torch.stack(parts, 2)
