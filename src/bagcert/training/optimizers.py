"""Optimizers, learning-rate schedules and the moving average of the weights."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from bagcert.nets.region_scorer import RegionScorer
from bagcert.training.muon import MuonAdamW
from bagcert.training.recipe import OptimizerSection, Recipe


def make_optimizer(recipe: Recipe, scorer: RegionScorer) -> Optimizer:
    """Creates the optimizer of a recipe, with weight decay on kernels but not on batch norm or biases."""
    kernels = [p for p in scorer.net.parameters() if p.ndim > 1]
    others = [p for p in scorer.net.parameters() if p.ndim <= 1]
    others += [] if scorer.readout is None else list(scorer.readout.parameters())
    return OPTIMIZERS[recipe.optimizer.name](recipe.optimizer, kernels, others)


def _groups(section: OptimizerSection, kernels: list[Parameter], others: list[Parameter]) -> list[dict[str, Any]]:
    return [{"params": kernels, "weight_decay": section.weight_decay}, {"params": others, "weight_decay": 0.0}]


def _adamw(section: OptimizerSection, kernels: list[Parameter], others: list[Parameter]) -> Optimizer:
    return torch.optim.AdamW(_groups(section, kernels, others), section.learning_rate)


def _muon(section: OptimizerSection, kernels: list[Parameter], others: list[Parameter]) -> Optimizer:
    *inner, classifier = kernels
    rate = section.learning_rate
    return MuonAdamW(inner, [classifier, *others], rate, rate * section.others_share, section.weight_decay)


def _sgd(section: OptimizerSection, kernels: list[Parameter], others: list[Parameter]) -> Optimizer:
    groups, momentum = _groups(section, kernels, others), section.momentum
    return torch.optim.SGD(groups, section.learning_rate, momentum=momentum, nesterov=momentum > 0)


OPTIMIZERS: dict[str, Callable[[OptimizerSection, list[Parameter], list[Parameter]], Optimizer]] = {
    "adamw": _adamw,
    "muon": _muon,
    "sgd": _sgd,
}
"""Functions that create an optimizer from its section of the recipe, the kernels and the other parameters.

To add an optimizer, add a function here and its name to `OptimizerSection`.
"""


def learning_rate(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """Returns the learning-rate schedule, as a fraction of the maximum rate."""
    section = recipe.optimizer
    warmup = section.warmup_steps or max(1, round(section.warmup * steps))
    fall = decay_start(recipe, steps)

    def share(step: int) -> float:
        rising = (step + 1) / warmup
        if fall is not None:  # a short run falls before it has risen to the top
            return min(1.0, rising, (steps - step) / max(1, steps - fall))
        if step < warmup:
            return rising
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return share


def decay_start(recipe: Recipe, steps: int) -> int | None:
    """Returns the first step at which the rate of the schedule hold falls; None for other schedules."""
    if recipe.optimizer.schedule != "hold":
        return None
    return steps - round(recipe.optimizer.decay * steps)


def moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """Creates an EMA whose decay grows to `decay` over the first steps, so that the initial weights fade quickly."""

    def update(averages: Any, current: Any, count: Any) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, current, count)

    return update
