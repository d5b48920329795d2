"""De-randomized smoothing beside that of the Adversarial Robustness Toolbox: the same ablated images and votes."""

import numpy as np
import pytest
import torch

pytest.importorskip("art")

from art.estimators.certification.derandomized_smoothing.ablators.pytorch import (
    BlockAblatorPyTorch,
    ColumnAblatorPyTorch,
)

from bagcert.defenses.derandomized_smoothing import ablate, ablation_grid
from bagcert.rules.levine_feizi import levine_feizi
from bagcert.rules.vote import vote
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

WIDTH, KEPT, PATCH = 12, 3, 2


def ablator(ablation: str, algorithm: str):
    options = {"channels_first": True, "mode": "CNN", "to_reshape": False, "algorithm": algorithm, "device_type": "cpu"}
    if ablation == "block":
        return BlockAblatorPyTorch(KEPT, **options)
    return ColumnAblatorPyTorch(KEPT, ablation_mode=ablation, **options)


@pytest.mark.parametrize("ablation", ["column", "row", "block"])
def test_ablated_images_are_the_same(ablation: str) -> None:
    images = torch.as_tensor(np.random.default_rng(0).random((2, 3, WIDTH, WIDTH)), dtype=torch.float32)
    other = ablator(ablation, "levine2020")
    for first in range(WIDTH):
        row, col = (first * 5 % WIDTH, first) if ablation == "block" else (first, first)
        theirs = other.forward(images.clone(), column_pos=col, row_pos=row if ablation == "block" else None)
        assert torch.equal(ablate(images, torch.tensor([[row, col]] * 2), ablation, KEPT), theirs)


@pytest.mark.parametrize("ablation", ["column", "row", "block"])
def test_their_certificates_are_ours_except_for_won_ties(ablation: str) -> None:
    """`salman2021` asks for more than 2A votes between the first two; a tie that the label would win is enough."""
    random = np.random.default_rng(1)
    grid = ablation_grid(ablation, KEPT, 1, (WIDTH, WIDTH))
    kind = random.random((3000, 1, 1, 1)) ** 0.3
    chosen = np.where(random.random((3000, 1, *grid.map_size)) < kind, random.integers(0, 4, (3000, 1, 1, 1)), 0)
    chosen = np.where(random.random(chosen.shape) < 0.1, random.integers(0, 4, chosen.shape), chosen)
    votes = (chosen == np.arange(4)[None, :, None, None]).astype(np.int16)
    score_map = ScoreMap(torch.as_tensor(votes), 0, 1, grid)
    threat = PatchThreatModel.parse(PATCH, (WIDTH, WIDTH))
    counts = score_map.class_sums
    theirs, _, predicted = ablator(ablation, "salman2021").certify(counts, PATCH, torch.zeros(3000, dtype=torch.int64))
    counted, each = levine_feizi(score_map, threat), vote(score_map, threat)
    assert torch.equal(predicted[theirs], counted.prediction[theirs])
    assert bool((counted.certified | ~theirs).all())
    assert bool((each.certified | ~counted.certified).all())
    reach = (PATCH + KEPT - 1) ** (2 if ablation == "block" else 1)
    first, second = counts.topk(2).values.T
    only_ours = counted.certified & ~theirs
    assert bool((first - second == 2 * reach)[only_ours].all())
    assert 50 < int(theirs.sum()) < 2950
    assert int(each.certified.sum()) > int(theirs.sum())
