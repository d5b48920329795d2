"""Training: one readable loop from a recipe to a model folder.

A run folder holds `recipe.toml`, `metrics.jsonl`, `checkpoint.pt` while it runs, and in the end the model
(`model.safetensors`, `config.json`). The order of images and every augmentation follow from (seed, step)
alone, so a run that is killed and resumed ends with the weights of one that was not.
"""

import math
import platform
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import bagcert
from bagcert import losses
from bagcert.data import load_dataset
from bagcert.data.augment import cutout, random_crop, random_flip, random_resized_crop
from bagcert.data.image_set import ImageSet
from bagcert.defenses.derandomized_smoothing import ablate, random_positions
from bagcert.defenses.interval_training import BoundedLoss
from bagcert.devices import keep_freed_memory, resolve_device
from bagcert.errors import BagcertError, UsageError
from bagcert.nets import get_architecture
from bagcert.nets.model_folder import ModelConfig, read_model, write_model
from bagcert.nets.region_scorer import RegionScorer, not_finite
from bagcert.optimizers import MuonAdamW
from bagcert.preprocess import Preprocessing
from bagcert.recipe import Recipe
from bagcert.rules import get_rule
from bagcert.run_folder import RunFolder
from bagcert.threat import PatchThreatModel
from bagcert.validation import scale_of, validate, validation_scores

CHECK_LOSS_EVERY = 20

Objective = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""Real scores, labels and a source of random choices to one loss per image."""


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
    chosen = resolve_device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        torch.cuda.set_device(chosen)
    # Accelerate fixes its mixed precision for the whole process; a process may train twice.
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="no")
    autocast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=recipe.train.precision == "bf16")
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    torch.manual_seed(recipe.train.seed)
    source = data if isinstance(data, ImageSet) else load_dataset(data or recipe.data.name, "train", limit)
    training, validation = source.split_off(recipe.data.validation, recipe.data.split_seed)
    prepare = Preprocessing(recipe.model.image_size).apply if recipe.model.image_size else None
    larger = Preprocessing((recipe.augment.resize, recipe.augment.resize)).apply if recipe.augment.resize else prepare
    images = torch.from_numpy(training.array(larger)).permute(0, 3, 1, 2).contiguous().to(accelerator.device)
    labels = torch.from_numpy(training.labels).to(accelerator.device)
    held_out = validation.array(prepare)
    config = _model_config(recipe, training, images)
    scorer = config.build()
    if init is not None:
        _start_from(scorer, init)
    threat = PatchThreatModel.parse(recipe.defense.patch, config.image_size)
    objective = _objective(recipe, scorer, threat, accelerator.device)
    bounded = None
    if recipe.loss.name == "interval-bounds":
        bounded = BoundedLoss(scorer, threat, recipe.loss.full_weight, accelerator.device)
    class_weights = torch.ones(len(training.class_names))
    if recipe.data.class_weights:
        class_weights = torch.as_tensor(training.class_weights(), dtype=torch.float32)
    class_weights = class_weights.to(accelerator.device)

    batch_size = min(recipe.train.batch_size, len(images))
    epoch_steps = len(images) // batch_size
    steps = epoch_steps * recipe.train.epochs
    optimizer = _optimizer(recipe, scorer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _learning_rate(recipe, steps))
    scorer.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a torch stub gap
    average = AveragedModel(scorer, multi_avg_fn=_moving_average(recipe.train.ema), use_buffers=True)
    run = RunFolder(out, recipe, scorer, average, optimizer, schedule, steps)
    run.open(resume)
    model, optimizer = accelerator.prepare(scorer, optimizer)
    forward = torch.compile(model) if recipe.train.compile else model

    started, seconds_before = time.monotonic(), run.seconds
    running, counted = torch.zeros((), device=accelerator.device), 0
    with _interruptions() as interrupted:
        while run.step < steps:
            epoch, position = divmod(run.step, epoch_steps)
            order = _epoch_order(recipe.train.seed, epoch, len(images))
            index = order[position * batch_size : (position + 1) * batch_size]
            index = index[accelerator.process_index :: accelerator.num_processes].to(accelerator.device)
            generator = _generator(accelerator.device, recipe.train.seed, run.step, accelerator.process_index)
            batch = augment(images[index], recipe, generator)
            with autocast:
                batch = hardest_cutout(batch, labels[index], recipe, generator, scorer, objective)
            batch = batch.float() / 255
            if recipe.augment.ablation != "none":
                positions = random_positions(len(batch), (batch.shape[2], batch.shape[3]), generator)
                batch = ablate(batch, positions, recipe.augment.ablation, recipe.augment.ablation_size)
            model.train()
            with autocast:
                z = forward(batch.contiguous(memory_format=torch.channels_last))
            loss = objective(z, labels[index], generator)
            if bounded is not None:
                with autocast:
                    loss = bounded(loss, batch, labels[index], run.step / steps, generator)
            weight = class_weights[labels[index]]
            loss = (loss * weight).sum() / weight.sum()
            optimizer.zero_grad(set_to_none=True)
            accelerator.backward(loss)
            if recipe.optimizer.gradient_clip is not None:
                accelerator.clip_grad_norm_(model.parameters(), recipe.optimizer.gradient_clip)
            optimizer.step()
            schedule.step()
            average.update_parameters(scorer)
            run.step += 1
            running, counted = running + loss.detach(), counted + 1

            stop = interrupted()
            epoch_ends = run.step % epoch_steps == 0
            saves = stop or epoch_ends or run.step % recipe.train.checkpoint_every == 0
            progress = Progress(run.step, steps, epoch + 1)
            if saves or run.step % CHECK_LOSS_EVERY == 0:
                progress.loss = running.item() / counted
                running, counted = torch.zeros_like(running), 0
                if not math.isfinite(progress.loss) or (saves and not_finite(scorer.state_dict())):
                    raise BagcertError(
                        f"the loss or a weight is not finite at step {run.step} (epoch {epoch + 1}); the last good "
                        f"checkpoint is kept in {out}: try a lower optimizer.learning_rate or train.precision=fp32"
                    )
            run.seconds = seconds_before + time.monotonic() - started
            if epoch_ends and ((epoch + 1) % recipe.train.validate_every == 0 or run.step == steps):
                progress.validation = validate(run.shipping, held_out, validation.labels, recipe, threat)
                if accelerator.is_main_process:
                    run.log(
                        epoch=epoch + 1,
                        loss=progress.loss,
                        learning_rate=float(schedule.get_last_lr()[0]),
                        **progress.validation,
                    )
            if saves and accelerator.is_main_process:
                run.save()
            on_progress(progress)
            if stop:
                raise BagcertError(f"interrupted at step {run.step} of {steps}; --resume goes on from {out}")

    if accelerator.is_main_process:
        scale = 1.0 if config.ablated else scale_of(validation_scores(run.shipping, held_out))
        provenance = _provenance(source, training, accelerator, run.seconds, limit)
        write_model(out, run.shipping, config.model_copy(update={"scale": scale, "provenance": provenance}))
        run.close()
    return out


def augment(images: Tensor, recipe: Recipe, generator: torch.Generator) -> Tensor:
    """The recipe's augmentation of uint8 [batch, 3, height, width]."""
    if recipe.augment.resized_crop:
        size = recipe.model.image_size or (images.shape[2], images.shape[3])
        images = random_resized_crop(images, size, recipe.augment.resized_crop, generator)
    if recipe.augment.crop:
        images = random_crop(images, recipe.augment.crop, generator, recipe.augment.crop_mode)
    if recipe.augment.flip:
        images = random_flip(images, generator)
    if recipe.augment.cutout and recipe.augment.cutout_candidates == 1:
        images = cutout(images, recipe.augment.cutout, generator)
    return images


@torch.no_grad()
def hardest_cutout(
    images: Tensor,
    labels: Tensor,
    recipe: Recipe,
    generator: torch.Generator,
    scorer: RegionScorer,
    objective: Objective,
) -> Tensor:
    """Of `cutout_candidates` random squares in each image the one whose loss is largest; uint8 as before.

    Source: the greedy worst-mask cutout of Saha et al., "Revisiting Image Classifier Training for Improved Certified
    Robust Defense against Adversarial Patches", TMLR 2023, with random candidates for their mask sets.
    """
    if not recipe.augment.cutout or recipe.augment.cutout_candidates == 1:
        return images
    scorer.eval()  # candidates must not count in the batch statistics
    candidates, values = [], []
    for _ in range(recipe.augment.cutout_candidates):
        candidates.append(cutout(images, recipe.augment.cutout, generator))
        values.append(objective(scorer(candidates[-1].float() / 255), labels, generator))
    worst = torch.stack(values).argmax(0)
    return torch.stack(candidates)[worst, torch.arange(len(images), device=images.device)]


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
    head = {name for name, _ in list(scorer.net.named_parameters(prefix="net"))[-2:]}
    for name in sorted(given.keys() | own.keys()):
        if name in head and start.class_names != scorer.class_names:
            continue
        if name not in given or name not in own or given[name].shape != own[name].shape:
            raise UsageError(f"the model in {folder} cannot start this recipe: tensor {name!r} does not fit")
        own[name].copy_(given[name])


def _objective(recipe: Recipe, scorer: RegionScorer, threat: PatchThreatModel, device: torch.device) -> Objective:
    loss = recipe.loss
    windows = scorer.grid().windows(threat)
    masks = losses.window_masks(windows, device) if loss.name == "masked-features" else torch.empty(0)

    def objective(z: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
        scores = losses.straight_through(z.float()) if recipe.model.head == "binary" else z.float()
        if loss.name == "margin":
            value = losses.margin_loss(scores, labels, loss.margin)
        elif loss.name == "smooth-margin":
            value = losses.smooth_margin_loss(scores, labels, loss.margin, loss.temperature, loss.label_smoothing)
        elif loss.name in ("cross-entropy", "interval-bounds"):  # of the latter, the term of unchanged images
            value = losses.cross_entropy_loss(scores, labels, loss.label_smoothing)
        elif loss.name == "clipped":
            value = losses.clipped_loss(scores, labels, loss.temperature, loss.label_smoothing)
        elif loss.name == "masked-features":
            value = losses.masked_features_loss(scores, labels, masks, generator, loss.label_smoothing)
        else:
            temperature = loss.temperature if recipe.model.head == "binary" else 1.0
            value = losses.double_masking_loss(
                scores, labels, windows, loss.full_weight, loss.label_smoothing, temperature
            )
        if loss.one_hot_penalty:
            value = value + loss.one_hot_penalty * losses.one_hot_penalty(scores)
        return value

    return objective


def _optimizer(recipe: Recipe, scorer: RegionScorer) -> torch.optim.Optimizer:
    """Weight decay on kernels only, not on batch norm or biases."""
    section = recipe.optimizer
    kernels = [p for p in scorer.parameters() if p.ndim > 1]
    others = [p for p in scorer.parameters() if p.ndim <= 1]
    groups = [{"params": kernels, "weight_decay": section.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if section.name == "muon":
        *inner, classifier = kernels
        rate = section.learning_rate
        return MuonAdamW(inner, [classifier, *others], rate, rate * section.others_share, section.weight_decay)
    if section.name == "sgd":
        return torch.optim.SGD(groups, section.learning_rate, momentum=section.momentum, nesterov=section.momentum > 0)
    return torch.optim.AdamW(groups, section.learning_rate)


def _learning_rate(recipe: Recipe, steps: int) -> Callable[[int], float]:
    """Linear warm-up, then cosine to zero, as a share of the top rate."""
    warmup = max(1, round(recipe.optimizer.warmup * steps))

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))

    return share


def _moving_average(decay: float) -> Callable[[Any, Any, Any], None]:
    """An exponential average that forgets the first weights fast: its decay grows to `decay` as steps go by."""

    def update(averages: Any, current: Any, count: Any) -> None:
        steps = int(count)
        get_ema_multi_avg_fn(min(decay, (1 + steps) / (10 + steps)))(averages, current, count)

    return update


@lru_cache(maxsize=1)  # asked at every step of an epoch
def _epoch_order(seed: int, epoch: int, count: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))


def _generator(device: torch.device, seed: int, step: int, process: int) -> torch.Generator:
    mixed = int(np.random.SeedSequence((seed, step, process)).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator(device).manual_seed(mixed)


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
def _interruptions() -> Iterator[Callable[[], bool]]:
    """Turns Ctrl-C and SIGTERM into a question asked between steps, so that every saved state is whole."""
    asked = False

    def ask(signum: int, frame: object) -> None:
        nonlocal asked
        if asked:  # the second Ctrl-C is meant
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
