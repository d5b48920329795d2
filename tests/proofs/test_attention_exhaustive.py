"""Attention pooling: certificates against every attack there is, on maps small enough to try them all.

A region has one of a few states (values and weight), and a map is a number with one digit per region. An attacked map
is again one of the maps, so one table of predictions settles all attacks. The readout is not linear: hidden units
saturate and the skip connection disagrees with them.
"""

from itertools import product

import numpy as np
import pytest
import torch

from bagcert.aggregation import PRODUCT_LIMIT, AttentionPooling
from bagcert.grid import RegionGrid
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle

STATES = {  # (value, value, weight) of a region
    "three": ((127, -60, 1), (-127, 90, 2), (30, 127, 3)),
    "far apart": ((511, -511, 255), (-511, 511, 255), (0, 0, 1), (127, 127, 1)),
}
READOUT = AttentionPooling(
    first=torch.tensor([[90, -110], [-100, 120], [70, 70]], dtype=torch.int32),
    first_bias=torch.tensor([500, -300, -2000], dtype=torch.int32),
    second=torch.tensor([[60, -40, 10], [-50, 70, 5], [20, 20, 90]], dtype=torch.int32),
    skip=torch.tensor([[10, -30], [-20, 25], [-15, -15]], dtype=torch.int32),
    bias=torch.tensor([0, 0, -900], dtype=torch.int32),
    heads=1,
)


def every_map(states, rows: int, cols: int) -> torch.Tensor:
    """int32 [states^(rows * cols), 3, rows, cols]: map number i has the digits of i in reading order, lowest first."""
    count, regions = len(states), rows * cols
    digits = np.arange(count**regions)[:, None] // count ** np.arange(regions) % count
    channels = np.array([(first * weight, second * weight, weight) for first, second, weight in states])
    return torch.as_tensor(channels[digits].transpose(0, 2, 1).reshape(-1, 3, rows, cols).astype(np.int32))


@pytest.mark.parametrize(
    ("states", "axes", "patch"),
    [
        ("three", (1, 1, 0, (2, 4)), "1x2+2x1"),
        ("three", (2, 1, 0, (2, 8)), "1"),
        ("far apart", (1, 1, 0, (2, 3)), "1"),
    ],
)
def test_every_map_under_every_attack(states, axes, patch):
    grid, chosen = RegionGrid.from_axis(*axes), STATES[states]
    maps = every_map(chosen, *grid.map_size)
    score_map = ScoreMap(maps, -PRODUCT_LIMIT, PRODUCT_LIMIT, grid, readout=READOUT)
    threat = PatchThreatModel.parse(patch, grid.image_size)
    reaches = {reach.tobytes(): reach for _, reach in oracle.reaches(grid.rows_seen, grid.cols_seen, threat.shapes)}
    digit = len(chosen) ** np.arange(maps[0, 0].numel())
    number = np.arange(len(maps))
    found = {rule: RULES[rule].certify(score_map, threat) for rule in ("double-masking", "detection")}
    answers = {rule: RULES[rule].predict(score_map, threat).numpy() for rule in found}
    alert = ~found["detection"].certified.numpy()  # a certificate is the absence of an alert
    assert len(np.unique(answers["detection"])) == 3
    for rule, certificate in found.items():
        answer, certified = answers[rule], certificate.certified.numpy()
        assert (certificate.prediction.numpy() == answer).all()
        broken = np.zeros(len(maps), dtype=bool)
        for reach in reaches.values():
            cells = digit[np.flatnonzero(reach.ravel())]
            kept = number - sum(number // cell % len(chosen) * cell for cell in cells)
            for way in product(range(len(chosen)), repeat=len(cells)):
                attacked = kept + int(np.dot(way, cells))
                changed = answer[attacked] != answer
                broken |= changed & ~alert[attacked] if rule == "detection" else changed
        assert certified.any()
        assert broken.any()
        assert not (certified & broken).any(), rule
