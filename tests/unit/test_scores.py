import numpy as np
import pytest
import torch

from bagcert import scores
from bagcert.errors import UnsoundError, UsageError
from bagcert.grid import RegionGrid
from bagcert.rules import RULES
from bagcert.rules.masks import Windows
from bagcert.scores import (
    ScoreMap,
    binarize,
    exact_arithmetic,
    exact_dtype,
    lowest_argmax,
    quantize,
    slack_of,
    tie_penalty,
    window_sums,
)
from bagcert.threat import PatchThreatModel
from tests import refused

GRID = RegionGrid.from_axis(2, 1, 0, (4, 5))


def random_map(low: int, high: int) -> ScoreMap:
    scores = np.random.default_rng(0).integers(low, high + 1, (3, 4, *GRID.map_size))
    return ScoreMap(torch.as_tensor(scores), low, high, GRID)


def test_prediction_is_the_lowest_of_equals():
    scores = torch.zeros(2, 3, *GRID.map_size, dtype=torch.int16)
    scores[1, 1:, 0, 0] = 1
    assert ScoreMap(scores, 0, 1, GRID).predict().tolist() == [0, 1]
    values = torch.randint(0, 3, (50, 7, 4), generator=torch.Generator().manual_seed(0))
    assert (lowest_argmax(values).numpy() == values.numpy().argmax(1)).all()


def test_tie_penalty():
    assert tie_penalty(torch.tensor([0, 2]), 4).tolist() == [[0, 0, 0, 0], [1, 1, 0, 0]]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-2047, 2047), (10**9, 10**9 + 3)])
def test_levels_start_at_zero_and_stay_exact(low, high):
    score_map = random_map(low, high)
    assert torch.equal(score_map.levels().long(), score_map.scores - low)
    assert torch.equal(score_map.levels(slice(1, 2)).long(), score_map.scores[1:2] - low)
    assert score_map.span == high - low


def test_sums_and_parts():
    score_map = random_map(-5, 5)
    assert torch.equal(score_map.class_sums, score_map.scores.sum((2, 3)))
    assert torch.equal(score_map[1:].scores, score_map.scores[1:])
    assert (len(score_map), score_map.classes) == (3, 4)
    assert torch.equal(score_map.transposed().class_sums, score_map.class_sums)


@pytest.mark.parametrize(
    ("scores", "low", "high", "message"),
    [
        (torch.zeros(1, 2, 4, 4, dtype=torch.int16), 0, 1, r"\[batch, classes, 3, 4\]"),
        (torch.zeros(1, 1, 3, 4, dtype=torch.int16), 0, 1, "two classes"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.int16), 1, 1, "low < high"),
        (torch.full((1, 2, 3, 4), 2), 0, 1, r"found \[2, 2\]"),
        (torch.full((1, 2, 3, 4), -1), 0, 1, r"found \[-1, -1\]"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.long), 0, 2**60, "over 12 regions can reach 2"),
        (torch.zeros(1, 2, 3, 4, dtype=torch.long), 0, 10**30, "over 12 regions can reach 2"),
        (torch.full((1, 2, 3, 4), 2**60), 2**60, 2**60 + 1, "over 12 regions can reach 2"),
        (torch.full((1, 2, 3, 4), -(2**60)), -(2**60) - 1, -(2**60), "over 12 regions can reach 2"),
    ],
)
def test_what_is_no_score_map_is_refused(scores, low, high, message):
    refused(UsageError, message, ScoreMap, scores, low, high, GRID)


def test_the_largest_range_whose_sums_are_exact_is_taken():
    regions = GRID.map_size[0] * GRID.map_size[1]
    most = (2**53 - 1) // (4 * regions)
    for low, high in ((0, most), (-most, 0)):
        scores = torch.full((1, 2, *GRID.map_size), low)
        scores[0, 1] = high
        scores[0, 0, 0, 0] = high
        score_map = ScoreMap(scores, low, high, GRID)
        assert score_map.exact_dtype == torch.float64
        levels = score_map.levels()
        assert levels.sum((2, 3)).long().tolist() == [[most, most * regions]]
        refused(UsageError, "where float64 rounds them", ScoreMap, scores, low - (low < 0), high + (high > 0), GRID)


def test_a_slack_beyond_counting_is_at_most_the_range():
    scores = torch.full((1, 2, *GRID.map_size), 5)
    slack = torch.full_like(scores, torch.iinfo(torch.int64).max)
    worst = ScoreMap(scores, 0, 9, GRID, slack).worst_case(torch.tensor([1]))
    assert worst.scores[0, 0].unique().tolist() == [9]
    assert worst.scores[0, 1].unique().tolist() == [0]


@pytest.mark.parametrize("rule", ["double-masking", "detection"])
def test_a_range_whose_sums_would_round_certifies_nothing(rule):
    """A rival ahead by one: float64 rounds it away, in the sum of all regions or of those outside a mask."""
    scores = torch.full((1, 2, *GRID.map_size), 2**60)
    scores[0, 0] -= 1
    with pytest.raises(UsageError, match="scale the scores down"):
        RULES[rule].certify(ScoreMap(scores, 0, 2**60, GRID), PatchThreatModel.parse("1", GRID.image_size))


def test_heads():
    z = torch.tensor([0.0, -0.1, 0.1, float("nan"), float("inf"), -float("inf"), 0.25]).reshape(1, 1, 1, 7)
    assert binarize(z).flatten().tolist() == [0, 0, 1, 0, 1, 0, 1]
    assert quantize(z, 10.0).flatten().tolist() == [0, -1, 1, -2047, 2047, -2047, 2]
    z = torch.tensor([0.26, -0.26, 204.66, 204.76, 300.0, -204.76, -300.0, 1e30, -1e30]).reshape(1, 1, 1, 9)
    assert quantize(z, 10.0).flatten().tolist() == [3, -3, 2047, 2047, 2047, -2047, -2047, 2047, -2047]


@pytest.mark.parametrize("classes", [3, scores.MANY_CLASSES])
def test_window_sums_are_exact_at_the_limit_of_float32(classes):
    grid = RegionGrid.from_axis(3, 1, -1, (32, 32))
    assert exact_dtype(4094, 1024) == torch.float32
    scores = torch.as_tensor(np.random.default_rng(1).choice([-2047, 2047], (2, classes, 32, 32)))
    threat = PatchThreatModel.parse("20x31", (32, 32))
    (block,) = grid.windows(threat)
    with exact_arithmetic(torch.device("cpu")):
        found = window_sums(ScoreMap(scores, -2047, 2047, grid).levels(), block)
    for i, j in np.ndindex(*block.keep.shape):
        mask = torch.as_tensor(np.outer(block.rows[i], block.cols[j]))
        assert torch.equal(found[..., i, j].long(), ((scores + 2047) * mask).sum((2, 3)))


@pytest.mark.parametrize("classes", [scores.MANY_CLASSES - 1, scores.MANY_CLASSES])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_layout_in_memory_changes_no_sum(classes, layout):
    grid = RegionGrid.from_axis(2, 1, 0, (6, 8))
    values = torch.as_tensor(np.random.default_rng(2).integers(-5, 6, (3, classes, *grid.map_size)))
    score_map = ScoreMap(values.contiguous(memory_format=layout), -5, 5, grid)
    levels = score_map.levels(torch.tensor([2, 0]))
    assert (levels.stride(1) == 1) == (classes == scores.MANY_CLASSES)
    threat = PatchThreatModel.parse("2x3+1x5", (6, 8))
    found = Windows.of(score_map, threat).sums(levels)
    column = 0
    for block in grid.windows(threat):
        for i, j in np.ndindex(*block.keep.shape):
            mask = torch.as_tensor(np.outer(block.rows[i], block.cols[j]))
            assert torch.equal(found[..., column].long(), ((values[[2, 0]] + 5) * mask).sum((2, 3)))
            column += 1
    assert column == found.shape[-1]


def test_exact_arithmetic_switches_autocast_off():
    before = torch.backends.cuda.matmul.allow_tf32
    ones = torch.ones(32, 32)
    ones[0, 0] = 0
    with torch.autocast("cpu", dtype=torch.bfloat16), exact_arithmetic(torch.device("cpu")):
        assert (torch.ones(1, 32) @ ones @ torch.ones(32, 1)).item() == 1023
    assert torch.backends.cuda.matmul.allow_tf32 == before


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_exact_arithmetic_restores_precision(setting):
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(setting)
        with exact_arithmetic(torch.device("cpu")):
            inside = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
            assert inside == "ieee" or torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)


def test_which_float_type_is_exact():
    assert exact_dtype(4094, 1024) == exact_dtype(1, 2**22 - 1) == torch.float32
    assert exact_dtype(4094, 1025) == exact_dtype(1, 2**22) == torch.float64


def test_a_device_that_cannot_count_is_refused(monkeypatch):
    """Counting to what float32 cannot hold stands for hardware that rounds sooner than it should."""
    scores._check_counting.cache_clear()
    monkeypatch.setattr(scores, "FIXED_POINT_LIMIT", 10**6 + 1)
    with pytest.raises(UnsoundError, match="not exact"), exact_arithmetic(torch.device("cpu")):
        pass
    monkeypatch.undo()
    with exact_arithmetic(torch.device("cpu")):
        pass


@pytest.mark.parametrize(
    ("z", "head", "range_", "expected"),
    [
        ([0.2, -0.2, 1e-4, -1e-4, 0.0, float("nan")], binarize, 1, [0, 0, 1, 1, 1, 1]),
        ([torch.inf, -torch.inf, 3e38], lambda z: quantize(z, 1e-38), 4094, [4094, 4094, 0]),
    ],
)
def test_slack(z, head, range_, expected):
    assert slack_of(torch.tensor(z).view(1, 1, 1, -1), 1e-3, head, range_).flatten().tolist() == expected
