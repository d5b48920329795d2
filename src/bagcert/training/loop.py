"""Training: one readable loop from a recipe to a model folder.

A run folder holds `recipe.toml`, `metrics.jsonl`, `checkpoint.pt` while it runs, and in the end the model
(`model.safetensors`, `config.json`). The order of images and every augmentation follow from (seed, step)
alone, so a run that is killed and resumed ends with the weights of one that was not, and several processes train what
one would.
"""

import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bagcert
from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.devices import keep_freed_memory, resolve_device
from bagcert.errors import BagcertError, UsageError
from bagcert.nets import get_architecture
from bagcert.nets.region_scorer import RegionScorer, not_finite
from bagcert.nets.saved_model import ModelConfig, normalization, read_model, write_model
from bagcert.rules import get_rule
from bagcert.threat import PatchThreatModel
from bagcert.training.batches import Part, Share
from bagcert.training.checkpoint import RunFolder
from bagcert.training.data import load_training_data
from bagcert.training.distributed import Team
from bagcert.training.held_out import scale_of, validate, validation_scores
from bagcert.training.interval import BoundedLoss
from bagcert.training.launcher import processes_here
from bagcert.training.muon import MuonAdamW
from bagcert.training.objective import make_objective, network_input
from bagcert.training.random import BatchDraws
from bagcert.training.recipe import Recipe
from bagcert.training.synchronized import synchronize_batch_norm

CHECK_LOSS_EVERY = 20


@dataclass
class Progress:
    """Where a run stands, handed to the caller after every step."""

    step: int
    steps: int
    epoch: int
    loss: float = math.nan
    validation: dict[str, int | float] | None = None


def train(
    recipe: Recipe,
    out: Path,
    data: str | ImageSet | None = None,
    resume: bool = False,
    init: Path | None = None,
    limit: int | None = None,
    device: str = "auto",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> Path:
    """Trains by `recipe` and leaves the model in the folder `out`, which is returned.

    Args:
        data: a data set or its name, instead of the recipe's.
        resume: go on from the checkpoint in `out`.
        init: a model folder whose weights to start from; a classifier for other classes starts afresh.
        limit: train on the first so many images only.
        device: "auto", "cpu", "cuda", "cuda:N" or "mps".
        on_progress: called after every step.

    Raises:
        UsageError: the recipe does not fit the data, or `out` holds another run.
        BagcertError: the loss is not finite, or the run was interrupted; the checkpoint in `out` is whole.
    """
    accelerator = _accelerator(device)
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
    torch.manual_seed(recipe.train.seed)
    team = Team()
    with team.together():
        source = data if isinstance(data, ImageSet) else load_dataset(data or recipe.data.name, "train", limit)
        images = load_training_data(source, recipe, accelerator.device, team.index, team.size)
        config = _model_config(recipe, images.training, images.sample)
        scorer = config.build()
        if init is not None:
            _start_from(scorer, init)
        threat = PatchThreatModel.parse(recipe.defense.patch, config.image_size)
        objective = make_objective(recipe, scorer, threat, accelerator.device)
        bounded = None
        if recipe.loss.name == "interval-bounds":
            bounded = BoundedLoss(scorer, threat, recipe.loss.full_weight, accelerator.device)
    class_weights = torch.ones(len(images.training.class_names))
    if recipe.data.class_weights:
        class_weights = torch.as_tensor(images.training.class_weights(), dtype=torch.float32)
    class_weights = class_weights.to(accelerator.device)

    epoch_steps = images.batches.epoch_steps
    steps = epoch_steps * recipe.train.epochs
    scorer.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a torch stub gap
    if team.size > 1:
        synchronize_batch_norm(scorer)
    optimizer = _optimizer(recipe, scorer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(recipe, steps))
    average = AveragedModel(scorer, multi_avg_fn=_moving_average(recipe.train.ema), use_buffers=True)
    run = RunFolder(out, recipe, scorer, average, optimizer, schedule, steps, _decay_start(recipe, steps))
    with team.together():
        if team.is_main:
            run.open(resume)
    if team.size > 1:  # also where a folder is not shared, and where machines do not round alike
        run.take(team.from_main(run.content))
    model, optimizer = accelerator.prepare(scorer, optimizer)
    forward = torch.compile(model) if recipe.train.compile else model

    def save_model() -> None:
        scale = 1.0
        if config.head == "fixed-point" and not config.ablated:
            scale = scale_of(validation_scores(run.shipping, images.held_out))
        provenance = _provenance(source, images.training, accelerator, run.seconds, limit)
        # A model that a run starts from brings its normalization.
        normalize = normalization(run.shipping.state_dict(), config)
        changes = {"scale": scale, "provenance": provenance, **normalize}
        write_model(out, run.shipping, config.model_copy(update=changes))

    started, seconds_before = time.monotonic(), run.seconds
    running, counted = torch.zeros((), device=accelerator.device), 0
    with _interruptions(team.size > 1) as interrupted, closing(images.batches.since(run.step)) as batches:
        while run.step < steps:
            with team.together():
                parts = next(batches)
            weights = [class_weights[part.labels] for part in parts]
            whole_weight = accelerator.reduce(torch.stack([weight.sum() for weight in weights]).sum(), "sum")
            optimizer.zero_grad(set_to_none=True)
            for part, weight in zip(parts, weights, strict=True):
                generator = _draws(accelerator.device, recipe.train.seed, run.step, images.batches.share, part)
                batch = network_input(part.images, part.labels, recipe, generator, scorer, objective, autocast)
                model.train()
                # The processes meet where the gradients of the last part are made.
                with nullcontext() if part is parts[-1] else accelerator.no_sync(model):
                    with autocast:
                        z = forward(batch)
                    loss = objective(z, part.labels, generator)
                    if bounded is not None:
                        with autocast:
                            loss = bounded(loss, batch, part.labels, run.step / steps, generator)
                    # Gradients are averaged over the processes; this process's share counts as often as there are.
                    loss = (loss * weight).sum() / whole_weight * team.size
                    accelerator.backward(loss)
                running = running + loss.detach()
            if recipe.optimizer.gradient_clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.gradient_clip)
            optimizer.step()
            schedule.step()
            average.update_parameters(scorer)
            run.step, counted = run.step + 1, counted + 1

            stop = team.any(interrupted())
            epoch, position = divmod(run.step - 1, epoch_steps)
            epoch_ends = position == epoch_steps - 1
            saves = stop or epoch_ends or run.step == run.decay_start or run.step % recipe.train.checkpoint_every == 0
            progress = Progress(run.step, steps, epoch + 1)
            if saves or run.step % CHECK_LOSS_EVERY == 0:
                progress.loss = team.mean(running.item() / counted)
                running, counted = torch.zeros_like(running), 0
                if not math.isfinite(progress.loss) or (saves and not_finite(scorer.state_dict())):
                    raise BagcertError(
                        f"the loss or a weight is not finite at step {run.step} (epoch {epoch + 1}); the last good "
                        f"checkpoint is kept in {out}: try a lower optimizer.learning_rate or train.precision=fp32"
                    )
            run.seconds = seconds_before + time.monotonic() - started
            validates = epoch_ends and ((epoch + 1) % recipe.train.validate_every == 0 or run.step == steps)
            with team.together() if saves else nullcontext():
                if validates and team.is_main:
                    progress.validation = validate(
                        run.shipping, images.held_out, images.held_out_labels, recipe, threat
                    )
                    run.log(
                        epoch=epoch + 1,
                        loss=progress.loss,
                        learning_rate=float(schedule.get_last_lr()[0]),
                        **progress.validation,
                    )
                    save_model()
                if saves and team.is_main:
                    run.save()
            if team.is_main:
                on_progress(progress)
            if stop:
                raise BagcertError(f"interrupted at step {run.step} of {steps}; --resume goes on from {out}")

    with team.together():
        if team.is_main:
            save_model()
            run.close()
    return out


def _accelerator(device: str) -> Accelerator:
    """The device of this process, and the group of all processes that the launcher started."""
    chosen = resolve_device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        if processes_here() > 1:
            raise UsageError(f"several processes take a device each: say cuda, not {device}")
        torch.cuda.set_device(chosen)
    # Accelerate fixes its mixed precision for the whole process; a process may train twice.
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="no")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    return accelerator


def _model_config(recipe: Recipe, training: ImageSet, images: Tensor) -> ModelConfig:
    architecture = get_architecture(recipe.model.architecture)
    get_rule(recipe.defense.rule)
    pixels = images.float().div_(255) if len(images) <= 10_000 else images[:: len(images) // 10_000].float().div_(255)
    mean = [round(value, 4) for value in pixels.mean((0, 2, 3)).tolist()]
    std = [round(max(value, 1e-3), 4) for value in pixels.std((0, 2, 3)).tolist()]
    if recipe.augment.ablation != "none":  # `[x, 1 - x]`, in which hidden is 0 and stays 0
        mean, std = [0.0] * 6, [1.0] * 6
    return ModelConfig(
        name=recipe.name,
        architecture=recipe.model.architecture,
        width=recipe.model.width or architecture.width,
        depth=recipe.model.depth or architecture.depth,
        padded=recipe.model.padded,
        head=recipe.model.head,
        **recipe.model.readout,
        scale=1.0,
        mean=mean,
        std=std,
        class_names=list(training.class_names),
        image_size=recipe.model.image_size or (images.shape[2], images.shape[3]),
        rule=recipe.defense.rule,
        patch=recipe.defense.patch,
        recipe=recipe.model_dump(exclude_none=True),
    )


def _start_from(scorer: RegionScorer, folder: Path) -> None:
    """Copies the weights of a model; the last layer starts afresh if the classes differ."""
    start = read_model(folder)[0]
    given, own = start.state_dict(), scorer.state_dict()
    head = set(scorer.class_layers)
    for name in sorted(given.keys() | own.keys()):
        if name in head and start.class_names != scorer.class_names:
            continue
        if name not in given or name not in own or given[name].shape != own[name].shape:
            raise UsageError(f"the model in {folder} cannot start this recipe: tensor {name!r} does not fit")
        own[name].copy_(given[name])


def _optimizer(recipe: Recipe, scorer: RegionScorer) -> torch.optim.Optimizer:
    """Weight decay on kernels only, not on batch norm or biases."""
    section = recipe.optimizer
    kernels = [p for p in scorer.net.parameters() if p.ndim > 1]
    others = [p for p in scorer.net.parameters() if p.ndim <= 1]
    others += [] if scorer.readout is None else list(scorer.readout.parameters())
    groups = [{"params": kernels, "weight_decay": section.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if section.name == "muon":
        *inner, classifier = kernels
        rate = section.learning_rate
        return MuonAdamW(inner, [classifier, *others], rate, rate * section.others_share, section.weight_decay)
    if section.name == "sgd":
        return torch.optim.SGD(groups, section.learning_rate, momentum=section.momentum, nesterov=section.momentum > 0)
    return torch.optim.AdamW(groups, section.learning_rate)


def _learning_rate(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """The schedule, as a share of the top rate."""
    section = recipe.optimizer
    warmup = section.warmup_steps or max(1, round(section.warmup * steps))
    decay_start = _decay_start(recipe, steps)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if decay_start is not None:
            return min(1.0, (steps - step) / max(1, steps - decay_start))
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return share


def _decay_start(recipe: Recipe, steps: int) -> int | None:
    """The first step at which a held learning rate falls; None for other schedules."""
    if recipe.optimizer.schedule != "hold":
        return None
    return steps - round(recipe.optimizer.decay * steps)


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential average that forgets the first weights fast: its decay grows to `decay` as steps go by."""

    def update(averages: Any, current: Any, count: Any) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, current, count)

    return update


def _draws(device: torch.device, seed: int, step: int, share: Share, part: Part) -> BatchDraws:
    """The random numbers of a step, and of them those for the images of one part."""
    mixed = int(np.random.SeedSequence((seed, step, 0)).generate_state(1, np.uint64)[0] >> 1)
    return BatchDraws(torch.Generator(device).manual_seed(mixed), share.batch, part.rows)


def _provenance(
    source: ImageSet, training: ImageSet, accelerator: Accelerator, seconds: float, limit: int | None
) -> dict[str, Any]:
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "data": Path(source.name).name,
        "training_images": len(training),
        "limit": limit,
        "device": f"{device.type} ({name})",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "training_seconds": round(seconds, 1),
        "versions": {"bagcert": bagcert.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }


@contextmanager
def _interruptions(several: bool) -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a question asked between steps, so that every saved state is whole.

    With several processes a launcher repeats what it is told, so that only for one a second Ctrl-C means more.
    """
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked and not several:  # the second Ctrl-C is meant
            raise KeyboardInterrupt
        asked = True

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
