"""Tiny random cases for the rules: every kind of grid, threat and score the definitions speak of.

A case is built from integers that `choose` supplies, so that hypothesis (which shrinks) and a plain random
generator (which is fast) share one construction.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle

Choose = Callable[[int, int, int], list[int]]  # (how many, low, high) -> integers within [low, high]

RANGES = ((0, 1), (0, 1), (-3, 4), (-2047, 2047))


@dataclass
class Case:
    """A batch of score maps and a threat, and the oracle's masks for them."""

    score_map: ScoreMap
    threat: PatchThreatModel

    @property
    def scores(self):
        return self.score_map.scores.numpy()

    @property
    def geometry(self):
        grid = self.score_map.grid
        return grid.rows_seen, grid.cols_seen, self.threat.shapes, self.threat.allowed

    @property
    def windows(self):
        """What one patch can reach, straight from the definitions."""
        return oracle.mask_set(*self.geometry, self.score_map.grid.masks_per_axis)

    @property
    def masks(self):
        """The mask set of the masking rules: one window for each patch."""
        return oracle.unions(self.windows, self.threat.patches)

    @property
    def reaches(self):
        """Every set of regions the attacker can influence, as unions where there are several patches."""
        found = {mask.tobytes(): mask for _, mask in oracle.reaches(*self.geometry)}
        return oracle.unions(list(found.values()), self.threat.patches)

    def mask_at(self, placement):
        """The mask of a placement `[top, left, height, width]`: its reach, or the merged mask that contains it."""
        top, left, *shape = placement
        reach = next(r for (s, *corner), r in oracle.reaches(*self.geometry) if (corner, s) == ([top, left], (*shape,)))
        most = self.score_map.grid.masks_per_axis
        if most is None:
            return reach
        rows, cols, shapes, allowed = self.geometry
        masks = oracle.merged_masks(rows, cols, shapes if allowed is not None else [tuple(shape)], allowed, most)
        return next(mask for mask, members in masks if any((reach == member).all() for member in members))

    def with_scores(self, scores):
        return ScoreMap(torch.as_tensor(scores), self.score_map.low, self.score_map.high, self.score_map.grid)


def build_grid(choose: Choose) -> RegionGrid:
    kind, height, width = choose(1, 0, 3)[0], *choose(2, 3, 6)
    if kind == 0:  # a convolutional stack with zero padding, not square
        field, start = choose(1, 1, 3)[0], -choose(1, 0, 1)[0]
        return RegionGrid.from_axis(field, 1, start, (height, width))
    if kind == 1:  # strided without padding: some pixels may be unseen
        field, stride = choose(1, 1, 2)[0], choose(1, 2, 3)[0]
        return RegionGrid.from_axis(field, stride, 0, (height, width))
    if kind == 2:  # column ablation that wraps around, over one or all rows
        band = choose(1, 1, 3)[0]
        start = np.arange(width)[:, None]
        cols = (np.arange(width)[None, :] - start) % width < band
        rows = np.ones((1, height), dtype=bool) if choose(1, 0, 1)[0] else np.eye(height, dtype=bool)[: min(height, 4)]
        return RegionGrid(rows, cols)
    rows, cols = choose(2, 1, 4)  # anything at all
    return RegionGrid(
        np.array(choose(rows * height, 0, 2)).reshape(rows, height) == 0,
        np.array(choose(cols * width, 0, 2)).reshape(cols, width) == 0,
    )


def build_threat(choose: Choose, image_size: tuple[int, int], most_patches: int) -> PatchThreatModel:
    shapes = tuple(tuple(choose(2, 1, 3)) for _ in range(choose(1, 1, 2)[0]))
    patches = choose(1, 1, most_patches)[0]
    allowed = None
    if choose(1, 0, 3)[0] == 0:
        allowed = np.array(choose(image_size[0] * image_size[1], 0, 4)).reshape(image_size) > 0
    try:
        return PatchThreatModel(image_size, shapes, patches, allowed)
    except UsageError:  # no room under the mask
        return PatchThreatModel(image_size, shapes, patches)


def build_scores(choose: Choose, low: int, high: int, map_size: tuple[int, int]) -> np.ndarray:
    """[2, classes, rows, cols]: random, mostly with a favoured class, equal classes, or values at the ends only."""
    classes = choose(1, 2, 4)[0]
    cells = 2 * classes * map_size[0] * map_size[1]
    kind = choose(1, 0, 4)[0]
    if kind == 0:
        scores = np.array([(low, high)[end] for end in choose(cells, 0, 1)])
    else:
        scores = np.array(choose(cells, low, high))
    scores = scores.reshape(2, classes, *map_size)
    favoured, twin = choose(2, 0, classes - 1)
    if kind >= 2:
        raised = np.array(choose(2 * map_size[0] * map_size[1], 0, 3)).reshape(2, *map_size) > 0
        scores[:, favoured] = np.where(raised, high, scores[:, favoured])
    if kind == 4:
        scores[:, twin] = scores[:, favoured]
    return scores.astype(np.int16)


def build(choose: Choose, most_patches: int = 2, most_masks: int = 40) -> Case:
    """A case with at most `most_masks` masks; several patches become one where they would be more."""
    grid = build_grid(choose)
    threat = build_threat(choose, grid.image_size, most_patches)
    low, high = RANGES[choose(1, 0, len(RANGES) - 1)[0]]
    scores = torch.as_tensor(build_scores(choose, low, high, grid.map_size))
    if choose(1, 0, 3)[0] == 0:
        grid = grid.with_masks_per_axis(choose(1, 1, 3)[0])
    case = Case(ScoreMap(scores, low, high, grid), threat)
    if len(case.masks) > most_masks:
        case.threat = PatchThreatModel(threat.image_size, threat.shapes, 1, threat.allowed)
    return case


def attacked(case: Case, image: int, limit: int = 256, most: int = 4000) -> np.ndarray:
    """Score maps [attacks, classes, rows, cols] an attacker can cause: all contents if few, else extremes."""
    scores, low, high = case.scores[image], case.score_map.low, case.score_map.high
    found = []
    for reach in case.reaches:
        found += oracle.one_class_up(scores, reach, low, high)
        if len(found) < most:
            found += oracle.every_content(scores, reach, low, high, limit)
    return np.stack(found)


def from_generator(generator: np.random.Generator) -> Choose:
    return lambda count, low, high: generator.integers(low, high + 1, count).tolist()
