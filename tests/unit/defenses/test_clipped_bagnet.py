"""Clipped BagNet: the head against its formula, and a certificate that looks at every rival."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.defenses.clipped_bagnet import LEVELS, ClippedBagNet, clipped
from bagcert.errors import UsageError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import RULES
from tests import refused, tiny


def pixel_scorer(size: tuple[int, int], slope: float = 160.0, shift: float = -60.0) -> RegionScorer:
    """Each class is a channel: z = slope * x + shift in every pixel."""
    layer = nn.Conv2d(3, 3, 1)
    layer.weight.data = slope * torch.eye(3)[:, :, None, None]
    layer.bias.data.fill_(shift)
    return RegionScorer(nn.Sequential(layer.requires_grad_(False)), tiny.COLORS, size)


def formula(z: float) -> float:
    """What is rounded to the score."""
    return 1000 * (1 + math.tanh(0.05 * z - 1)) / 2


def test_head_is_the_rounded_formula():
    z = torch.linspace(-150, 190, 50_001)
    found = clipped(z[None, None, None])[0, 0, 0].tolist()
    exact = [formula(value) for value in z.double().tolist()]
    near = sum(abs(value % 1 - 0.5) < 1e-3 for value in exact)
    different = [(f, e) for f, e in zip(found, exact, strict=True) if f != math.floor(e + 0.5)]
    assert all(abs(e % 1 - 0.5) < 1e-3 for _, e in different)
    assert len(different) <= near < 500
    assert set(found) == set(range(1001))


def test_head_never_falls():
    edges = torch.tensor([20 * (math.atanh(2 * (k - 0.5) / 1000 - 1) + 1) for k in range(1, 1001)])
    around = torch.stack([torch.nextafter(edges, edges - 1), edges, torch.nextafter(edges, edges + 1)], 1)
    found = clipped(around.flatten()[None, None, None]).flatten()
    assert bool((found.diff() >= 0).all())
    assert (found[0].item(), found[-1].item()) == (0, 1000)


def test_head_stays_in_range():
    extremes = torch.tensor([[[[math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-45]]]])
    assert clipped(extremes).flatten().tolist() == [1000, 0, 0, 1000, 0, 119]


def test_score_map_is_the_head_on_real_scores():
    defense = ClippedBagNet(pixel_scorer((4, 5)))
    images = np.random.default_rng(0).integers(0, 256, (3, 4, 5, 3), dtype=np.uint8)
    found = defense.score_map(images)
    assert (found.low, found.high, found.slack) == (0, LEVELS, None)
    for index, image in enumerate(images):
        for c in range(3):
            for row, col in np.ndindex(4, 5):
                exact = formula(160 * (float(image[row, col, c]) / 255) - 60)
                assert abs(found.scores[index, c, row, col].item() - exact) < 0.501
    assert torch.equal(defense.score_map(images[0]).scores, found.scores[:1])


def test_score_map_of_wrong_images_refused():
    layer = nn.Conv2d(3, 2, 5)
    defense = ClippedBagNet(RegionScorer(nn.Sequential(layer), ("a", "b"), (8, 8)))
    refused(UsageError, None, defense.score_map, np.zeros((1, 4, 4, 3), dtype=np.uint8))
    refused(UsageError, r"must lie in \[0, 1\]", defense.score_map, np.full((1, 3, 8, 8), 2.0))


def test_score_map_tolerance_is_slack():
    scorer = pixel_scorer((4, 5))
    images = tiny.pixels(np.array([0, 1]), (4, 5), 60)
    scorer.tolerance = 1e-9
    assert ClippedBagNet(scorer).score_map(images).slack.float().mean() < 0.01
    scorer.tolerance = 0.5
    found = ClippedBagNet(scorer, patch=1).certify(images)
    assert found.locality == "measured"
    loose = ClippedBagNet(scorer).score_map(images)
    z = scorer.real_scores(images)
    assert bool((clipped(z + 0.5) - loose.scores <= loose.slack).all())
    assert bool((loose.scores - clipped(z - 0.5) <= loose.slack).all())
    assert loose.slack.max() >= 12


@pytest.mark.parametrize("rule", RULES)
def test_predictions_are_those_of_the_certificate(rule):
    defense = ClippedBagNet(pixel_scorer((6, 6)), rule, patch=1)
    images = tiny.pixels(np.arange(9) % 3, (6, 6), 120)
    found = defense.certify(images)
    assert torch.equal(defense.predict(images), found.prediction)
    assert (found.rule, defense.guarantee) == (rule, RULES[rule].guarantee)
    assert defense.forward_passes() == 1


def test_unknown_rule_refused():
    refused(UsageError, "did you mean vote", ClippedBagNet, pixel_scorer((4, 4)), "votes")


def test_patches_break_exactly_what_is_not_certified():
    defense = ClippedBagNet(pixel_scorer((5, 5)), patch=1)
    images = tiny.pixels(np.arange(12) % 3, (5, 5), 40, seed=2)
    clean = defense.certify(images)
    changed = torch.zeros(len(images), dtype=torch.bool)
    for row, col in np.ndindex(5, 5):
        for channel in range(3):
            patched = images.copy()
            patched[:, row, col] = [255 * (channel == c) for c in range(3)]
            changed |= defense.predict(patched) != clean.prediction
    assert 0 < clean.certified.sum() < len(images)
    assert torch.equal(changed, ~clean.certified)  # the vote is exact, and this attack the strongest


def test_the_runner_up_is_not_the_only_rival():
    """Green is next to red in sum and evenly so; blue has one pixel left to win, where red stands at the top."""
    image = np.zeros((1, 3, 4, 3), dtype=np.uint8)
    image[..., 0], image[..., 1], image[..., 2] = 255, 159, 255
    image[0, 2, 3, 2] = 0
    image[0, 2, 2, 2] = 96
    defense = ClippedBagNet(pixel_scorer((3, 4)), patch=1)
    scores = defense.score_map(image).scores[0].flatten(1).tolist()
    red, green, blue = map(sum, scores)
    assert red > green > blue

    def margin(rival: list[int]) -> int:
        return sum(scores[0]) - sum(rival) - max(1000 + a - b for a, b in zip(scores[0], rival, strict=True))

    assert margin(scores[1]) >= 0  # the false certificate of a rule that looks at the runner-up alone
    found = defense.certify(image)
    assert (found.prediction.item(), found.margin.item()) == (0, margin(scores[2]))
    assert not found.certified.item()
    image[0, 2, 3] = (0, 0, 255)
    assert found.worst_placement.tolist() == [[[2, 3, 1, 1]]]
    assert defense.predict(image).item() == 2
