"""De-randomized smoothing against plain loops, under attack, and where published certificates go wrong."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.defenses.derandomized_smoothing import ABLATIONS, DerandomizedSmoothing, ablate, ablation_grid
from bagcert.errors import UsageError
from bagcert.rules import RULES
from bagcert.rules.levine_feizi import levine_feizi
from bagcert.rules.vote import vote
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import refused, tiny

SIZE = (6, 7)
NAMES = ("a", "b", "c")


def mixed_model() -> nn.Module:
    """Of random weights, with votes that differ from position to position."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Conv2d(6, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return nn.Sequential(net, nn.Linear(20, 3)).requires_grad_(False)


def mean_model(weight: torch.Tensor) -> nn.Module:
    """Logits that are linear in the average color."""
    last = nn.Linear(6, len(weight))
    last.weight.data, last.bias.data = weight, torch.zeros(len(weight))
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), last)


def color_model() -> nn.Module:
    """The class is the channel that is brightest on average."""
    return mean_model(torch.cat([torch.eye(3), -torch.eye(3)], 1) * 60)


def colors(**options) -> DerandomizedSmoothing:
    options = {"size_px": 2, "patch": 2, **options}
    return DerandomizedSmoothing(color_model(), tiny.COLORS, (8, 8), **options)


def kept_by_hand(ablation: str, size: int, position: tuple[int, int], image_size: tuple[int, int]) -> np.ndarray:
    height, width = image_size
    kept = np.zeros(image_size, dtype=bool)
    for i in range(height if ablation == "column" else size):
        for j in range(width if ablation == "row" else size):
            row = i if ablation == "column" else (position[0] + i) % height
            col = j if ablation == "row" else (position[1] + j) % width
            kept[row, col] = True
    return kept


def ablated_by_hand(image: np.ndarray, kept: np.ndarray) -> np.ndarray:
    out = np.zeros((6, *kept.shape), dtype=np.float32)
    for channel in range(3):
        for row, col in np.argwhere(kept):
            out[channel, row, col] = image[channel, row, col]
            out[channel + 3, row, col] = np.float32(1) - image[channel, row, col]
    return out


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    return np.random.default_rng(0).random((4, 3, *SIZE)).astype(np.float32)


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("size", [1, 4, 6])
def test_ablation_wraps_around(images, ablation, size):
    positions = [(0, 0), (3, 5), (5, 6), (5, 0)]
    found = ablate(torch.from_numpy(images), torch.tensor(positions), ablation, size)
    for image, position, seen in zip(images, positions, found.numpy(), strict=True):
        assert np.array_equal(seen, ablated_by_hand(image, kept_by_hand(ablation, size, position, SIZE)))


def test_ablation_hides(images):
    poisoned = torch.from_numpy(images[:1]).clone()
    poisoned[:, :, :, 3] = torch.nan
    assert ablate(poisoned, torch.tensor([[0, 4]]), "column", 3).isfinite().all()
    assert ablate(poisoned, torch.tensor([[0, 3]]), "column", 3).isnan().any()


@pytest.mark.parametrize("ablation", ABLATIONS)
@pytest.mark.parametrize("stride", [1, 2, 4])
def test_ablation_grid_is_what_positions_keep(ablation, stride):
    defense = DerandomizedSmoothing(mixed_model(), NAMES, SIZE, ablation=ablation, size_px=3, stride=stride)
    grid = defense.grid
    seen = (grid.rows_seen[:, None, :, None] & grid.cols_seen[None, :, None, :]).reshape(-1, *SIZE)
    assert len(seen) == len(defense.positions) == defense.forward_passes()
    for kept, position in zip(seen, defense.positions.tolist(), strict=True):
        assert np.array_equal(kept, kept_by_hand(ablation, 3, position, SIZE))
    rows, cols = (math.ceil(side / stride) for side in SIZE)
    assert grid.map_size == {"column": (1, cols), "row": (rows, 1), "block": (rows, cols)}[ablation]


@pytest.mark.parametrize("votes", ["threshold", "argmax"])
@pytest.mark.parametrize(("ablation", "stride"), [("column", 1), ("row", 2), ("block", 3), ("block", 1)])
def test_votes_are_those_of_one_ablated_image_at_a_time(images, ablation, stride, votes):
    model = mixed_model()
    defense = DerandomizedSmoothing(
        model, NAMES, SIZE, ablation=ablation, size_px=4, stride=stride, votes=votes, threshold=0.34, at_once=16
    )
    found = defense.score_map(images)
    counted = 0
    for image, scores in zip(images, found.scores.flatten(2).numpy(), strict=True):
        for number, position in enumerate(defense.positions.tolist()):
            seen = ablated_by_hand(image, kept_by_hand(ablation, 4, position, SIZE))
            logits = model(torch.from_numpy(seen)[None])[0].double().numpy()
            share = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
            expected = share >= 0.34 if votes == "threshold" else np.arange(3) == share.argmax()
            assert scores[:, number].tolist() == expected.tolist()
            counted += expected.sum()
    assert 0 < counted < found.scores.numel()
    assert (found.low, found.high, found.slack) == (0, 1, None)


def test_votes_for_several_classes_or_none():
    model = mean_model(torch.zeros(3, 6))
    for threshold, expected in ((0.3, 1), (0.34, 0)):
        defense = DerandomizedSmoothing(model, NAMES, SIZE, threshold=threshold)
        assert (defense.score_map(np.zeros((1, *SIZE, 3), dtype=np.uint8)).scores == expected).all()


def test_votes_of_ties_and_nan():
    model = mean_model(torch.zeros(3, 6))
    black = np.zeros((1, *SIZE, 3), dtype=np.uint8)
    for bias, argmax, threshold in (
        ([1.0, 1.0, 0.0], [1, 0, 0], [1, 1, 0]),
        ([math.nan, 0.0, 0.0], [0, 1, 0], [0, 0, 0]),
        ([0.0, math.inf, 0.0], [0, 1, 0], [0, 0, 0]),
    ):
        model[2].bias.data = torch.tensor(bias)
        for votes, expected in (("argmax", argmax), ("threshold", threshold)):
            scores = DerandomizedSmoothing(model, NAMES, SIZE, votes=votes).score_map(black).scores
            assert scores[0, :, 0, 0].tolist() == expected


def test_votes_take_passes_of_the_given_size(images):
    model, counted = mixed_model(), []
    model.register_forward_pre_hook(lambda net, given: counted.append(len(given[0])))
    maps = []
    maps = []
    for at_once, fixed, sizes in (
        (10, True, [10] * 3),
        (10, False, [10, 10, 8]),
        (64, True, [64]),
        (1, True, [1] * 28),
    ):
        counted.clear()
        defense = DerandomizedSmoothing(model, NAMES, SIZE, at_once=at_once, fixed_batch=fixed)
        maps.append(defense.score_map(images).scores)
        assert counted == sizes  # 4 images at 7 positions
    assert all(torch.equal(found, maps[0]) for found in maps)


def test_votes_do_not_depend_on_batch_norm_or_autocast(images):
    model = nn.Sequential(nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))
    defense = DerandomizedSmoothing(model.requires_grad_(False), NAMES, SIZE, votes="argmax")
    model.train()
    together = defense.score_map(images).scores
    model.train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        alone = torch.cat([defense.score_map(image[None]).scores for image in images])
    assert torch.equal(together, alone)
    assert torch.equal(model[1].running_mean, torch.zeros(4))


def test_tolerance_at_the_threshold():
    model = mean_model(torch.zeros(2, 6))
    model[2].bias.data = torch.tensor([math.log(0.8), math.log(0.2)])
    black = np.zeros((1, 8, 8, 3), dtype=np.uint8)

    def certify(threshold: float, tolerance: float):
        options = {"size_px": 1, "patch": 1, "threshold": threshold, "tolerance": tolerance}
        return DerandomizedSmoothing(model, ("a", "b"), (8, 8), **options).certify(black)

    assert (certify(0.79, 0.0).locality, certify(0.79, 0.001).locality) == ("exact", "measured")
    assert certify(0.79, 0.0).margin.item() == certify(0.79, 0.001).margin.item() == 8 - 2
    assert not certify(0.79, 0.02).certified.item()


def test_tolerance_at_the_argmax(images):
    steady = DerandomizedSmoothing(mixed_model(), NAMES, SIZE, votes="argmax", tolerance=1e-6).score_map(images)
    assert not steady.slack.any()
    loose = DerandomizedSmoothing(mixed_model(), NAMES, SIZE, votes="argmax", tolerance=0.02).score_map(images)
    positions = torch.arange(7)[:, None].repeat(1, 2)
    logits = mixed_model()(ablate(torch.from_numpy(images[:1]).repeat(7, 1, 1, 1), positions, "column", 4))
    for slack, share in zip(loose.slack[0, :, 0].T, logits.softmax(1), strict=True):
        for c in range(3):
            others = max(share[d].item() for d in range(3) if d != c)
            assert slack[c].item() == (abs(share[c].item() - others) <= 0.04)
    assert 0 < loose.slack.sum() < loose.slack.numel()


@pytest.mark.parametrize("rule", RULES)
def test_predictions_are_those_of_the_certificate(images, rule):
    defense = DerandomizedSmoothing(mixed_model(), NAMES, SIZE, size_px=2, votes="argmax", patch=1)
    found = defense.certify(images, rule=rule)
    assert torch.equal(defense.predict(images, rule=rule), found.prediction)
    assert found.rule == rule
    assert defense.certify(images).rule == "vote"
    assert (defense.guarantee, defense.name) == ("recovery", "derandomized-smoothing")


@pytest.mark.parametrize(
    ("rule", "ablation"),
    [("vote", "column"), ("levine-feizi", "row"), ("double-masking", "column"), ("vote", "block")],
)
def test_no_patch_breaks_a_certificate(rule, ablation):
    sizes = {"size_px": 3, "stride": 2} if ablation == "block" else {"size_px": 1}
    defense = colors(rule=rule, ablation=ablation, **sizes)
    labels = np.arange(6) % 3
    images = tiny.pixels(labels, (8, 8), 120, seed=1)
    clean = defense.certify(images)
    patched = [tiny.attacked(image, 2, tiny.EXTREMES[:3]) for image in images]
    owner = np.arange(6).repeat(len(patched[0]))
    changed = defense.predict(np.concatenate(patched)) != clean.prediction[owner]
    assert clean.certified.any()
    assert not (changed & clean.certified[owner]).any()


def test_an_attack_that_must_succeed_does():
    """Against a band as wide as the patch everything is touched by a large enough one."""
    defense = colors(patch="8x4")
    image = tiny.pixels(np.array([0]), (8, 8), 120)
    assert not defense.certify(image).certified.item()
    image[:, :, 2:6] = (0, 0, 255)
    assert defense.predict(image).item() == 2


def test_restricted_placements_and_a_score_map_at_hand():
    defense = colors(size_px=1)
    images = tiny.pixels(np.arange(6) % 3, (8, 8), 60, seed=1)
    allowed = np.zeros((8, 8), dtype=bool)
    allowed[:, 5:] = True
    anywhere, there = defense.certify(images), defense.certify(images, placements=allowed)
    assert (there.margin >= anywhere.margin).all()
    assert (there.margin > anywhere.margin).any()
    again = defense.certify_scores(defense.score_map(images), placements=allowed)
    assert torch.equal(again.margin, there.margin)
    with pytest.raises(UsageError, match="cannot be combined with a PatchThreatModel"):
        defense.certify(images, PatchThreatModel.parse(2, (8, 8)), placements=allowed)


def test_cyclic_positions_at_a_stride_are_counted():
    """p = 32, k = 19, s = 10, W = 224: the gap at the border is 4 px, so 6 positions are touched, not 50 / 10."""
    grid = ablation_grid("column", 19, 10, (224, 224))
    touched = [
        [k for k in range(0, 224, 10) if any((k + i) % 224 in range(left, left + 32) for i in range(19))]
        for left in range(193)
    ]
    assert max(map(len, touched)) == 6
    assert grid.touched_cols(32).sum(1).tolist() == [len(found) for found in touched]
    formula = math.ceil((32 + 19 - 1) / 10)
    assert formula == 5

    worst = max(touched, key=len)
    votes = torch.zeros(1, 2, 1, 23, dtype=torch.int16)
    votes[0, 1] = 1
    own = [first // 10 for first in worst] + [number for number in range(23) if number * 10 not in worst][:11]
    votes[0, 0, 0, own], votes[0, 1, 0, own] = 1, 0
    score_map = ScoreMap(votes, 0, 1, grid)
    assert score_map.class_sums.tolist() == [[17, 6]]
    assert 2 * formula <= 17 - 6  # the false certificate
    threat = PatchThreatModel.parse(32, (224, 224))
    for rule in (levine_feizi, vote):
        found = rule(score_map, threat)
        assert (found.prediction.item(), found.margin.item()) == (0, 17 - 6 - 2 * 6)
    attacked = votes.clone()
    attacked[0, :, 0, [first // 10 for first in worst]] = torch.tensor([[0], [1]], dtype=torch.int16)
    broken = ScoreMap(attacked, 0, 1, grid)
    assert (broken.class_sums.tolist(), broken.predict().item()) == ([[11, 12]], 1)


def test_every_tied_rival_counts():
    """Counts 8, 24, 8 with 2A = 16: safe from the last class, which loses a tie, and not from the first."""
    grid = ablation_grid("column", 4, 1, (40, 40))
    threat = PatchThreatModel.parse(5, (40, 40))
    assert grid.touched_cols(5).sum(1).max() == 8
    votes = torch.zeros(1, 3, 1, 40, dtype=torch.int16)
    votes[0, 1, 0, :24] = votes[0, 0, 0, 24:32] = votes[0, 2, 0, 32:] = 1
    found = levine_feizi(ScoreMap(votes, 0, 1, grid), threat)
    assert (found.prediction.item(), found.margin.item()) == (1, -1)
    assert not vote(ScoreMap(votes, 0, 1, grid), threat).certified.item()
    attacked = votes.clone()
    (reach,) = np.nonzero(grid.touched_cols(5)[10])
    attacked[0, :, 0, reach] = torch.tensor([[1], [0], [0]], dtype=torch.int16)
    assert ScoreMap(attacked, 0, 1, grid).predict().item() == 0
    last = votes[:, [2, 1, 0]].clone()
    last[0, 0] = 0  # without the first class it holds
    assert levine_feizi(ScoreMap(last, 0, 1, grid), threat).margin.item() == 0


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_placements_one_by_one_certify_no_less(ablation):
    random = np.random.default_rng(2)
    grid = ablation_grid(ablation, 4, 1 if ablation != "block" else 2, (16, 16))
    votes = random.random((300, 3, *grid.map_size)) < random.random((300, 3, 1, 1)) ** 2
    score_map = ScoreMap(torch.as_tensor(votes.astype(np.int16)), 0, 1, grid)
    threat = PatchThreatModel.parse(2, (16, 16))
    counted, each = levine_feizi(score_map, threat), vote(score_map, threat)
    assert torch.equal(counted.prediction, each.prediction)
    assert bool((each.margin >= counted.margin).all())
    assert int(each.certified.sum()) > int(counted.certified.sum()) > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ablation": "diagonal"}, "an ablation must be one of column, row, block; got 'diagonal'"),
        ({"size_px": 0}, "a column of 0 px does not fit into an image of 6x7 px"),
        ({"size_px": 8}, "a column of 8 px does not fit"),
        ({"ablation": "block", "size_px": 7}, "a block of 7 px does not fit"),
        ({"stride": 0}, "stride between positions must be from 1 to 7 px, got 0"),
        ({"stride": 8}, "must be from 1 to 7 px, got 8"),
        ({"votes": "softmax"}, "votes are threshold or argmax, got 'softmax'"),
        ({"threshold": 0.0}, "must be above 0 and at most 1, got 0"),
        ({"threshold": math.nan}, "must be above 0 and at most 1, got nan"),
        ({"rule": "votes"}, "did you mean vote"),
        ({"at_once": 0}, "at least one ablated image, got 0"),
        ({"tolerance": -0.1}, "at least 0 and below 1"),
        ({"class_names": ("only",)}, "at least two class names, got 1"),
    ],
)
def test_arguments_refused(options, message):
    arguments = {"class_names": NAMES, "image_size": SIZE, **options}
    refused(UsageError, message, DerandomizedSmoothing, mixed_model(), **arguments)


def test_images_and_models_refused(images):
    defense = DerandomizedSmoothing(mixed_model(), NAMES, SIZE)
    with pytest.raises(UsageError, match="this defense is for images of 6x7 px, got 7x6 px"):
        defense.predict(images.transpose(0, 1, 3, 2))
    with pytest.raises(UsageError, match=r"must give \[batch, 2\] logits"):
        DerandomizedSmoothing(mixed_model(), ("a", "b"), SIZE).predict(images)
