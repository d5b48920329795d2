import numpy as np
import pytest
import torch

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules import RULES
from bagcert.rules.largest import covered_px, distinct_sides, largest_certifiable_px, largest_certified_px
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import refused


def example(grid: RegionGrid) -> ScoreMap:
    generator = np.random.default_rng(0)
    scores = generator.random((12, 3, *grid.map_size)) < np.array([0.2, 0.75, 0.3])[None, :, None, None]
    scores[:3, 1] = True
    return ScoreMap(torch.as_tensor(scores.astype(np.int16)), 0, 1, grid)


@pytest.fixture(params=[(4, 2, -1, (12, 14)), (3, 1, -1, (9, 8)), (2, 3, 0, (11, 11))])
def score_map(request) -> ScoreMap:
    return example(RegionGrid.from_axis(*request.param))


def test_every_side_is_tried(score_map):
    image_size = score_map.grid.image_size
    label = RULES["double-masking"].predict(score_map, PatchThreatModel.parse(1, image_size))
    expected = {name: torch.zeros(len(score_map), dtype=torch.int64) for name in ("vote", "levine-feizi", "masked")}
    for side in range(1, min(image_size) + 1):
        for name in ("vote", "levine-feizi"):
            expected[name][RULES[name].certify(score_map, PatchThreatModel.parse(side, image_size)).certified] = side
        found = RULES["double-masking"].certify(score_map, PatchThreatModel.parse(side, image_size))
        expected["masked"][found.certified & (found.prediction == label)] = side
    for name in ("vote", "levine-feizi"):
        assert torch.equal(largest_certified_px(score_map, name), expected[name])
    assert torch.equal(largest_certifiable_px(score_map, label), expected["masked"])
    assert expected["vote"].max() > 1


def test_sides_with_the_same_windows_are_one(score_map):
    grid, sides = score_map.grid, distinct_sides(score_map.grid)

    def windows(side):
        (block,) = grid.windows(PatchThreatModel.parse(side, grid.image_size))
        return block.rows.tobytes(), block.cols.tobytes()

    changes = [s for s in range(1, min(grid.image_size) + 1) if s == 1 or windows(s) != windows(s - 1)]
    assert list(sides) == changes


def test_a_masking_defense_is_worth_what_its_masks_cover():
    grid = RegionGrid.from_axis(4, 2, -1, (12, 12))
    score_map = example(grid)
    threat = PatchThreatModel.parse("2", grid.image_size)
    found = RULES["double-masking"].certify(score_map, threat)
    covered = covered_px(grid, threat)
    assert covered == 3  # 2 px and 3 px reach the same regions of stride 2
    assert torch.equal(largest_certified_px(score_map, "double-masking", threat=threat), found.certified * covered)
    assert torch.equal(
        largest_certified_px(score_map, "detection", threat=threat, certificate=found), found.certified * covered
    )
    one_region = torch.zeros_like(score_map.scores)
    one_region[:, 1, 2, 2] = 1  # a mask over it leaves class 0
    assert not largest_certified_px(ScoreMap(one_region, 0, 1, grid), "double-masking", threat=threat).any()
    assert covered_px(grid, PatchThreatModel.parse("2+1x9", grid.image_size)) == 3
    assert covered_px(grid, PatchThreatModel.parse("1x9", grid.image_size)) == 1


def test_covered_square_must_fit_into_the_mask():
    grid = RegionGrid.from_axis(1, 1, 0, (8, 8))
    allowed = np.zeros((8, 8), dtype=bool)
    allowed[2:5, 3:6] = True  # room for 3x3; all that a larger square promises there lies in it
    assert covered_px(grid, PatchThreatModel((8, 8), ((3, 3),), 1, allowed)) == 3


def test_covered_square_is_covered_in_every_part_of_the_mask():
    grid = RegionGrid.from_axis(1, 1, 0, (10, 10))
    allowed = np.zeros((10, 10), dtype=bool)
    allowed[:2, :2] = True  # squares of 3 px are no more than 2x2 here
    allowed[5:9, 5:9] = True  # but not here
    assert covered_px(grid, PatchThreatModel((10, 10), ((2, 2),), 1, allowed)) == 2


def test_allowed_placements():
    grid = RegionGrid.from_axis(1, 1, 0, (6, 6))
    allowed = np.zeros((6, 6), dtype=bool)
    allowed[:3] = True
    threat = PatchThreatModel((6, 6), ((2, 2),), 1, allowed)
    assert covered_px(grid, threat) == 2
    assert covered_px(grid, PatchThreatModel((6, 6), ((3, 3),), 1, allowed)) == 3  # no larger one has room
    refused(UsageError, "placements", largest_certified_px, example(grid), "vote", threat=threat)


def test_two_patches():
    grid = RegionGrid.from_axis(1, 1, 0, (6, 6))
    score_map = example(grid)
    two = PatchThreatModel.parse("2*1", (6, 6))
    found = largest_certified_px(score_map, "vote", threat=two)
    assert bool((found <= largest_certified_px(score_map, "vote")).all())
    expected = torch.zeros_like(found)
    for side in range(1, 7):
        expected[RULES["vote"].certify(score_map, PatchThreatModel((6, 6), ((side, side),), 2)).certified] = side
    assert torch.equal(found, expected)
    assert expected.any()


def test_larger_square_certified_where_a_smaller_is_not():
    """Two windows of 3 px count the region in the middle twice; the one window of 5 px counts it once."""
    cols = np.zeros((7, 5), dtype=bool)
    cols[[0, 1, 2], [0, 2, 4]] = True  # four regions see nothing
    grid = RegionGrid(np.ones((1, 5), dtype=bool), cols)
    scores = torch.zeros(2, 2, 1, 7, dtype=torch.int16)
    scores[0, 0] = 1
    score_map = ScoreMap(scores, 0, 1, grid)
    threats = [PatchThreatModel.parse(f"2*{side}", (5, 5)) for side in (3, 5)]
    assert [bool(RULES["vote"].certify(score_map, threat).certified[0]) for threat in threats] == [False, True]
    assert largest_certified_px(score_map, "vote", threat=threats[0]).tolist() == [5, 0]


def test_what_is_missing_is_named():
    score_map = example(RegionGrid.from_axis(1, 1, 0, (6, 6)))
    refused(UsageError, "needs a threat", largest_certified_px, score_map, "double-masking")
    refused(UsageError, "unknown rule", largest_certified_px, score_map, "votes")


def test_a_photo_needs_few_window_sets():
    rows, cols = (np.zeros((16, pixels), dtype=bool) for pixels in (2000, 3000))
    for axis in (rows, cols):
        step = axis.shape[1] // 16
        for region in range(16):
            axis[region, max(0, region * step - step) : (region + 2) * step] = True
    assert len(distinct_sides(RegionGrid(rows, cols))) < 64


def test_a_patch_as_tall_as_the_image():
    """A long image: the largest square there is holds two of twelve columns, and is certified."""
    grid = RegionGrid.from_axis(1, 1, 0, (2, 12))
    scores = torch.zeros(1, 2, 2, 12, dtype=torch.int16)
    scores[0, 0] = 1
    assert largest_certified_px(ScoreMap(scores, 0, 1, grid), "vote").tolist() == [2]


def test_certifiable_is_said_of_the_label_asked_for():
    score_map = example(RegionGrid.from_axis(1, 1, 0, (6, 6)))
    assert bool((largest_certifiable_px(score_map, torch.ones(12, dtype=torch.int64))[:3] > 0).all())
    assert not largest_certifiable_px(score_map, torch.zeros(12, dtype=torch.int64))[:3].any()
