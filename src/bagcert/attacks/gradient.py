"""Gradient attack: optimizes the content of the patch at the most promising placements, with restarts.

The optimizer is Adam on the pixels of the patch with a cosine schedule, projected to valid uint8 values. The loss is
computed from the integer score map with straight-through gradients; see `bagcert.attacks.objectives`.

Source: Madry et al., ICLR 2018 (PGD); Kingma & Ba, ICLR 2015 (Adam); docs/method.md, "Double masking".
"""

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from bagcert.attacks.candidates import Candidates, candidates
from bagcert.attacks.objectives import UNTARGETED, Kind, kinds_for, objective
from bagcert.attacks.patches import canvas_size
from bagcert.attacks.settings import OnProgress, Settings
from bagcert.attacks.surrogate import Surrogate, surrogate_of, whole_pixels
from bagcert.attacks.victim import Victim

CHECK_EVERY = 5  # steps between two evaluations of the rule
REMEMBERED = 8  # contents per batch of rows stored for transfer

_FIRST_STEP, _LAST_STEP = 40.0, 1.0  # step sizes in pixel values from 0 to 255
_DECAY, _SQUARE_DECAY = 0.8, 0.9


def gradient(victim: Victim, settings: Settings, generator: torch.Generator, progress: OnProgress) -> None:
    """Attack every unbroken image at its candidate placements, with restarts.

    Restarts differ in the initial content, the target class and, for double masking, the round that is attacked.
    """
    surrogate = surrogate_of(victim)
    found = candidates(victim, surrogate, settings.placements, generator)
    kinds = kinds_for(victim.rule)
    for restart in range(settings.restarts):
        kind, rank = kinds[restart % len(kinds)], restart // len(kinds)
        image = victim.open
        which = torch.arange(len(found)).repeat_interleave(len(image))
        image = image.repeat(len(found))  # first candidate of all images, then second candidate, ...
        for start in range(0, len(image), settings.rows):
            some = slice(start, start + settings.rows)
            rows = _Rows.start(victim, surrogate, found, image[some], which[some], kind, rank, generator)
            _ascend(victim, surrogate, rows, kind, settings.steps)
            progress((restart + min(1.0, some.stop / len(image))) / settings.restarts)


@dataclass
class _Rows:
    """State of the optimization, one row per patched image.

    `image` and `placement` are on the CPU, all other tensors on the device of the network.

    Attributes:
        contents: float [rows, patches, height, width, channels] in [0, 255].
        kept: integer-valued contents with that loss.
    """

    image: Tensor
    placement: Tensor
    rival: Tensor
    left_out: Tensor
    contents: Tensor
    mean: Tensor
    square: Tensor
    best: Tensor
    kept: Tensor

    @classmethod
    def start(
        cls,
        victim: Victim,
        surrogate: Surrogate,
        found: Candidates,
        image: Tensor,
        which: Tensor,
        kind: Kind,
        rank: int,
        generator: torch.Generator,
    ) -> "_Rows":
        """Initialize random contents for the images that are not broken yet."""
        open_ = ~victim.broken[image]
        image, which = image[open_], which[open_]
        # With the plain sum the first restart is untargeted; all other objectives need a target class.
        nearest = min(max(rank - (kind == "sum"), 0), found.rival.shape[2] - 1)
        rival = found.rival[image, which, nearest]
        if kind == "sum" and rank == 0:
            rival = torch.full_like(rival, UNTARGETED)
        size = (len(image), victim.threat.patches, *canvas_size(victim.threat), victim.images.shape[3])
        device = surrogate.device
        contents = (torch.rand(size, generator=generator) * 255).to(device)
        zeros = torch.zeros_like(contents)
        best = torch.full((len(image),), torch.inf, device=device)
        left_out = found.left_out[image, which, nearest].to(device)
        placement = found.placement[image, which]
        return cls(image, placement, rival.to(device), left_out, contents, zeros, zeros, best, contents.round())

    def __len__(self) -> int:
        return len(self.image)

    def __getitem__(self, rows: Tensor) -> "_Rows":
        tensors = (getattr(self, part.name) for part in fields(self))
        return _Rows(*(tensor[rows.to(tensor.device)] for tensor in tensors))

    def pixels(self) -> Tensor:
        """The best contents so far as uint8."""
        return self.kept.round().clamp(0, 255).to(torch.uint8).cpu()


def _ascend(victim: Victim, surrogate: Surrogate, rows: _Rows, kind: Kind, steps: int) -> None:
    """Optimize every row; a row is dropped when its image is broken."""
    for step in range(steps + 1):
        if not len(rows):
            return
        at, place = rows.image.to(surrogate.device), rows.placement.to(surrogate.device)
        contents = rows.contents.requires_grad_()
        maps = surrogate.maps(at, contents, place)
        label = victim.prediction.to(surrogate.device)[at]
        loss = objective(kind, maps, label, rows.rival, surrogate.windows, rows.left_out, surrogate.class_scores)
        (slope,) = torch.autograd.grad(loss.sum(), contents)
        rows.contents = contents.detach()
        better = loss.detach() < rows.best
        changed = torch.zeros_like(better)
        if step % CHECK_EVERY == 0 or step == steps:
            victim.count(rows.image)
            changed = surrogate.changed(at, maps)
        better |= changed
        rows.best = torch.where(better, loss.detach(), rows.best)
        rows.kept = torch.where(better[:, None, None, None, None], whole_pixels(rows.contents), rows.kept)
        if bool(changed.any()):
            done = rows[changed.cpu()]
            broken = victim.submit("gradient", done.image, done.pixels(), done.placement, counted=True)
            victim.remember(done.pixels()[broken][:REMEMBERED])
            rest = ~victim.broken[rows.image]
            rows, slope = rows[rest], slope[rest.to(slope.device)]
        if step < steps:
            _step(rows, slope, step + 1, steps)
    # Submit also the rows that failed on the surrogate: success is judged only by the defense itself.
    victim.submit("gradient", rows.image, rows.pixels(), rows.placement, counted=True)
    if not victim.library:
        victim.remember(rows[rows.best.argsort()[:REMEMBERED].cpu()].pixels())


def _step(rows: _Rows, slope: Tensor, number: int, steps: int) -> None:
    """Apply one Adam step in place; `number` starts at 1."""
    size = _LAST_STEP + (_FIRST_STEP - _LAST_STEP) * (1 + math.cos(math.pi * number / steps)) / 2
    rows.mean = _DECAY * rows.mean + (1 - _DECAY) * slope
    rows.square = _SQUARE_DECAY * rows.square + (1 - _SQUARE_DECAY) * slope**2
    mean = rows.mean / (1 - _DECAY**number)
    square = rows.square / (1 - _SQUARE_DECAY**number)
    rows.contents = (rows.contents - size * mean / (square.sqrt() + 1e-12)).clamp(0, 255)
