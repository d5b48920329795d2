"""The numerical probes: change what is under a patch, or the configuration, and look at what should stand still."""

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
STEP = 0.5  # of the range of a pixel
DRIFT_IMAGES = 32  # for each batch size
BLOCKS = (1, 2, 4, 8)  # pixels; large sums round most, and these images have the largest


@dataclass
class Change:
    """The largest change found so far by one probe."""

    trials: int = 0
    scores: int = 0
    largest_z: float = 0.0
    largest_levels: int = 0

    def probe(self, name: str, kind: Kind) -> Probe:
        """What goes into the report."""
        return Probe(name, kind, self.trials, self.scores, self.largest_z, self.largest_levels)

    def compare(self, backend: Backend, before: Tensor, after: Tensor, mask: Tensor | None = None) -> Tensor:
        """Takes in one batch; returns how much each image moved in all, float64 [batch]."""
        mask = torch.ones_like(before, dtype=torch.bool) if mask is None else mask.expand_as(before)
        moved = (before != after) & mask  # NaN has always moved, also where it was NaN before
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
    """Probes of one backend on some clean images.

    Attributes:
        images: clean images [images, channels, height, width] in [0, 1], tried in turn.
        places: where patches lie, tried in turn.
        random: the source of contents.
        largest_score: of all clean score maps seen; filled on the way.
    """

    backend: Backend
    images: Float[Tensor, "images channels height width"]
    places: list[Place]
    random: torch.Generator
    seen: list[float] = field(default_factory=list)

    @property
    def largest_score(self) -> float:
        """The largest |z| of clean images so far; inf where one of them is not finite."""
        return max(self.seen, default=0.0)

    def contents(self, batch_size: int, names: tuple[str, ...]) -> dict[str, Change]:
        """Every content at every place on every image in turn, in batches of one size; only the patch differs."""
        found = {name: Change() for name in names}
        for start in range(0, len(self.places), batch_size):
            clean, places = self._batch(start, batch_size)
            before, mask = self._scores(clean), outside(self.backend.grid, places)
            for name, change in found.items():
                try:
                    after = self.backend.scores(self._with(clean, places, name))
                except RuntimeError:  # some quantized layers refuse NaN, which no image holds
                    if name != "NaN":
                        raise
                    continue
                change.compare(self.backend, before, after, mask)
        return {name: change for name, change in found.items() if change.trials}

    def adversarial(self, batch_size: int) -> Change:
        """From the worst of a random and an extreme content a few steps uphill, by gradient or by random search.

        The step follows the gradient of what moved outside the reach, where there is one that is not zero; otherwise
        a random part of the content is replaced by its extremes. Only what moves more is kept.
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

    def neighbours(self, batch_size: int, thorough: bool) -> Change:
        """The same image elsewhere in a batch of the same size and beside other images; thorough: also each alone."""
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
        """The same images in batches of `size` instead of `reference`, `DRIFT_IMAGES` of them or one batch."""
        change = Change()
        clean, _ = self._batch(0, reference)
        before = self._scores(clean)
        count = min(reference, max(size, DRIFT_IMAGES))
        for start in range(0, count - size + 1, size):
            part = slice(start, start + size)
            change.compare(self.backend, before[part], self.backend.scores(clean[part]))
        return change

    def threads(self, count: int, batch_sizes: tuple[int, ...]) -> Change:
        """The same batches with so many threads."""
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
        """Images and places number `start`, ..., `start + size - 1`, each in its own cycle."""
        numbers = range(start, start + size)
        clean = self.images[[n % len(self.images) for n in numbers]]
        return clean, [self.places[n % len(self.places)] for n in numbers]

    def _scores(self, clean: Tensor) -> Tensor:
        scores = self.backend.scores(clean)
        self.seen.append(float(magnitude(scores).max()))
        return scores

    def _with(self, clean: Tensor, places: list[Place], name: str) -> Tensor:
        """The images with a content under each patch."""
        if name == "NaN":
            content = torch.full_like(clean, torch.nan)
        elif name == "random":
            content = torch.rand(clean.shape, generator=self.random)
        else:  # extreme: patches of one color and noise of black and white in turn; mixed: every third is random
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
    """Absolute values in float64, with NaN as inf; a file may return whole numbers."""
    return values.double().abs().masked_fill(values.isnan(), torch.inf)


def outside_pixels(clean: Tensor, places: list[Place]) -> Tensor:
    """Boolean [batch, 1, height, width]: what each patch leaves as it is."""
    mask = torch.ones(len(clean), 1, *clean.shape[2:], dtype=torch.bool)
    for k, (top, left, height, width) in enumerate(places):
        mask[k, :, top : top + height, left : left + width] = False
    return mask


def places_for(
    image_size: tuple[int, int], shapes: tuple[tuple[int, int], ...], random: torch.Generator, more: int
) -> list[Place]:
    """Corners, the middle of each side and of the image, and `more` random places, for each shape."""
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
    """Noise over the whole range and, in turn, pale grey, whose range a patch widens as quantization would notice."""
    images = torch.rand(count, channels, *image_size, generator=random)
    images[1::2] = 0.5 + 0.05 * (images[1::2] - 0.5)
    return images


def saturated_images(image_size: tuple[int, int], channels: int, count: int, random: torch.Generator) -> Tensor:
    """Noise, and in turn blocks of several sizes whose channels are 0 or 1: what rounds most from kernel to kernel."""
    images = torch.rand(count, channels, *image_size, generator=random)
    for number, side in enumerate(BLOCKS, 1):
        part = images[number :: len(BLOCKS) + 1]
        cells = [-(-pixels // side) for pixels in image_size]
        blocks = torch.randint(0, 2, (len(part), channels, *cells), generator=random).float()
        blocks = blocks.repeat_interleave(side, 2).repeat_interleave(side, 3)
        part.copy_(blocks[..., : image_size[0], : image_size[1]])
    return images


def thread_counts(current: int) -> list[int]:
    """1, 2 and as many as there are cores, without the current number."""
    return sorted({1, 2, os.cpu_count() or 1} - {current})
