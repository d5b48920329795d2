import numpy as np
import pytest
import torch

from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules import masks as windows_module
from bagcert.rules.detection import detection
from bagcert.rules.double_masking import double_masking, double_masking_prediction
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle, refused

GRID = RegionGrid.from_axis(1, 1, 0, (1, 5))


def row(*classes: list[int], high: int = 9) -> ScoreMap:
    return ScoreMap(torch.tensor([[[c] for c in classes]], dtype=torch.int16), 0, high, GRID)


def test_by_hand():
    # without its two strongest regions class 0 has 2 + 1 + 1 against 0 + 0 + 3
    score_map = row([4, 3, 2, 1, 1], [0, 0, 0, 0, 3])
    found = double_masking(score_map, PatchThreatModel.parse(1, (1, 5)))
    assert (found.prediction.item(), found.margin.item()) == (0, 1)
    assert found.worst_placement.tolist() == [[[0, 0, 1, 1], [0, 1, 1, 1]]]
    assert detection(score_map, PatchThreatModel.parse(1, (1, 5))).margin.item() == 4


def test_the_deployed_prediction_may_differ_from_the_plain_one():
    # one region shouts for class 1; with any two regions left out, that one among them, class 0 stays ahead
    score_map = row([2, 2, 2, 2, 0], [0, 0, 0, 0, 9])
    assert score_map.predict().item() == 1
    found = double_masking(score_map, PatchThreatModel.parse(1, (1, 5)))
    prediction = double_masking_prediction(score_map, PatchThreatModel.parse(1, (1, 5)))
    assert found.prediction.item() == prediction.item() == 0
    assert not found.certified.item()


@pytest.mark.parametrize(
    ("scores", "label"),
    [
        ([[6, 6, 0, 1, 2], [0, 6, 4, 2, 5], [0, 0, 5, 6, 6]], 2),
        ([[3, 0, 4, 6, 5], [5, 7, 1, 4, 5], [7, 7, 3, 0, 6]], 2),
        ([[6, 0, 5, 1, 0], [6, 4, 4, 3, 0], [3, 6, 2, 0, 5]], 1),
    ],
)
def test_a_later_disagreer_decides_where_an_earlier_one_fails(scores, label):
    """The earlier one beats the majority label under every second mask, but loses to a third label."""
    literal = oracle.double_masking_prediction(np.array(scores)[:, None], list(np.eye(5, dtype=bool)[:, None]))
    assert double_masking_prediction(row(*scores), PatchThreatModel.parse(1, (1, 5))).item() == literal == label


def test_a_patch_as_large_as_the_image_certifies_nothing():
    score_map = row([9] * 5, [0] * 5)
    for rule in (double_masking, detection):
        found = rule(score_map, PatchThreatModel.parse("1x5", (1, 5)))
        assert (found.prediction.item(), found.certified.item()) == (0, False)
        assert found.margin.item() <= -1


def test_two_windows_that_cover_the_map_certify_nothing():
    score_map = row([9] * 5, [0] * 5)
    assert double_masking(score_map, PatchThreatModel.parse("1x3", (1, 5))).margin.item() == -1
    assert detection(score_map, PatchThreatModel.parse("1x3", (1, 5))).certified.item()
    assert detection(score_map, PatchThreatModel.parse("2*1x3", (1, 5))).margin.item() == -1


def test_several_patches():
    score_map = row([4, 3, 2, 1, 1], [0, 0, 0, 0, 0])
    found = double_masking(score_map, PatchThreatModel.parse("2*1", (1, 5)))
    assert (found.margin.item(), found.worst_placement.shape) == (1, (1, 4, 4))
    assert detection(score_map, PatchThreatModel.parse("2*1", (1, 5))).worst_placement.shape == (1, 2, 4)


def test_too_many_unions_name_the_vote_rule():
    grid = RegionGrid.from_axis(1, 1, 0, (20, 20))
    score_map = ScoreMap(torch.zeros(1, 2, 20, 20, dtype=torch.int16), 0, 1, grid)
    for rule in (double_masking, double_masking_prediction, detection):
        refused(UsageError, r"80,200 unions.*vote rule", rule, score_map, PatchThreatModel.parse("2*1", (20, 20)))


def test_an_empty_batch():
    for patch, windows in (("1", 1), ("2*1", 2)):
        threat = PatchThreatModel.parse(patch, (1, 5))
        empty = ScoreMap(torch.zeros(0, 3, 1, 5, dtype=torch.int16), 0, 1, GRID)
        assert double_masking(empty, threat).worst_placement.shape == (0, 2 * threat.patches, 4)
        assert detection(empty, threat).worst_placement.shape == (0, windows, 4)
        assert double_masking_prediction(empty, threat).shape == (0,)


@pytest.mark.parametrize("greedy", [True, False])
@pytest.mark.parametrize("patch", ["3", "2x4", "3+1x6", "area:6", "allowed"])
def test_a_real_grid_against_every_pair(patch, greedy, monkeypatch):
    """Larger than the property tests, and with the search left to itself, since the greedy pair is mostly the worst."""
    if not greedy:
        monkeypatch.setattr("bagcert.rules.window_pairs._greedy", lambda *arguments: None)
    generator = np.random.default_rng(3)
    grid = RegionGrid.from_axis(4, 2, -1, (16, 20))
    noise = generator.normal(size=(5, 4, *grid.map_size)) + np.array([0.6, 0, 0, -0.4])[None, :, None, None]
    noise[0, 2, :4, :4] += 4
    scores = np.clip(np.round(noise * 3), -7, 7).astype(np.int16)
    allowed = generator.random(grid.image_size) < 0.9 if patch == "allowed" else None
    threat = PatchThreatModel.parse("3+2x4" if patch == "allowed" else patch, grid.image_size, allowed)
    found = double_masking(ScoreMap(torch.as_tensor(scores), -7, 7, grid), threat)
    masks = oracle.mask_set(grid.rows_seen, grid.cols_seen, threat.shapes, allowed)
    flat = np.array(masks).reshape(len(masks), -1)
    for image in range(len(scores)):
        label = int(found.prediction[image])
        left = []
        for mask in flat:
            outside = ~(mask | flat)
            sums = outside @ scores[image].reshape(4, -1).T.astype(int)
            left += [(sums[:, label] - sums[:, c] - (c < label)).min() for c in range(4) if c != label]
        assert int(found.margin[image]) == min(left)


@pytest.mark.parametrize("others", [0, 8], ids=["every class open", "few classes open"])
def test_worst_pair_may_overlap(others):
    """The two windows that share the -3 take 7. Greedily it is 3 + 3, and no window alone takes more than 3."""
    lead = [5, -3, 5, -9, 3, 0, -9, 3, 0] + [1] * 60
    scores = [[lead], [[0] * len(lead)], *[[[-9] * len(lead)]] * others]
    grid = RegionGrid.from_axis(1, 1, 0, (1, len(lead)))
    score_map = ScoreMap(torch.tensor([scores], dtype=torch.int16), -9, 9, grid)
    found = double_masking(score_map, PatchThreatModel.parse("1x2", (1, len(lead))))
    assert (found.prediction.item(), found.margin.item()) == (0, sum(lead) - 7)
    assert found.worst_placement.tolist() == [[[0, 0, 1, 2], [0, 1, 1, 2]]]


def test_chunks_change_nothing(monkeypatch):
    generator = np.random.default_rng(4)
    grid = RegionGrid.from_axis(3, 1, -1, (7, 9))
    scores = torch.as_tensor(generator.integers(-5, 6, (12, 3, *grid.map_size)).astype(np.int16))
    scores[:6, 1] += 2
    score_map = ScoreMap(scores, -5, 7, grid)
    threats = [PatchThreatModel.parse(patch, grid.image_size) for patch in ("2", "3+1x4", "2*5x6")]
    whole = [rule(score_map, threat) for rule in (double_masking, detection) for threat in threats]
    monkeypatch.setattr(windows_module, "CHUNK_ELEMENTS", 100)
    for module in ("double_masking", "union_masking", "window_pairs"):
        monkeypatch.setattr(f"bagcert.rules.{module}.CHUNK_ELEMENTS", 100)
    parts = [rule(score_map, threat) for rule in (double_masking, detection) for threat in threats]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(one.margin, other.margin)
        assert torch.equal(one.prediction, other.prediction)


@pytest.mark.parametrize(
    ("patch", "scores", "label"),
    [
        # a disagreer that only ties with a third, lower class under some pair does not pass
        ("1", [[1, 1, 4, 6, 1], [1, 6, 3, 4, 4], [5, 6, 0, 3, 5]], 2),
        ("2*1", [[1, 1, 4, 1, 2, 1], [0, 4, 1, 1, 3, 3], [1, 1, 6, 6, 0, 0]], 2),
        # one that ties with the majority label passes, being the lower class
        ("1", [[4, 0, 3, 0, 5], [3, 2, 2, 5, 4]], 0),
        ("2*1", [[2, 0, 3, 4, 2, 3], [1, 4, 4, 2, 4, 0]], 0),
        # one with a pair that leaves nothing does not pass
        ("1x2", [[0, 0, 1, 1], [9, 0, 0, 0]], 1),
        ("2*1", [[0, 2, 0, 4], [5, 4, 0, 3]], 1),
        ("2*1", [[3, 5, 0, 5], [6, 3, 0, 5], [3, 0, 3, 0]], 1),
        # the majority label counts where nobody passes, not the plain one
        ("1x2", [[2, 1, 0, 0], [0, 0, 0, 3]], 1),
        # masks over everything have no label: the plain prediction
        ("1x5", [[0, 0, 0, 0, 0], [9, 9, 9, 9, 9]], 1),
        ("2*1x5", [[0, 0, 0, 0, 0], [9, 9, 9, 9, 9]], 1),
        ("2*1x3", [[0, 0, 0, 0, 0], [9, 9, 9, 9, 9]], 1),
    ],
)
def test_the_second_round_by_example(patch, scores, label):
    grid = RegionGrid.from_axis(1, 1, 0, (1, len(scores[0])))
    threat = PatchThreatModel.parse(patch, grid.image_size)
    masks = oracle.unions(oracle.mask_set(grid.rows_seen, grid.cols_seen, threat.shapes), threat.patches)
    assert oracle.double_masking_prediction(np.array(scores)[:, None], masks) == label
    score_map = ScoreMap(torch.tensor([[[c] for c in scores]], dtype=torch.int16), 0, 9, grid)
    assert double_masking_prediction(score_map, threat).item() == label
    assert double_masking(score_map, threat).prediction.item() == label


def test_windows_that_are_not_allowed_have_no_say():
    """Two allowed regions of five, and one no patch reaches: masks elsewhere would call for class 0."""
    grid = RegionGrid(np.ones((1, 1), dtype=bool), np.eye(6, 5, dtype=bool))
    threat = PatchThreatModel((1, 5), ((1, 1),), 1, np.array([[True, True, False, False, False]]))
    scores = [[0, 0, 0, 0, 0, 9], [1, 1, 3, 3, 3, 0]]
    assert oracle.double_masking_prediction(np.array(scores)[:, None], list(np.eye(6, dtype=bool)[:2, None])) == 1
    score_map = ScoreMap(torch.tensor([[[c] for c in scores]]), 0, 9, grid)
    assert double_masking_prediction(score_map, threat).item() == 1


def test_the_worst_unions_are_not_always_the_greedy_ones():
    grid = RegionGrid.from_axis(1, 1, 0, (1, 9))
    scores = [[3, 3, 7, 8, 5, 4, 6, 8, 6], [0, 0, 3, 2, 1, 4, 0, 5, 0]]
    score_map = ScoreMap(torch.tensor([[[c] for c in scores]]), 0, 9, grid)
    found = double_masking(score_map, PatchThreatModel.parse("2*1x2", (1, 9)))
    assert (found.prediction.item(), found.margin.item()) == (0, 3)  # greedily 4
    taken = {cell for _, left, _, width in found.worst_placement[0].tolist() for cell in range(left, left + width)}
    assert sum(scores[0][cell] - scores[1][cell] for cell in range(9) if cell not in taken) == 3


def test_several_patches_over_everything():
    score_map = row([0, 0, 0, 0, 0], [4, 3, 2, 1, 1])
    found = double_masking(score_map, PatchThreatModel.parse("2*1", (1, 5)))
    assert (found.prediction.item(), found.margin.item()) == (1, 0)  # 1 is left, and the tie rule takes it
    for patch in ("2*1x3", "2*1x5"):
        found = double_masking(row([9] * 5, [0] * 5), PatchThreatModel.parse(patch, (1, 5)))
        assert (found.prediction.item(), found.certified.item()) == (0, False)


@pytest.mark.parametrize(
    ("labels", "label"),
    [([0, 1, 1, 0], 0), ([2, 2, 1, 1], 1), ([2, 1, -1, -1], 1), ([-1, -1, 2, -1], 2), ([-1, -1, -1, -1], 7)],
)
def test_majority(labels, label):
    assert windows_module.majority(torch.tensor([labels]), 3, torch.tensor([7])).tolist() == [label]
