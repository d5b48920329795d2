from fractions import Fraction

import pytest
import torch

from bagcert.aggregation import PRODUCT_LIMIT, VALUE_LIMIT, WEIGHT_LIMIT, AttentionPooling, pooling_dtype
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.scores import ScoreMap
from tests import refused


def readout(first=1, skip=1, **parts):
    matrices = {
        "first": torch.full((1, 1), first),
        "first_bias": torch.zeros(1, dtype=torch.int64),
        "second": torch.tensor([[1], [0]]),
        "skip": torch.tensor([[skip], [0]]),
        "bias": torch.zeros(2, dtype=torch.int64),
    }
    return AttentionPooling(**{**matrices, **parts}, heads=1)


@pytest.mark.parametrize("regions", [1, 121, 128, 500])
def test_pooled_value_is_the_rational_rounded_to_even(regions):
    dtype = pooling_dtype(regions)
    most = regions * WEIGHT_LIMIT
    weights = sorted({*range(1, 40), most // 2, most - 3, most - 2, most - 1, most} & set(range(1, most + 1)))
    totals, expected = [], []
    for weight in weights:
        for half in (-255, -129, -3, -1, 1, 3, 129, 253, 255, 257):  # quotients beside every kind of half-integer
            for step in (-1, 0, 1):
                total = half * weight // 2 + step
                totals.append([total, weight])
                expected.append(max(-127, min(127, round(Fraction(total, weight)))))
    pooled = readout().pooled(torch.tensor(totals, dtype=dtype))
    assert pooled[:, 0].tolist() == expected


def test_pooled_and_hidden_values_are_clipped():
    sums = torch.tensor([[400.0, 1.0], [-400.0, 1.0]])
    assert readout().pooled(sums).flatten().tolist() == [127.0, -127.0]
    hidden_only = readout(first=1000, skip=0)
    assert hidden_only.scores(sums)[:, 0].tolist() == [127.0, 0.0]  # 1000 * 127 / 128 is 992


def test_large_map_is_pooled_exactly():
    grid = RegionGrid.from_axis(1, 1, 0, (20, 20))
    weights = torch.full((1, 1, 20, 20), WEIGHT_LIMIT)
    values = torch.full((1, 1, 20, 20), VALUE_LIMIT)
    weights[..., 0, 0] = 2  # so that the sum is no multiple of a power of two
    score_map = ScoreMap(
        torch.cat([weights * values, weights], 1), -PRODUCT_LIMIT, PRODUCT_LIMIT, grid, readout=readout()
    )
    assert score_map.evidence(slice(None)).dtype == torch.float64
    assert score_map.evidence(slice(None)).sum((0, 2)).tolist() == [(399 * 255 + 2) * 511, 399 * 255 + 2]


def test_sums_that_could_round_are_refused():
    refused(UsageError, "hidden layer", readout, first=2**23 // 127 + 1)
    refused(UsageError, "output layer", readout, bias=torch.tensor([2**23, 0]))
