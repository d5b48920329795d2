"""Robust masking: by hand, against the definitions, and attacked with everything there is on tiny maps."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules.robust_masking import exact_share, robust_masking, robust_masking_prediction
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle, refused
from tests.properties.cases import build, from_generator

SHARES = [Fraction(0), Fraction(1, 3), Fraction(1, 2)]


def line(regions: int, field: int = 1) -> RegionGrid:
    """Regions in a row, one px apart, each seeing `field` px."""
    start = np.arange(regions)[:, None]
    pixel = np.arange(regions + field - 1)[None, :]
    return RegionGrid(np.ones((1, 1), dtype=bool), (pixel >= start) & (pixel < start + field))


def row(*classes: list[int], high: int = 9) -> ScoreMap:
    scores = torch.tensor(classes, dtype=torch.int16)[None, :, None]
    return ScoreMap(scores, -high, high, line(scores.shape[3]))


def one_px(score_map: ScoreMap, patches: int = 1) -> PatchThreatModel:
    return PatchThreatModel(score_map.grid.image_size, ((1, 1),), patches)


def test_every_class_loses_its_strongest_window():
    scores = row([2, 2, 2, 2], [9, 0, 0, 0], [-9, -9, -9, 5])
    assert scores.predict().item() == 1  # the shout
    found = robust_masking(scores, one_px(scores))
    # Of 8 a patch silences 2 and 2 more are masked; class 1 keeps its 9 where the patch is elsewhere.
    assert (found.prediction.item(), found.margin.item(), found.rule) == (0, 4 - 9, "robust-masking")
    assert found.worst_placement.tolist() == [[[0, 1, 1, 1]]]


def test_negative_scores_are_no_evidence():
    scores = row([3, 3, 3, 3], [0, 0, 0, 0], [-9, -9, -9, -9])
    found = robust_masking(scores, one_px(scores))
    assert (found.margin.item(), found.certified.item()) == (12 - 3 - 3, True)


def test_a_tie_goes_to_the_lowest_class():
    assert robust_masking_prediction(row([1, 1, 1], [2, 1, 1]), one_px(row([1, 1, 1], [2, 1, 1]))).item() == 0
    first, second = row([2, 2, 2], [1, 1, 0]), row([1, 1, 0], [2, 2, 2])
    assert robust_masking(first, one_px(first)).margin.item() == 0
    assert robust_masking(second, one_px(second)).margin.item() == -1


def test_a_share_of_exactly_the_threshold_is_not_masked():
    scores = row([3, 3, 4, 0], [2, 2, 2, 2])
    for share, masked in ((Fraction(2, 5), False), (Fraction(399_999, 10**6), True)):
        expected = 1 if masked else 0  # 6 against 8, or 10 against 8
        assert robust_masking_prediction(scores, one_px(scores), threshold=share).item() == expected


def test_a_third_is_a_third():
    """In floats 1 / (1 - 1/3) * 4 is below or above 6 by rounding; the bound is 6 exactly."""
    scores = row([4, 4, 4, 1], [0, 0, 0, 4])
    found = robust_masking(scores, one_px(scores), threshold=Fraction(1, 3))
    # at the first window: 9 - 4 = 5 are left of class 0, class 1 may keep 4 / (2/3) = 6
    assert (found.prediction.item(), found.margin.item()) == (0, 5 - 6)
    assert found.rule == "robust-masking:1/3"


def test_two_patches_cost_two_windows_twice():
    scores = row([3] * 9, [0] * 9)
    assert robust_masking(scores, one_px(scores)).margin.item() == 27 - 2 * 3
    found = robust_masking(scores, one_px(scores, 2))
    assert found.margin.item() == 27 - 4 * 3
    assert found.worst_placement.shape == (1, 2, 4)


def test_masks_that_hide_everything_certify_nothing():
    """With nothing left the answer would be class 0 whatever the image: true, and worth nothing."""
    scores = row([3, 3], [0, 0])
    assert robust_masking(scores, one_px(scores)).margin.item() == -1


def test_an_empty_batch():
    scores = row([1, 1, 1], [0, 0, 0])[:0]
    assert robust_masking(scores, one_px(scores)).worst_placement.shape == (0, 1, 4)


@pytest.mark.parametrize("share", [*SHARES, Fraction(4, 7)])
def test_it_equals_the_definitions(share):
    choose = from_generator(np.random.default_rng(share.denominator))
    certified = 0
    for _ in range(75):
        case = build(choose)
        found = robust_masking(case.score_map, case.threat, threshold=share)
        assert torch.equal(found.prediction, robust_masking_prediction(case.score_map, case.threat, threshold=share))
        for image, scores in enumerate(case.scores):
            expected = oracle.robust_masking(scores, case.masks, share)
            assert (int(found.prediction[image]), int(found.margin[image])) == expected
            certified += expected[1] >= 0
    assert certified >= 3


def every_map(classes: int, regions: int, most: int) -> torch.Tensor:
    """All maps of scores 0 ... most; the number of a map has its scores as digits, the first the most significant."""
    digits = classes * regions
    number = torch.arange((most + 1) ** digits)[:, None]
    weight = (most + 1) ** torch.arange(digits - 1, -1, -1)
    return (number // weight % (most + 1)).to(torch.int16).reshape(-1, classes, 1, regions)


@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    ("classes", "regions", "field", "most"), [(2, 4, 1, 2), (3, 3, 1, 2), (2, 5, 2, 1)], ids=["two", "three", "wide"]
)
def test_no_content_of_any_patch_changes_a_certified_map(classes, regions, field, most, share):
    """All maps there are, and everything a patch of one px can make of the regions that see it."""
    grid = line(regions, field)
    threat = PatchThreatModel(grid.image_size, ((1, 1),))
    maps = every_map(classes, regions, most)
    found = robust_masking(ScoreMap(maps, 0, most, grid), threat, threshold=share)
    weight = ((most + 1) ** torch.arange(classes * regions - 1, -1, -1)).reshape(classes, regions)
    number = torch.arange(len(maps))
    broken = torch.zeros(len(maps), dtype=torch.bool)
    for reach in {tuple(np.flatnonzero(seen)) for seen in grid.cols_seen.T}:
        held = weight[:, list(reach)].flatten()
        rest = number - (maps[:, :, 0, list(reach)].flatten(1) * held).sum(1)
        for content in product(range(most + 1), repeat=len(held)):
            attacked = rest + int((torch.tensor(content) * held).sum())
            broken |= found.prediction[attacked] != found.prediction
    assert bool(found.certified.any())
    assert bool(broken.any())
    assert not bool((found.certified & broken).any())


def test_a_bound_that_forgets_the_threshold_is_false():
    """The rival may double what it has elsewhere before its window is masked at T = 1/2."""
    scores = row([1] * 8, [1] * 4 + [0] * 4)
    threat = one_px(scores)
    share = Fraction(1, 2)
    own, rival = scores.scores[0, 0, 0].tolist(), scores.scores[0, 1, 0].tolist()
    undivided = min(
        min(sum(e for k, e in enumerate(own) if k not in (i, j)) for j in range(8))
        - sum(e for k, e in enumerate(rival) if k != i)
        for i in range(8)
    )
    assert undivided > 0  # the defective certificate
    found = robust_masking(scores, threat, threshold=share)
    assert (found.prediction.item(), found.certified.item()) == (0, False)
    attacked = scores.scores.clone()
    attacked[0, :, 0, 7] = torch.tensor([0, 4], dtype=torch.int16)
    assert robust_masking_prediction(ScoreMap(attacked, -9, 9, scores.grid), threat, threshold=share).item() == 1
    assert robust_masking(scores, threat).certified.item()  # T = 0 masks whatever the patch adds


@pytest.mark.parametrize("given", ["1/5", "0.2", Fraction(1, 5)])
def test_threshold_forms(given):
    assert exact_share(given) == Fraction(1, 5)


@pytest.mark.parametrize("given", [0.2, 1, -1, "1", "6/5", "one fifth", "1/0", None, True])
def test_threshold_refused(given):
    refused(UsageError, "an exact share such as '1/5', at least 0 and below 1", exact_share, given)


def test_threshold_denominator_refused():
    refused(UsageError, "a denominator of at most 1,000,000", exact_share, Fraction(0.2))


def test_threshold_scores_too_large():
    scores = ScoreMap(torch.zeros(1, 2, 1, 4, dtype=torch.int64), 0, 2**48, line(4))
    with pytest.raises(UsageError, match="too large for the masking threshold 1/999983"):
        robust_masking(scores, one_px(scores), threshold="1/999983")


def test_large_scores_are_counted_exactly():
    """A lead of one unit in millions, far beyond float32."""
    high = 2**30
    scores = torch.full((1, 2, 1, 4), high, dtype=torch.int64)
    scores[0, 0, 0, 2:] -= 1
    found = robust_masking(ScoreMap(scores, 0, high, line(4)), PatchThreatModel((1, 4), ((1, 1),)))
    assert (found.prediction.item(), found.margin.item()) == (1, 2 * high - (3 * high - 1) - 1)
