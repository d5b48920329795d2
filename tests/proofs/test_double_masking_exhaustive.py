"""Certificates against every attack there is, on maps small enough to try them all, by the real two-round prediction.

The first half is exhaustive in everything: all binary maps of two classes, all placements, all contents. An attacked
map is then again one of the maps, so that one table of predictions settles all attacks. The second half has three
classes, larger maps and fixed-point scores, where the contents are all combinations of a few corner values.
`-s` prints how often an image that is not certified could not be broken either.
"""

from itertools import product

import numpy as np
import pytest
import torch

from bagcert.grid import RegionGrid
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle

pytestmark = pytest.mark.slow

RECOVERY = ("vote", "double-masking")


def tightness(title: str, certified: np.ndarray, broken: np.ndarray) -> None:
    """How many of the images without a certificate no attack in the test changes."""
    open_ = ~certified
    safe = int((open_ & ~broken).sum())
    print(f"\n{title}: {certified.sum():,} certified; of {open_.sum():,} others {safe:,} cannot be broken")


# ---------------------------------------------------------------- every binary map of two classes


def every_map(rows: int, cols: int) -> np.ndarray:
    """[2^(2 * rows * cols), 2, rows, cols]: map number i has the bits of i, class 0 first, in reading order."""
    bits = 2 * rows * cols
    numbers = np.arange(2**bits, dtype=np.int64)[:, None]
    return (numbers >> np.arange(bits) & 1).astype(np.int16).reshape(-1, 2, rows, cols)


def contents(reach: np.ndarray) -> tuple[int, list[int]]:
    """The bits of a map that a reach holds, and every way to set them."""
    cells = np.flatnonzero(np.concatenate([reach.ravel(), reach.ravel()]))
    bits = [1 << int(cell) for cell in cells]
    return sum(bits), [
        sum(bit for bit, on in zip(bits, way, strict=True) if on) for way in product((0, 1), repeat=len(bits))
    ]


@pytest.mark.parametrize(
    ("axes", "patch"),
    [
        ((1, 1, 0, (2, 4)), "1"),
        ((1, 1, 0, (2, 4)), "1x2"),
        ((1, 1, 0, (2, 4)), "1x2+2x1"),
        ((2, 1, 0, (2, 9)), "1"),
        ((1, 1, 0, (3, 3)), "2"),
    ],
    ids=["2x4-1", "2x4-1x2", "2x4-either", "1x8-overlapping", "3x3-2"],
)
def test_every_binary_map_under_every_attack(axes, patch):
    grid = RegionGrid.from_axis(*axes)
    maps = every_map(*grid.map_size)
    score_map, threat = ScoreMap(torch.as_tensor(maps), 0, 1, grid), PatchThreatModel.parse(patch, grid.image_size)
    reaches = {reach.tobytes(): reach for _, reach in oracle.reaches(grid.rows_seen, grid.cols_seen, threat.shapes)}
    masks = oracle.mask_set(grid.rows_seen, grid.cols_seen, threat.shapes)
    plain = RULES["vote"].predict(score_map, threat).numpy()
    alert = alerts(maps, masks, plain)
    number = np.arange(len(maps))
    for name in (*RECOVERY, "detection"):
        rule = RULES[name]
        found = rule.certify(score_map, threat)
        answer, certified = rule.predict(score_map, threat).numpy(), found.certified.numpy()
        assert (found.prediction.numpy() == answer).all()
        broken = np.zeros(len(maps), dtype=bool)
        for reach in reaches.values():
            held, ways = contents(reach)
            for way in ways:
                attacked = number & ~held | way
                changed = answer[attacked] != answer
                broken |= changed & ~alert[attacked] if name == "detection" else changed
        assert certified.any()
        assert not (certified & broken).any(), name
        if name == "vote":
            assert (certified | broken).all()  # exact: what is not certified can be overturned
        if name == "detection":
            assert (certified == ~alert).all()
        tightness(f"{name}, all binary {grid.map_size} maps, {patch}", certified, broken)


def alerts(maps: np.ndarray, masks: list[np.ndarray], plain: np.ndarray) -> np.ndarray:
    """Which of many two-class maps raise the alarm of detection: literally, but for all maps at once."""
    raised = np.zeros(len(maps), dtype=bool)
    for mask in masks:
        sums = maps[:, :, ~mask].sum(2)
        raised |= (sums[:, 1] > sums[:, 0]) != plain
    return raised


# ---------------------------------------------------------------- three classes, corner cases of fixed-point scores


def noisy(seed: int, count: int, classes: int, low: int, high: int, grid: RegionGrid) -> np.ndarray:
    """Maps near the edge of being certified: small noise and a lead for one class, a few rivals at the very top."""
    random = np.random.default_rng(seed)
    scores = random.integers(max(low, -2), min(high, 2) + 1, (count, classes, *grid.map_size))
    favorite = random.integers(0, classes, count)
    lead = random.integers(0, min(high, 3) + 1, (count, *grid.map_size))
    scores[np.arange(count), favorite] = np.maximum(scores[np.arange(count), favorite], lead)
    some = random.random(count) < 0.3
    scores[some, (favorite[some] + 1) % classes, 0, 0] = high
    return np.clip(scores, low, high).astype(np.int16)


def attacked_maps(scores: np.ndarray, reach: np.ndarray, values: tuple[int, ...]) -> np.ndarray:
    """[contents, classes, rows, cols]: the map with every combination of `values` under the reach."""
    cells = np.argwhere(np.broadcast_to(reach, scores.shape))
    ways = np.array(list(product(values, repeat=len(cells))), dtype=np.int16)
    found = np.repeat(scores[None], len(ways), 0)
    found[:, cells[:, 0], cells[:, 1], cells[:, 2]] = ways
    return found


CORNERS = {"binary": (0, 1), "fixed point": (-2047, -1, 0, 1, 2047), "ends": (-2047, 2047)}


@pytest.mark.parametrize(
    ("axes", "patch", "classes", "kind", "count"),
    [
        ((1, 1, 0, (3, 3)), "1", 3, "fixed point", 24),
        ((1, 1, 0, (3, 4)), "1x2", 2, "fixed point", 10),
        ((1, 1, 0, (4, 4)), "1x2", 3, "ends", 16),
        ((1, 1, 0, (4, 4)), "2", 2, "ends", 16),
        ((1, 1, 0, (4, 4)), "2", 3, "binary", 4),
        ((3, 1, -1, (4, 4)), "1x2+1", 2, "binary", 3),
        ((1, 1, 0, (3, 3)), "2*1", 2, "ends", 4),
    ],
    ids=["3x3-1", "3x4-1x2", "4x4-1x2", "4x4-2-ends", "4x4-2-binary", "4x4-padded", "3x3-two-patches"],
)
def test_every_corner_case_under_every_placement(axes, patch, classes, kind, count):
    grid = RegionGrid.from_axis(*axes)
    values = CORNERS[kind]
    low, high = values[0], values[-1]
    threat = PatchThreatModel.parse(patch, grid.image_size)
    scores = noisy(11, count, classes, low, high, grid)
    clean = ScoreMap(torch.as_tensor(scores), low, high, grid)
    reaches = {reach.tobytes(): reach for _, reach in oracle.reaches(grid.rows_seen, grid.cols_seen, threat.shapes)}
    reaches = [reach for reach in oracle.unions(list(reaches.values()), threat.patches) if reach.sum() * classes <= 12]
    found = {name: RULES[name].certify(clean, threat) for name in RECOVERY}
    broken = {name: np.zeros(count, dtype=bool) for name in RECOVERY}
    for image, reach in product(range(count), reaches):
        attacked = ScoreMap(torch.as_tensor(attacked_maps(scores[image], reach, values)), low, high, grid)
        for name in RECOVERY:
            answer = RULES[name].predict(attacked, threat)
            broken[name][image] |= bool((answer != found[name].prediction[image]).any())
    for name in RECOVERY:
        certified = found[name].certified.numpy()
        assert not (certified & broken[name]).any(), name
        tightness(f"{name}, {kind}, {grid.map_size} maps, {patch}, {classes} classes", certified, broken[name])
