"""Heads: one range, one set of integers and one slope, whoever asks."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from bagcert.aggregation import WEIGHT_LIMIT
from bagcert.errors import UnsoundError
from bagcert.grid import RegionGrid
from bagcert.nets.attention_pooling import FIRST_WEIGHT, UNITS, AttentionReadout
from bagcert.nets.heads import HEADS, AttentionHead, BinaryHead, FixedPointHead, HeadName
from bagcert.nets.saved_model import ModelConfig
from bagcert.training.recipe import ModelSection
from tests import refused, tiny


def readout_of(seed=0, classes=4, size=(3, 4)):
    torch.manual_seed(seed)
    readout = AttentionReadout(classes, 6, 2, 5, size)
    torch.nn.init.normal_(readout.position)
    return readout


def heads():
    return [BinaryHead(), FixedPointHead(37.0), AttentionHead(readout_of())]


def odd_scores(spread=2.0):
    z = torch.randn(5, 8, 3, 4, generator=torch.Generator().manual_seed(0)) * spread
    z[0, :, 0] = torch.tensor([torch.inf, -torch.inf, 1e30, -1e30])
    return z


every_head = pytest.mark.parametrize("head", heads(), ids=HEADS)


def test_names_are_those_of_recipes_and_configs():
    assert get_args(HeadName) == HEADS
    for section in (ModelSection, ModelConfig):
        assert get_args(section.model_fields["head"].annotation) == HEADS
    assert tuple(head.name for head in heads()) == HEADS


@every_head
def test_straight_through_is_the_integers(head):
    z = odd_scores()
    found = head.straight_through(z)
    assert torch.equal(found, head.integers(z).float())


@every_head
def test_integers_stay_within_the_range(head):
    z = odd_scores(1e4)
    z[1, :, 1] = torch.nan
    found = head.integers(z)
    assert not found.dtype.is_floating_point
    assert head.low <= found.min()
    assert found.max() <= head.high


@every_head
def test_slope_where_scores_are_clipped(head):
    z = torch.full((1, 8, 3, 4), 20.0).requires_grad_()
    weights = torch.rand(head.integers(z).shape, generator=torch.Generator().manual_seed(0))
    (head.straight_through(z, softness=10.0) * weights).sum().backward()
    assert (z.grad > 0).all()


@every_head
def test_integer_of_a_region_follows_from_its_own_score(head):
    """Whatever else is in the batch, and however it lies in memory: kernels treat the end of a row otherwise."""
    z = torch.randn(7, 8, 3, 4, generator=torch.Generator().manual_seed(1)) * 3
    whole = head.integers(z)
    assert torch.equal(head.integers(z.contiguous(memory_format=torch.channels_last)), whole)
    for image in range(len(z)):
        assert torch.equal(head.integers(z[image : image + 1]), whole[image : image + 1])


@every_head
def test_score_map_has_range_and_aggregation(head):
    score_map = head.score_map(head.integers(odd_scores()), RegionGrid.from_axis(1, 1, 0, (3, 4)))
    assert (score_map.low, score_map.high) == (head.low, head.high)
    assert score_map.readout is head.pooling


def test_attention_weights_are_rounded_exponentials():
    readout = readout_of()
    readout.position.data.zero_()
    halves = np.arange(1.5, WEIGHT_LIMIT)
    logits = np.concatenate([np.log(halves) - 1e-5, np.log(halves) + 1e-5, [-9.0, 0.0, 5.6, 99.0]])
    expected = [min(max(round(math.exp(logit)), 1), WEIGHT_LIMIT) for logit in logits]
    z = torch.zeros(len(logits), 8, 3, 4)
    z[:, 6:] = torch.as_tensor(logits - math.log(FIRST_WEIGHT), dtype=torch.float32)[:, None, None, None]
    weights = readout.integers(z)[:, 6:]
    assert torch.equal(weights, torch.tensor(expected).view(-1, 1, 1, 1).expand_as(weights))


def test_class_scores_are_those_of_plain_integers_with_a_slope():
    head = AttentionHead(readout_of())
    z = torch.randn(6, 8, 3, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    maps = head.straight_through(z)
    found = head.class_scores(maps.sum((2, 3)), 12)
    for image in range(len(z)):
        evidence, nothing = maps[image].detach().long().numpy(), np.zeros((3, 4), dtype=bool)
        assert found[image].tolist() == tiny.readout_scores(head.pooling, evidence, nothing)
    (found[:, 0] - found[:, 1]).sum().backward()
    assert (z.grad.abs().amax((1, 2, 3)) > 0).all()
    saturated = torch.full((1, 8, 3, 4), 15.0).requires_grad_()
    scores = head.class_scores(head.straight_through(saturated).sum((2, 3)), 12)
    (scores[:, 0] - scores[:, 1]).sum().backward()
    assert (saturated.grad[:, :6].abs() > 0).any()


def test_attention_pooling_has_no_slack():
    head = AttentionHead(readout_of())
    assert head.slack(odd_scores(), 0.0) is None
    refused(UnsoundError, "locality is exact", head.slack, odd_scores(), 1e-6)


def test_freeze_once():
    scorer = tiny.attention_scorer()
    assert scorer.form.pooling is not scorer.form.pooling
    assert scorer.freeze().form.pooling is scorer.form.pooling


@pytest.mark.parametrize("change", ["train", "load_state_dict"])
def test_freeze_sees_new_weights(change):
    scorer = tiny.attention_scorer().freeze()
    before = scorer.form.pooling
    if change == "train":
        scorer.train()
        scorer.readout.skip.bias.data += 1
        scorer.eval()
    else:
        state = {name: tensor.clone() for name, tensor in scorer.state_dict().items()}
        state["readout.skip.bias"] += 1
        scorer.load_state_dict(state)
    after = scorer.form.pooling
    assert torch.equal(after.bias, before.bias + 128 * UNITS)


def test_freeze_without_a_readout():
    scorer = tiny.color_model().scorer.freeze()
    assert scorer.form.pooling is None
