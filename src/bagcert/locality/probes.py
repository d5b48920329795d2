"""Numerical probes of locality: change the content of a patch or the configuration, and compare all other scores."""

import os
from dataclasses import dataclass, field
from itertools import product

import torch
from jaxtyping import Float
from torch import Tensor

from bagcert.locality.report import Kind, Probe
from bagcert.locality.target import Backend, outside

Place = tuple[int, int, int, int]  # top, left, height, width in pixels
CLIMBS = 8  # steps of the adversarial probe
STEP = 0.5  # step size as a share of the range of a pixel
DRIFT_IMAGES = 32  # images per batch size
BLOCKS = (1, 2, 4, 8)  # sides in px of saturated blocks, which give large sums and so large rounding errors


@dataclass
class Change:
    """Largest change found so far by one probe."""

    trials: int = 0
    scores: int = 0
    largest_z: float = 0.0
    largest_levels: int = 0

    def probe(self, name: str, kind: Kind) -> Probe:
        """Convert to an entry of the report."""
        return Probe(name, kind, self.trials, self.scores, self.largest_z, self.largest_levels)

    def compare(self, backend: Backend, before: Tensor, after: Tensor, mask: Tensor | None = None) -> Tensor:
        """Compare the scores of one batch; return the total change per image, float64 [batch]."""
        mask = torch.ones_like(before, dtype=torch.bool) if mask is None else mask.expand_as(before)
        moved = (before != after) & mask  # NaN always counts as changed, even if it was NaN before
        distance = magnitude(after.double() - before.double()).where(moved, 0)
        levels = (backend.head(after).long() - backend.head(before).long()).abs().where(mask, 0)
        self.trials += len(before)
        self.scores += int(mask.sum())
        if distance.numel():
            self.largest_z = max(self.largest_z, float(distance.max()))
            self.largest_levels = max(self.largest_levels, int(levels.max()))
        return distance.sum((1, 2, 3))


@dataclass(frozen=True, eq=False)
class Prober:
    """Runs probes of one backend on clean images.

    Attributes:
        images: clean images [images, channels, height, width] in [0, 1], used cyclically.
        seen: largest absolute score of each batch of clean images so far.
    """

    backend: Backend
    images: Float[Tensor, "images channels height width"]
    places: list[Place]
    random: torch.Generator
    seen: list[float] = field(default_factory=list)

    @property
    def largest_score(self) -> float:
        """Largest |z| of clean images so far; inf if one is not finite."""
        return max(self.seen, default=0.0)

    def contents(self, batch_size: int, names: tuple[str, ...]) -> dict[str, Change]:
        """Compare images with and without a patch for every kind of content and every place, in batches of one size."""
        found = {name: Change() for name in names}
        for start in range(0, len(self.places), batch_size):
            clean, places = self._batch(start, batch_size)
            before, mask = self._scores(clean), outside(self.backend.grid, places)
            for name, change in found.items():
                try:
                    after = self.backend.scores(self._with(clean, places, name))
                except RuntimeError:  # some quantized layers reject NaN, which images never contain
                    if name != "NaN":
                        raise
                    continue
                change.compare(self.backend, before, after, mask)
        return {name: change for name, change in found.items() if change.trials}

    def adversarial(self, batch_size: int) -> Change:
        """Maximize the change outside the reach by a few steps of gradient ascent or random search.

        The search starts with the worse of a random and an extreme content. Each step follows the gradient of the
        change if it is not zero; otherwise random pixels are set to extreme values. A step is kept unless the change
        decreases.
        """
        best = Change()
        for start in range(0, len(self.places), batch_size):
            clean, places = self._batch(start, batch_size)
            before, mask = self._scores(clean), outside(self.backend.grid, places)
            under = ~outside_pixels(clean, places)
            image = self._with(clean, places, "random")
            after = self.backend.scores(image)
            moved = best.compare(self.backend, before, after, mask)
            for step in range(CLIMBS):
                trial = self._with(clean, places, "extreme") if step == 0 else self._uphill(image, after, before, mask)
                trial = torch.where(under, trial, clean)
                scores = self.backend.scores(trial)
                now = best.compare(self.backend, before, scores, mask)
                better = (now >= moved)[:, None, None, None]
                image, after = torch.where(better, trial, image), torch.where(better, scores, after)
                moved = torch.maximum(moved, now)
        return best

    def neighbors(self, batch_size: int, thorough: bool) -> Change:
        """Compare scores of images at other positions in the batch and next to other images.

        If `thorough`, other images at unchanged positions are tested separately.
        """
        change = Change()
        clean, _ = self._batch(0, batch_size)
        before = self._scores(clean)
        other = torch.rand(clean.shape, generator=self.random)
        stays = torch.arange(batch_size) % 2 == 0
        beside = torch.where(stays[:, None, None, None], clean, other)
        if thorough:
            change.compare(self.backend, before[stays], self.backend.scores(beside)[stays])
        after = self.backend.scores(beside.roll(1, 0)).roll(-1, 0)
        change.compare(self.backend, before[stays], after[stays])
        return change

    def batch_size(self, size: int, reference: int) -> Change:
        """Compare scores in batches of `size` with those in batches of `reference`, on `DRIFT_IMAGES` or one batch."""
        change = Change()
        clean, _ = self._batch(0, reference)
        before = self._scores(clean)
        count = min(reference, max(size, DRIFT_IMAGES))
        for start in range(0, count - size + 1, size):
            part = slice(start, start + size)
            change.compare(self.backend, before[part], self.backend.scores(clean[part]))
        return change

    def threads(self, count: int, batch_sizes: tuple[int, ...]) -> Change:
        """Compare scores with `count` threads with those with the current number."""
        change = Change()
        assert self.backend.threads is not None
        for size in batch_sizes:
            clean, _ = self._batch(0, size)
            before = self._scores(clean)
            with self.backend.threads(count):
                after = self.backend.scores(clean)
            change.compare(self.backend, before, after)
        return change

    def _batch(self, start: int, size: int) -> tuple[Tensor, list[Place]]:
        """Images and places number `start`, ..., `start + size - 1`, both used cyclically."""
        numbers = range(start, start + size)
        clean = self.images[[n % len(self.images) for n in numbers]]
        return clean, [self.places[n % len(self.places)] for n in numbers]

    def _scores(self, clean: Tensor) -> Tensor:
        scores = self.backend.scores(clean)
        self.seen.append(float(magnitude(scores).max()))
        return scores

    def _with(self, clean: Tensor, places: list[Place], name: str) -> Tensor:
        """Apply patches with the named kind of content to the images."""
        if name == "NaN":
            content = torch.full_like(clean, torch.nan)
        elif name == "random":
            content = torch.rand(clean.shape, generator=self.random)
        else:  # extreme: one color or black and white noise, alternating; mixed: every third is random
            content = torch.randint(0, 2, clean.shape, generator=self.random).float()
            content[::2] = content[::2, :, :1, :1]
            if name == "mixed":
                content[2::3] = torch.rand(content[2::3].shape, generator=self.random)
        return torch.where(outside_pixels(clean, places), clean, content)

    def _uphill(self, image: Tensor, after: Tensor, before: Tensor, mask: Tensor) -> Tensor:
        direction = (after - before).sign().nan_to_num()
        noise = torch.randint(0, 2, after.shape, generator=self.random).float() * 2 - 1
        weights = torch.where(direction == 0, noise, direction) * mask
        flips = torch.rand(image[:, :1].shape, generator=self.random) < 0.25
        searched = torch.where(flips, torch.randint(0, 2, image.shape, generator=self.random).float(), image)
        if self.backend.gradient is None:
            return searched
        try:
            slope = self.backend.gradient(image, weights).nan_to_num()
        except RuntimeError:  # an operation without a derivative
            return searched
        has_slope = (slope != 0).flatten(1).any(1)[:, None, None, None]
        return torch.where(has_slope, (image + STEP * slope.sign()).clamp(0, 1), searched)


def magnitude(values: Tensor) -> Tensor:
    """Absolute values in float64, with NaN as inf. The input can be integers from an ONNX file."""
    return values.double().abs().masked_fill(values.isnan(), torch.inf)


def outside_pixels(clean: Tensor, places: list[Place]) -> Tensor:
    """Which pixels lie outside the patch of each image, boolean [batch, 1, height, width]."""
    mask = torch.ones(len(clean), 1, *clean.shape[2:], dtype=torch.bool)
    for k, (top, left, height, width) in enumerate(places):
        mask[k, :, top : top + height, left : left + width] = False
    return mask


def places_for(
    image_size: tuple[int, int], shapes: tuple[tuple[int, int], ...], random: torch.Generator, more: int
) -> list[Place]:
    """Corners, edge centers, the image center and `more` random places for each shape."""
    found = []
    for height, width in shapes:
        rows, cols = (
            [0, side - size, (side - size) // 2] for side, size in zip(image_size, (height, width), strict=True)
        )
        found += [(top, left, height, width) for top, left in product(rows, cols)]
        for _ in range(more):
            top, left = (
                int(torch.randint(0, side - size + 1, (), generator=random))
                for side, size in zip(image_size, (height, width), strict=True)
            )
            found.append((top, left, height, width))
    return list(dict.fromkeys(found))


def clean_images(image_size: tuple[int, int], channels: int, count: int, random: torch.Generator) -> Tensor:
    """Alternate full-range noise and low-contrast gray, whose range a patch extends (for quantization)."""
    images = torch.rand(count, channels, *image_size, generator=random)
    images[1::2] = 0.5 + 0.05 * (images[1::2] - 0.5)
    return images


def saturated_images(image_size: tuple[int, int], channels: int, count: int, random: torch.Generator) -> Tensor:
    """Noise and blocks of several sizes with channels 0 or 1, for which rounding differs most between kernels."""
    images = torch.rand(count, channels, *image_size, generator=random)
    for number, side in enumerate(BLOCKS, 1):
        part = images[number :: len(BLOCKS) + 1]
        cells = [-(-pixels // side) for pixels in image_size]
        blocks = torch.randint(0, 2, (len(part), channels, *cells), generator=random).float()
        blocks = blocks.repeat_interleave(side, 2).repeat_interleave(side, 3)
        part.copy_(blocks[..., : image_size[0], : image_size[1]])
    return images


def thread_counts(current: int) -> list[int]:
    """Thread counts to test: 1, 2 and the number of cores, without the current count."""
    return sorted({1, 2, os.cpu_count() or 1} - {current})
