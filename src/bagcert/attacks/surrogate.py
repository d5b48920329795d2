"""Surrogates for white-box attacks: score maps of patched images, exact in the forward pass, with gradients.

A patch changes only the scores of the regions that see it. If the network is translation-equivariant at its stride, it
is evaluated only on a crop around the patch, and the result is inserted into the clean map. Equivariance is tested when
the surrogate is created; otherwise whole images are used. Surrogates do not judge success; the defense itself does.
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

WORTH_CROPPING = 0.8  # maximum area of a crop as a share of the image; larger crops save too little


@runtime_checkable
class Surrogate(Protocol):
    """Interface of surrogates, which compute score maps of patched images.

    Attributes:
        clean: maps [batch, channels, rows, cols] of the clean images; one channel per class, or the evidence pooled by
            a readout.
        windows: windows of the threat, or None if every patch reaches all regions.
        pools: whether a readout computes class scores from sums over regions; otherwise class scores are these sums.
    """

    device: torch.device
    clean: Tensor
    windows: Windows | None
    pools: bool

    def maps(self, image: Tensor, contents: Tensor, placements: Tensor) -> Tensor:
        """Compute maps [rows, channels, map rows, map cols] of patched images, differentiable in the contents."""

    def class_scores(self, sums: Tensor) -> Tensor:
        """Compute class scores [*batch, classes] from sums [*batch, channels] over kept regions, differentiable."""

    def changed(self, image: Tensor, maps: Tensor) -> Tensor:
        """Whether the prediction of the rule on these maps differs from the clean prediction, boolean [rows]."""


def surrogate_of(victim: Victim) -> Surrogate:
    """Create the surrogate for the defense of a victim."""
    defense: Defense = victim.defense
    if isinstance(defense, BagCert):
        return LocalSurrogate(victim, defense)
    if isinstance(defense, Undefended):
        return PlainSurrogate(victim, defense)
    raise UsageError(
        f"white-box attacks support BagCert and Undefended, got {type(defense).__name__}; use the random attack"
    )


def whole_pixels(contents: Tensor) -> Tensor:
    """Round contents to valid uint8 values, with the gradient of the identity."""
    return contents + (contents.round().clamp(0, 255) - contents).detach()


class PlainSurrogate:
    """Surrogate of an ordinary classifier; its logits form a map with one region."""

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
        """Absolute gradient of the lead of the prediction with respect to each pixel, summed over channels."""
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
    """Surrogate of a region scorer: integer maps in the forward pass, gradients of the soft head in the backward."""

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
    """Crops along one axis for every placement.

    Attributes:
        start: for each side of a patch, the first pixel of the crop, int [placements].
        touched: for each side of a patch, the regions that see the patch, boolean [placements, regions].
    """

    length: int
    stride: int
    start: dict[int, np.ndarray]
    touched: dict[int, np.ndarray]

    @classmethod
    def of(cls, seen: Bool[np.ndarray, "regions pixels"], sides: set[int]) -> "_Axis | None":
        """Compute the crops; None if the regions are not evenly spaced intervals."""
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
        length += (pixels - length) % stride  # a crop can then start on the stride and end at the border
        if length > pixels:
            return None
        return cls(length, stride, {s: np.minimum(start[s], pixels - length) for s in sides}, touched)


@dataclass(frozen=True)
class _Crop:
    rows: _Axis
    cols: _Axis

    @classmethod
    def of(cls, scorer: RegionScorer, grid: RegionGrid, threat: PatchThreatModel) -> "_Crop | None":
        """Create the crops; None if they would save too little or give other scores than whole images."""
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
        """Compute the maps of images with one patch from the clean maps and a crop around each patch."""
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
        """Whether crops give the same scores as whole images, tested on noise."""
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
            except (RuntimeError, IndexError):  # the crop is too small for some layer
                return False
        tolerance = 0.02 if scorer.autocast_dtype is not None else 1e-3
        return bool((whole - found).abs().max() <= tolerance * whole.abs().max())


def _look_up(axis: _Axis, place: Tensor, side: Tensor, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Look up (position, start of the crop, touched regions) of each row."""
    pairs = list(zip(side.tolist(), place.tolist(), strict=True))
    start = torch.tensor([int(axis.start[s][p]) for s, p in pairs], device=device)
    touched = torch.from_numpy(np.stack([axis.touched[s][p] for s, p in pairs])).to(device)
    return place, start, touched


def _real(scorer: RegionScorer, images: Tensor) -> Tensor:
    """Compute `z` as float32 for images [rows, height, width, channels] in [0, 255], differentiable.

    The network runs in the dtype of the scorer.
    """
    dtype = scorer.autocast_dtype
    with torch.autocast(images.device.type, dtype=dtype, enabled=dtype is not None):
        return scorer(images.permute(0, 3, 1, 2) / 255).float()
