"""The three cases of the double-masking proof (docs/method.md, "Double masking"), each by an attack that leads into it.

On a row of seven regions, one per pixel, every 1x1 mask is one region. The clean image is certified for its
favorite class; the attacker owns the last region, so m* is the last mask. The other class is the lowest index in
one run and the favorite in the other, so that no case hangs on the tie rule.
"""

import numpy as np
import pytest
import torch

from bagcert.grid import RegionGrid
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle

FAVORITE = [3, 1, 1, 1, 1, 1, 0]
GRID = RegionGrid.from_axis(1, 1, 0, (1, len(FAVORITE)))
THREAT = PatchThreatModel.parse(1, GRID.image_size)
MASKS = [mask[None] for mask in np.eye(len(FAVORITE), dtype=bool)]
LAST = len(FAVORITE) - 1


def scene(label: int, under_patch: int = 0, classes: int = 3) -> np.ndarray:
    """Scores [classes, 1, 7]: `label` has FAVORITE, its rival only what the attacker writes into the last region."""
    scores = np.zeros((classes, 1, len(FAVORITE)), dtype=np.int16)
    scores[label] = FAVORITE
    scores[1 - label, 0, LAST] = under_patch
    return scores


def answers(scores: np.ndarray) -> tuple[int, bool]:
    """The deployed answer of the real code, and whether it is certified."""
    found = RULES["double-masking"].certify(ScoreMap(torch.as_tensor(scores)[None], 0, 99, GRID), THREAT)
    return int(found.prediction[0]), bool(found.certified[0])


def first_round(scores: np.ndarray) -> list[int]:
    return [oracle.masked_prediction(scores, mask) for mask in MASKS]


def second_round(scores: np.ndarray, mask: int) -> list[int]:
    return [oracle.masked_prediction(scores, MASKS[mask] | other) for other in MASKS]


@pytest.fixture(params=[0, 1])
def label(request) -> int:
    return request.param


def test_the_clean_image_is_certified(label):
    scores = scene(label)
    assert answers(scores) == (label, True)
    assert all(second_round(scores, mask) == [label] * len(MASKS) for mask in range(len(MASKS)))


def test_case_1_all_first_round_labels_agree(label):
    attacked = scene(label, under_patch=4)
    assert first_round(attacked) == [label] * len(MASKS)
    assert answers(attacked)[0] == label


def test_case_2_majority_right(label):
    attacked = scene(label, under_patch=6)
    assert first_round(attacked) == [1 - label] + [label] * LAST  # without its strongest region
    against = second_round(attacked, 0)
    assert against[LAST] == label
    assert set(against[:LAST]) == {1 - label}  # every other second mask would have let the disagreer pass
    assert answers(attacked)[0] == label


def test_case_3_majority_wrong(label):
    attacked = scene(label, under_patch=9)
    assert first_round(attacked) == [1 - label] * LAST + [label]
    assert second_round(attacked, LAST) == [label] * len(MASKS)
    assert oracle.plain_prediction(attacked) == 1 - label  # here the plain vote is lost
    assert answers(attacked)[0] == label


def test_several_patches_in_case_3(label):
    """Two patches, in the last two regions: the union over both is the one that disagrees and passes."""
    scores = np.zeros((3, 1, 9), dtype=np.int16)
    scores[label, 0, :7] = [2, 2, 1, 1, 1, 1, 1]
    grid = RegionGrid.from_axis(1, 1, 0, (1, 9))
    threat = PatchThreatModel.parse("2*1", grid.image_size)
    clean = RULES["double-masking"].certify(ScoreMap(torch.as_tensor(scores)[None], 0, 99, grid), threat)
    assert (int(clean.prediction[0]), bool(clean.certified[0])) == (label, True)
    scores[1 - label, 0, 7:] = 20
    masks = oracle.unions([mask[None] for mask in np.eye(9, dtype=bool)], 2)
    labels = [oracle.masked_prediction(scores, mask) for mask in masks]
    assert labels.count(label) == 1
    attacked = RULES["double-masking"].predict(ScoreMap(torch.as_tensor(scores)[None], 0, 99, grid), threat)
    assert int(attacked[0]) == label


def test_every_content_leads_into_one_case(label):
    """One rival score after the other: the cases follow one another, and the answer never moves."""
    cases = []
    for under_patch in range(20):
        attacked = scene(label, under_patch)
        labels = first_round(attacked)
        majority = oracle.argmax([labels.count(c) for c in range(3)])
        cases.append(1 if len(set(labels)) == 1 else 2 if majority == label else 3)
        assert answers(attacked)[0] == label
    assert cases == sorted(cases)
    assert set(cases) == {1, 2, 3}


def test_vote_may_certify_more_than_masking():
    """The one exception to `double masking certifies at least what the vote does`: nothing is left to count."""
    grid = RegionGrid.from_axis(1, 1, 0, (1, 4))
    threat = PatchThreatModel.parse("1x2", grid.image_size)
    score_map = ScoreMap(torch.tensor([[[[1, 1, 1, 1]], [[0, 0, 0, 0]]]]), 0, 1, grid)
    vote, masked = (RULES[name].certify(score_map, threat) for name in ("vote", "double-masking"))
    assert (int(vote.margin[0]), bool(vote.certified[0])) == (0, True)
    assert (int(masked.margin[0]), bool(masked.certified[0])) == (-1, False)
