"""Muon on convolution kernels: against the definition in float64, and the promises of an optimizer."""

import copy

import numpy as np
import torch
from torch import nn

from bagcert.training.muon import MuonAdamW


def _pair(seed: int = 0) -> tuple[nn.Conv2d, nn.Conv2d]:
    torch.manual_seed(seed)
    return nn.Conv2d(3, 8, 3, bias=True), nn.Conv2d(8, 2, 1)


def _optimizer(inner: nn.Conv2d, classifier: nn.Conv2d, decay: float = 0.0) -> MuonAdamW:
    return MuonAdamW([inner.weight], [inner.bias, *classifier.parameters()], 0.01, 0.005, decay)


def _train(inner: nn.Conv2d, classifier: nn.Conv2d, optimizer: MuonAdamW, steps: int) -> None:
    for step in range(steps):
        images = torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        classifier(inner(images).relu()).square().mean().backward()
        optimizer.step()


def test_first_step_of_a_kernel_is_a_scaled_orthogonal_matrix():
    inner, classifier = _pair()
    before = inner.weight.detach().clone()
    _train(inner, classifier, _optimizer(inner, classifier), 1)
    change = (inner.weight.detach() - before).flatten(1).double().numpy()
    singular = np.linalg.svd(change, compute_uv=False) / (0.01 * 0.2 * np.sqrt(27))
    assert singular.shape == (8,)
    assert singular.min() > 0.5
    assert singular.max() < 1.3


def test_weight_decay_shrinks_a_kernel_by_rate_times_decay():
    inner, classifier = _pair()
    before = inner.weight.detach().clone()
    optimizer = _optimizer(inner, classifier, decay=0.5)
    inner.weight.grad = torch.zeros_like(inner.weight)
    optimizer.step()
    torch.testing.assert_close(inner.weight.detach(), before * (1 - 0.01 * 0.5))


def test_the_rest_is_moved_as_by_adamw():
    (inner, classifier), (other_inner, other) = _pair(), _pair()
    reference = torch.optim.AdamW([other_inner.bias, *other.parameters()], 0.005, weight_decay=0.0)
    images = torch.rand(4, 3, 6, 6)
    other(other_inner(images).relu()).square().mean().backward()
    classifier(inner(images).relu()).square().mean().backward()
    reference.step()
    _optimizer(inner, classifier).step()
    torch.testing.assert_close(inner.bias, other_inner.bias)
    torch.testing.assert_close(classifier.weight, other.weight)


def test_kernels_in_channels_last_take_the_same_steps():
    (inner, classifier), (other_inner, other) = _pair(), _pair()
    optimizer = _optimizer(other_inner, other)
    other_inner.to(memory_format=torch.channels_last)
    _train(inner, classifier, _optimizer(inner, classifier), 3)
    _train(other_inner, other, optimizer, 3)
    torch.testing.assert_close(inner.weight, other_inner.weight, rtol=1e-3, atol=1e-4)


def test_a_schedule_reaches_both_and_survives_loading():
    inner, classifier = _pair()
    optimizer = _optimizer(inner, classifier)
    optimizer.load_state_dict(optimizer.state_dict())
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    _train(inner, classifier, optimizer, 1)
    schedule.step()
    assert [group["lr"] for group in optimizer.muon.param_groups] == [0.005]
    assert [group["lr"] for group in optimizer.adamw.param_groups] == [0.0025]


def test_state_goes_on_where_it_was_saved():
    inner, classifier = _pair()
    optimizer = _optimizer(inner, classifier)
    _train(inner, classifier, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    weights = copy.deepcopy((inner.state_dict(), classifier.state_dict()))
    again_inner, again = _pair(1)
    again_inner.load_state_dict(weights[0])
    again.load_state_dict(weights[1])
    resumed = _optimizer(again_inner, again)
    resumed.load_state_dict(state)
    _train(inner, classifier, optimizer, 2)
    _train(again_inner, again, resumed, 2)
    assert torch.equal(inner.weight, again_inner.weight)
    assert torch.equal(classifier.weight, again.weight)
