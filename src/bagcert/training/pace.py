"""Estimate of how many epochs fit into a given time, measured with the first batches on a copy of the network.

The copy is discarded. The run starts from its first step with a known number of steps, so that it can be resumed and
reproduced like any run with that number of epochs.
"""

import time
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from bagcert.nets.region_scorer import RegionScorer
from bagcert.threat import PatchThreatModel
from bagcert.training.data import TrainingData
from bagcert.training.distributed import ProcessGroup
from bagcert.training.held_out import validate
from bagcert.training.optimizers import make_optimizer
from bagcert.training.recipe import Recipe
from bagcert.training.step import Losses, Stepper

WARM_UP_STEPS = 2
MEASURED_SECONDS, FEWEST_STEPS, MOST_STEPS = 3.0, 3, 50


@dataclass(frozen=True)
class Pace:
    """Measured speed of training."""

    step_seconds: float
    epoch_steps: int
    validation_seconds: float
    validate_every: int

    @property
    def epoch_seconds(self) -> float:
        """Returns the duration of an epoch, with its share of the validations."""
        return self.step_seconds * self.epoch_steps + self.validation_seconds / self.validate_every

    def epochs(self, seconds: float) -> int:
        """Returns the largest number of epochs that fit, at least one.

        >>> Pace(0.125, 80, 2.0, 1).epochs(60.0), Pace(0.125, 80, 2.0, 1).epochs(1.0)
        (5, 1)
        """
        return min(1_000_000, max(1, int(seconds / max(self.epoch_seconds, 1e-9))))


def measure_pace(
    recipe: Recipe,
    scorer: RegionScorer,
    threat: PatchThreatModel,
    images: TrainingData,
    accelerator: Accelerator,
    group: ProcessGroup,
    class_weights: Tensor,
) -> Pace:
    """Measures the mean duration of a step (3 to 50 steps in 3 seconds, after 2 warm-up steps), and of a validation."""
    trial = deepcopy(scorer)
    losses = Losses(recipe, trial, threat, accelerator.device)
    share = images.batches.share
    stepper = Stepper(recipe, trial, losses, make_optimizer(recipe, trial), accelerator, group, class_weights, share)
    # Networks with dropout draw from the global generator, which the run must find as it was.
    with torch.random.fork_rng(), closing(images.batches.since(0)) as batches:
        measured, started = -WARM_UP_STEPS, time.monotonic()
        while True:
            with group.together():
                parts = next(batches)
            stepper.step(parts, measured + WARM_UP_STEPS, 0.0).item()
            measured += 1
            if measured == 0:
                started = time.monotonic()
            elapsed = time.monotonic() - started
            enough = measured >= FEWEST_STEPS and elapsed >= MEASURED_SECONDS
            if measured > 0 and group.any(enough or measured >= MOST_STEPS):
                break
    step_seconds = group.mean(elapsed) / measured

    def validation() -> float:
        start = time.monotonic()
        validate(trial, images.held_out, images.held_out_labels, recipe, threat)
        return time.monotonic() - start

    return Pace(step_seconds, images.batches.epoch_steps, group.from_main(validation), recipe.train.validate_every)
