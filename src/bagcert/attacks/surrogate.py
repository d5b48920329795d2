"""What white-box attacks see of a defence: score maps of patched images, exact forward, with gradients backward.

A patch moves only the scores of the regions that see it, so where the network is translation-equivariant at its
stride the attack runs it on a crop around the patch and puts the result into the clean map. That is measured when the
surrogate is made, and left out where it does not hold. Nothing here decides success: the front door does.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.attacks.patches import paste, random_placements
from bagcert.attacks.victim import Victim
from bagcert.defenses.bagcert import BagCert
from bagcert.defenses.base import Defense
from bagcert.defenses.undefended import Undefended
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import get_rule
from bagcert.rules.masks import Windows
from bagcert.scores import lowest_argmax
from bagcert.threat import PatchThreatModel

WORTH_CROPPING = 0.8  # of the image's area; a larger crop saves too little


@runtime_checkable
class Surrogate(Protocol):
    """Score maps of patched images of a victim.

    Attributes:
        device: where maps are.
        clean: maps [batch, channels, rows, cols] of the images without a patch; a channel for each class, or what a
            readout pools.
        windows: those of the threat, or None where every patch reaches everything.
        pools: whether class scores are made from sums over regions by a readout; otherwise they are these sums.
    """

    device: torch.device
    clean: Tensor
    windows: Windows | None
    pools: bool

    def maps(self, image: Tensor, contents: Tensor, placements: Tensor) -> Tensor:
        """Maps [rows, channels, map rows, map cols] of images with contents in [0, 255], differentiable in those."""

    def class_scores(self, sums: Tensor) -> Tensor:
        """Class scores [*batch, classes] from sums [*batch, channels] over kept regions, differentiable."""

    def changed(self, image: Tensor, maps: Tensor) -> Tensor:
        """What the rule makes of such maps: boolean [rows], is it another answer than the clean one?"""


def surrogate_of(victim: Victim) -> Surrogate:
    """The surrogate of a victim's defence.

    Raises:
        UsageError: no gradients are known of this kind of defence.
    """
    defense: Defense = victim.defense
    if isinstance(defense, BagCert):
        return LocalSurrogate(victim, defense)
    if isinstance(defense, Undefended):
        return PlainSurrogate(victim, defense)
    raise UsageError(
        f"white-box attacks know BagCert and Undefended defences, got {type(defense).__name__}; use the random attack"
    )


def whole_pixels(contents: Tensor) -> Tensor:
    """Contents rounded to what a uint8 image can hold, with the gradient of the identity."""
    return contents + (contents.round().clamp(0, 255) - contents).detach()


class PlainSurrogate:
    """An ordinary classifier as a map of one region: its logits."""

    pools = False

    def __init__(self, victim: Victim, defense: Undefended) -> None:
        self.device = defense.device
        self.windows: Windows | None = None
        self._defense = defense
        self._images = victim.images.to(self.device)
        self._prediction = victim.prediction.to(self.device)
        with torch.no_grad():
            self.clean = torch.cat([self._logits(part.float()) for part in self._images.split(256)])

    def maps(self, image: Tensor, contents: Tensor, placements: Tensor) -> Tensor:
        """See `Surrogate`."""
        return self._logits(paste(self._images[image].float(), whole_pixels(contents), placements))

    def class_scores(self, sums: Tensor) -> Tensor:
        """See `Surrogate`."""
        return sums

    def changed(self, image: Tensor, maps: Tensor) -> Tensor:
        """See `Surrogate`."""
        return lowest_argmax(maps[:, :, 0, 0]) != self._prediction[image]

    def saliency(self) -> Float[Tensor, "batch height width"]:
        """How much each pixel moves the lead of the prediction: the absolute gradient, summed over channels."""
        found = []
        for some in torch.arange(len(self._images), device=self.device).split(256):
            images = self._images[some].float().requires_grad_()
            logits = self._logits(images)[:, :, 0, 0]
            own = self._prediction[some][:, None]
            rival = logits.scatter(1, own, -torch.inf).amax(1)
            (gradient,) = torch.autograd.grad((logits.gather(1, own)[:, 0] - rival).sum(), images)
            found.append(gradient.abs().sum(3))
        return torch.cat(found)

    def _logits(self, images: Tensor) -> Tensor:
        return self._defense.logits(images.permute(0, 3, 1, 2) / 255).float()[:, :, None, None]


class LocalSurrogate:
    """A region scorer with its head: integer maps forward; backward the slope of the head's soft form."""

    def __init__(self, victim: Victim, defense: BagCert) -> None:
        scorer = defense.scorer.eval()
        self.device = scorer.device
        self._scorer, self._form = scorer, scorer.form
        self.pools = self._form.pooling is not None
        self._rule, self._threat = get_rule(victim.rule), victim.threat
        self._detects = victim.detects
        self._images = victim.images.to(self.device)
        self._prediction = victim.prediction.to(self.device)
        self._grid = scorer.grid(victim.threat.image_size)
        self.windows: Windows | None = Windows(self._grid, self._grid.windows(victim.threat), self.device)
        self._clean = scorer.real_scores(victim.images)
        self._softness = max(1.0, float(self._clean.abs().mean()))
        with torch.no_grad():
            self.clean = self._head(self._clean)
        self.crop = _Crop.of(scorer, self._grid, victim.threat)

    def maps(self, image: Tensor, contents: Tensor, placements: Tensor) -> Tensor:
        """See `Surrogate`."""
        contents = whole_pixels(contents)
        if self.crop is None:
            return self._head(_real(self._scorer, paste(self._images[image].float(), contents, placements)))
        z = self.crop.real_scores(self._scorer, self._images, image, contents, placements[:, 0], self._clean)
        return self._head(z)

    def class_scores(self, sums: Tensor) -> Tensor:
        """See `Surrogate`."""
        return self._form.class_scores(sums, self._grid.map_size[0] * self._grid.map_size[1])

    def changed(self, image: Tensor, maps: Tensor) -> Tensor:
        """See `Surrogate`."""
        score_map = self._form.score_map(maps.detach().to(torch.int32), self._grid)
        if self._detects:
            found = self._rule.certify(score_map, self._threat)
            return (found.prediction != self._prediction[image]) & found.certified
        return self._rule.predict(score_map, self._threat) != self._prediction[image]

    def _head(self, z: Tensor) -> Tensor:
        return self._form.straight_through(z, self._softness)


@dataclass(frozen=True)
class _Axis:
    """Crops along one axis for every placement: where they start, and what they decide.

    Attributes:
        length: pixels of every crop.
        stride: pixels per region.
        start: int [placements], by the side of the patch.
        touched: boolean [placements, regions], by the side of the patch.
    """

    length: int
    stride: int
    start: dict[int, np.ndarray]
    touched: dict[int, np.ndarray]

    @classmethod
    def of(cls, seen: Bool[np.ndarray, "regions pixels"], sides: set[int]) -> "_Axis | None":
        """None where regions are not evenly spaced intervals."""
        pixels = seen.shape[1]
        if not seen.any(1).all():
            return None
        first, last = seen.argmax(1), pixels - 1 - seen[:, ::-1].argmax(1)
        steps = set(np.diff(first[first > 0]).tolist())
        if len(steps) != 1 or min(steps) < 1 or (seen.sum(1) != last - first + 1).any():
            return None
        stride = steps.pop()
        start, end, touched = {}, {}, {}
        for side in sides:
            reach = np.lib.stride_tricks.sliding_window_view(seen, side, axis=1).max(2).T
            touched[side] = reach
            some = reach.any(1)
            low = np.where(reach, first, pixels).min(1)
            high = np.where(reach, last + 1, 0).max(1)
            start[side] = np.where(some, low // stride * stride, 0)
            end[side] = np.where(some, high, 0)
        length = max(int((end[side] - start[side]).max()) for side in sides)
        length += (pixels - length) % stride  # so that a crop can start on the stride and end with the image
        if length > pixels:
            return None
        return cls(length, stride, {s: np.minimum(start[s], pixels - length) for s in sides}, touched)


@dataclass(frozen=True)
class _Crop:
    """Runs the network on crops around single patches."""

    rows: _Axis
    cols: _Axis

    @classmethod
    def of(cls, scorer: RegionScorer, grid: RegionGrid, threat: PatchThreatModel) -> "_Crop | None":
        """None where crops would be no smaller, or give other scores than the whole image does."""
        if threat.patches > 1:
            return None
        rows = _Axis.of(grid.rows_seen, {h for h, _ in threat.maximal_shapes})
        cols = _Axis.of(grid.cols_seen, {w for _, w in threat.maximal_shapes})
        if rows is None or cols is None:
            return None
        height, width = grid.image_size
        if rows.length * cols.length > WORTH_CROPPING * height * width:
            return None
        crop = cls(rows, cols)
        return crop if crop._agrees(scorer, threat) else None

    def real_scores(
        self,
        scorer: RegionScorer,
        images: Tensor,
        image: Int[Tensor, " rows"],
        contents: Tensor,
        placements: Int[Tensor, "rows 4"],
        clean: Tensor,
    ) -> Float[Tensor, "rows classes map_rows map_cols"]:
        """The maps of images with one patch, from the clean maps and a crop around each patch."""
        device = images.device
        top, row_start, row_touched = _look_up(self.rows, placements[:, 0], placements[:, 2], device)
        left, col_start, col_touched = _look_up(self.cols, placements[:, 1], placements[:, 3], device)
        i = row_start[:, None] + torch.arange(self.rows.length, device=device)
        j = col_start[:, None] + torch.arange(self.cols.length, device=device)
        base = images[image[:, None, None], i[:, :, None], j[:, None, :]].float()
        moved = torch.stack([top - row_start, left - col_start, placements[:, 2], placements[:, 3]], 1)
        z = _real(scorer, paste(base, contents, moved[:, None]))
        a = torch.arange(clean.shape[2], device=device)[None] - (row_start // self.rows.stride)[:, None]
        b = torch.arange(clean.shape[3], device=device)[None] - (col_start // self.cols.stride)[:, None]
        a, b = a.clamp(0, z.shape[2] - 1), b.clamp(0, z.shape[3] - 1)
        every = torch.arange(len(z), device=device)[:, None, None]
        found = z[every, :, a[:, :, None], b[:, None, :]].permute(0, 3, 1, 2)
        touched = row_touched[:, None, :, None] & col_touched[:, None, None, :]
        return torch.where(touched, found, clean[image])

    def _agrees(self, scorer: RegionScorer, threat: PatchThreatModel) -> bool:
        """Do crops give the scores of whole images, on noise?"""
        generator = torch.Generator().manual_seed(0)
        size = (8, *threat.image_size, scorer.channels)
        images = torch.randint(0, 256, size, generator=generator, dtype=torch.uint8).to(scorer.device)
        tall, wide = max(h for h, _ in threat.shapes), max(w for _, w in threat.shapes)
        contents = torch.randint(0, 256, (8, 1, tall, wide, scorer.channels), generator=generator).to(scorer.device)
        placements = random_placements(threat, 8, generator).to(scorer.device)
        image = torch.arange(8, device=scorer.device)
        with torch.no_grad():
            whole = _real(scorer, paste(images.float(), contents.float(), placements))
            clean = _real(scorer, images.float())
            try:
                found = self.real_scores(scorer, images, image, contents.float(), placements[:, 0], clean)
            except (RuntimeError, IndexError):  # a crop too small for some layer
                return False
        tolerance = 0.02 if scorer.autocast_dtype is not None else 1e-3
        return bool((whole - found).abs().max() <= tolerance * whole.abs().max())


def _look_up(axis: _Axis, place: Tensor, side: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """(place, start of the crop, touched regions) of each row."""
    pairs = list(zip(side.tolist(), place.tolist(), strict=True))
    start = torch.tensor([int(axis.start[s][p]) for s, p in pairs], device=device)
    touched = torch.from_numpy(np.stack([axis.touched[s][p] for s, p in pairs])).to(device)
    return place, start, touched


def _real(scorer: RegionScorer, images: Tensor) -> Tensor:
    """`z` in float32 of images [rows, height, width, channels] in [0, 255], in the scorer's dtype, differentiable."""
    dtype = scorer.autocast_dtype
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        return scorer(images.permute(0, 3, 1, 2) / 255).float()
