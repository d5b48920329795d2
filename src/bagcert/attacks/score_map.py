"""Score-map attack: a greedy search without gradients that composes the content of the patch cell by cell.

Contents come from a pool of extreme and random contents and of pieces of other images with high scores of the target
class. The search starts with the best content of the pool and then replaces each cell by the best cell of the pool. It
covers cases in which gradients are not informative, such as binary heads and losses with plateaus.
"""

import torch
from torch import Tensor

from bagcert.attacks.candidates import Candidates, candidates
from bagcert.attacks.objectives import UNTARGETED, Kind, kinds_for, objective
from bagcert.attacks.patches import canvas_size, cut, random_placements
from bagcert.attacks.random_content import draw_contents
from bagcert.attacks.settings import OnProgress, Settings
from bagcert.attacks.surrogate import Surrogate, surrogate_of
from bagcert.attacks.victim import Victim

POOL = 24
_DRAWN = 12  # drawn contents in the pool; the others are pieces of images
_PIECES = 64  # number of pieces of images from which the pool is chosen
_CELLS = 3  # maximum number of cells along each side of the patch


def score_map(victim: Victim, settings: Settings, generator: torch.Generator, progress: OnProgress) -> None:
    """Attack every unbroken image at a quarter of the candidate placements, for each objective."""
    surrogate = surrogate_of(victim)
    count = None if settings.placements is None else max(1, settings.placements // 4)
    found = candidates(victim, surrogate, count, generator)
    rows = max(1, settings.rows // POOL)
    kinds = kinds_for(victim.rule)
    work = [(kind, which) for kind in kinds for which in range(len(found))]
    for number, (kind, which) in enumerate(work):
        open_ = victim.open
        for start in range(0, len(open_), rows):
            _greedy(victim, surrogate, found, open_[start : start + rows], which, kind, generator)
        progress((number + 1) / len(work))


def _greedy(
    victim: Victim,
    surrogate: Surrogate,
    found: Candidates,
    image: Tensor,
    which: int,
    kind: Kind,
    generator: torch.Generator,
) -> None:
    """Attack one placement of several images, evaluating all contents of the pool at once."""
    device = surrogate.device
    placement = found.placement[image, which]
    rival = found.rival[image, which, 0]
    pool = _pool(victim, surrogate, rival, generator)  # [images, POOL, patches, height, width, channels]
    many = image.repeat_interleave(POOL).to(device)
    places = placement.repeat_interleave(POOL, 0).to(device)
    label = victim.prediction.to(device)[many]
    wanted = rival.repeat_interleave(POOL).to(device)
    wanted = torch.full_like(wanted, UNTARGETED) if kind == "sum" else wanted
    left_out = found.left_out[image, which, 0].repeat_interleave(POOL).to(device)

    def best(contents: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest loss of each image and the index of its content; contents that change the prediction win."""
        with torch.no_grad():
            maps = surrogate.maps(many, contents.flatten(0, 1).float().to(device), places)
            loss = objective(kind, maps, label, wanted, surrogate.windows, left_out, surrogate.class_scores).cpu()
        loss = loss - 1e9 * surrogate.changed(many, maps).cpu()
        victim.count(many.cpu())
        return loss.unflatten(0, (len(image), POOL)).min(1)

    every = torch.arange(len(image))
    loss, at = best(pool)
    chosen = pool[every, at]
    for cell in _cells(placement[:, 0, 2:].amax(0).tolist()):
        trial = chosen[:, None].repeat(1, POOL, 1, 1, 1, 1)
        trial[:, :, :, cell[0], cell[1]] = pool[:, :, :, cell[0], cell[1]]
        lower, at = best(trial)
        better = lower < loss
        chosen[better] = trial[every, at][better]
        loss = torch.minimum(loss, lower)
    victim.submit("score-map", image, chosen, placement, counted=True)
    victim.remember(chosen[victim.broken[image]])


def _cells(shape: list[int]) -> list[tuple[slice, slice]]:
    """Divide the patch into at most _CELLS x _CELLS cells."""
    sides = []
    for side in shape:
        step = -(-side // _CELLS)
        sides.append([slice(start, start + step) for start in range(0, side, step)])
    return [(rows, cols) for rows in sides[0] for cols in sides[1]]


def _pool(victim: Victim, surrogate: Surrogate, rival: Tensor, generator: torch.Generator) -> Tensor:
    """Create a pool [images, POOL, patches, height, width, channels] of extreme and random contents and pieces."""
    threat, size = victim.threat, canvas_size(victim.threat)
    batch, channels = len(rival), victim.images.shape[3]
    kinds = torch.arange(_DRAWN).repeat(batch)
    drawn = draw_contents(kinds, threat.patches, size, channels, generator).unflatten(0, (batch, _DRAWN))
    # Among random pieces of the batch, those with the largest lead of the target class are chosen.
    other = torch.randint(0, len(victim), (_PIECES,), generator=generator)
    places = random_placements(threat, _PIECES, generator)
    rows, cols = surrogate.clean.shape[2:]
    height, width = threat.image_size
    top, left = places[:, 0, 0] + places[:, 0, 2] // 2, places[:, 0, 1] + places[:, 0, 3] // 2
    here = surrogate.clean.cpu()[other, :, top * rows // height, left * cols // width]
    with torch.no_grad():
        here = surrogate.class_scores(here.to(surrogate.device)).cpu()  # [pieces, classes], scores of that region only
    here = here - here.mean(1, keepdim=True)
    chosen = here[:, rival].topk(POOL - _DRAWN, dim=0).indices.T  # [images, chosen pieces]
    pieces = cut(victim.images[other], places, size)
    return torch.cat([drawn, pieces[chosen]], 1)
