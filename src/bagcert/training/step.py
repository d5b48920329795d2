"""One optimizer step, with gradient accumulation over the parts of a batch."""

from contextlib import nullcontext

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor

from bagcert.nets.region_scorer import RegionScorer
from bagcert.threat import PatchThreatModel
from bagcert.training.batches import BatchPart, Share
from bagcert.training.distributed import ProcessGroup
from bagcert.training.interval import BoundedLoss
from bagcert.training.objective import Objective, make_objective, network_input
from bagcert.training.random import ShardedGenerator
from bagcert.training.recipe import Recipe
from bagcert.training.teacher import Teacher


class Losses:
    """The objective of a recipe for one network, and the interval bound loss and the teacher if the recipe has them."""

    def __init__(self, recipe: Recipe, scorer: RegionScorer, threat: PatchThreatModel, device: torch.device) -> None:
        self.objective: Objective = make_objective(recipe, scorer, threat, device)
        self.bounded: BoundedLoss | None = None
        if recipe.loss.name == "interval-bounds":
            self.bounded = BoundedLoss(scorer, threat, recipe.loss.full_weight, device)
        self.teacher = None if recipe.loss.teacher is None else Teacher(recipe.loss, scorer, device)


class Stepper:
    """Performs optimizer steps."""

    def __init__(
        self,
        recipe: Recipe,
        scorer: RegionScorer,
        losses: Losses,
        optimizer: torch.optim.Optimizer,
        accelerator: Accelerator,
        group: ProcessGroup,
        class_weights: Tensor,
        share: Share,
    ) -> None:
        self.recipe, self.scorer, self.losses = recipe, scorer, losses
        self.accelerator, self.group, self.class_weights, self.share = accelerator, group, class_weights, share
        self.model, self.optimizer = accelerator.prepare(scorer, optimizer)
        self.forward = torch.compile(self.model) if recipe.train.compile else self.model
        self.autocast = torch.autocast(
            accelerator.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16"
        )

    def step(self, parts: list[BatchPart], step: int, done: float) -> Tensor:
        """Updates the weights and returns this process's loss before the update.

        Args:
            step: number of the step, from 0, which seeds the random numbers.
            done: share of finished steps, from 0 to 1.
        """
        weights = [self.class_weights[part.labels] for part in parts]
        whole_weight = self.accelerator.reduce(torch.stack([weight.sum() for weight in weights]).sum(), "sum")
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.accelerator.device)
        for part, weight in zip(parts, weights, strict=True):
            # Gradients are synchronized in the backward pass of the last part only.
            with nullcontext() if part is parts[-1] else self.accelerator.no_sync(self.model):
                # Gradients are averaged over the processes, hence the factor.
                loss = (self._losses(part, step, done) * weight).sum() / whole_weight * self.group.size
                self.accelerator.backward(loss)
            total = total + loss.detach()
        if self.recipe.optimizer.gradient_clip is not None:
            self.accelerator.clip_grad_norm_(self.model.parameters(), self.recipe.optimizer.gradient_clip)
        self.optimizer.step()
        return total

    def _losses(self, part: BatchPart, step: int, done: float) -> Tensor:
        recipe, losses = self.recipe, self.losses
        generator = _draws(self.accelerator.device, recipe.train.seed, step, self.share, part)
        batch = network_input(part.images, part.labels, recipe, generator, self.scorer, losses.objective, self.autocast)
        self.model.train()
        with self.autocast:
            z = self.forward(batch)
            targets = None if losses.teacher is None else losses.teacher.targets(batch, part.labels)
        loss = losses.objective(z, part.labels, generator, targets)
        if losses.bounded is not None:
            with self.autocast:
                loss = losses.bounded(loss, batch, part.labels, done, generator)
        return loss


def _draws(device: torch.device, seed: int, step: int, share: Share, part: BatchPart) -> ShardedGenerator:
    """Returns the random numbers of a step for the images of one part."""
    mixed = int(np.random.SeedSequence((seed, step, 0)).generate_state(1, np.uint64)[0] >> 1)
    return ShardedGenerator(torch.Generator(device).manual_seed(mixed), share.batch, part.rows)
