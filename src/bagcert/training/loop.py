"""The training loop, from a recipe to a model folder.

A run folder holds `recipe.toml`, `metrics.jsonl`, `checkpoint.pt` during training, and finally the model
(`model.safetensors`, `config.json`). The order of images and every augmentation depend only on (seed, step). A resumed
run therefore ends with the same weights as an uninterrupted one, and distributed training matches single-process
training up to rounding.
"""

import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from accelerate import Accelerator
from torch.optim.swa_utils import AveragedModel

from bagcert.data.image_set import ImageSet
from bagcert.devices import resolve_device, tune_malloc
from bagcert.errors import BagcertError, UsageError
from bagcert.io.files import write_atomically
from bagcert.nets.region_scorer import RegionScorer, not_finite
from bagcert.nets.saved_model import ModelConfig, normalization, write_model
from bagcert.threat import PatchThreatModel, check_notation
from bagcert.training.checkpoint import RunFolder, check_run_folder, written_recipe
from bagcert.training.data import Sources, TrainingData, load_sources, load_training_data
from bagcert.training.distributed import ProcessGroup
from bagcert.training.feasible import require_certifiable
from bagcert.training.held_out import scale_of, validate, validation_scores
from bagcert.training.launcher import processes_here
from bagcert.training.optimizers import decay_start, learning_rate, make_optimizer, moving_average
from bagcert.training.pace import measure_pace
from bagcert.training.recipe import Recipe
from bagcert.training.setup import model_config, provenance, start_from
from bagcert.training.step import Losses, Stepper
from bagcert.training.synchronized import synchronize_batch_norm

CHECK_LOSS_EVERY = 20
MODULE_WEIGHTS = "module.safetensors"
"""File for the weights of a user-defined network, which has no config."""


@dataclass
class Progress:
    """Progress of a run, passed to the caller after every step.

    Attributes:
        epoch, epochs: current epoch, from 1, and number of epochs.
        seconds: training time so far, including earlier sessions of a resumed run.
        epoch_ends: whether this was the last step of its epoch.
        loss: mean loss over the last steps when it was computed, else NaN.
        validation: results of the validation after this step, if there was one.
    """

    step: int
    steps: int
    epoch: int
    epochs: int = 0
    seconds: float = 0.0
    epoch_ends: bool = False
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
    *,
    validation: ImageSet | None = None,
    minutes: int | float | None = None,
    scorer: RegionScorer | None = None,
    on_message: Callable[[str], None] = lambda sentence: None,
) -> Path:
    """Trains a model from a recipe and writes it to the folder `out`, which is returned.

    The model in `out` is written at every validation, on Ctrl-C, and at the end, each time replacing the earlier one.
    The last model is kept, not the one with the best validation: its learning rate has decayed to zero, and selecting
    by validation accuracy would bias the reported validation accuracy upwards.

    Args:
        data, resume, limit, device, on_progress, validation: as for `bagcert.train`.
        init: model folder whose weights to start from. The last layer is initialized randomly if the classes differ.
        minutes: train for as many epochs as fit into this time, instead of the recipe's epochs, see
            `bagcert.training.pace`. A resumed run keeps its epochs.
        scorer: a network to train instead of the recipe's. It is trained in place, and its weights are written to `out`
            without a config.
        on_message: called with messages about the run, such as the number of images.

    Raises:
        UsageError: the recipe does not fit the data, no image could ever be certified, or `out` holds another run.
        BagcertError: the loss is not finite, or the run was interrupted. The checkpoint in `out` is complete.
    """
    called = time.monotonic()
    accelerator = _accelerator(device)
    torch.manual_seed(recipe.train.seed)
    group = ProcessGroup()
    with group.together():
        check_notation(recipe.defense.patch)
        if isinstance(data, str):
            recipe = recipe.changed(data={"name": data})
        if minutes is not None and resume and (written := written_recipe(out)) is not None:
            recipe = recipe.changed(train={"epochs": written.train.epochs})
        if group.is_main:
            check_run_folder(out, recipe, resume)
        sources = load_sources(recipe, data, limit, validation)
        on_message(f"reading {len(sources.training) + len(sources.validation):,} images of {sources.name}")
        images = load_training_data(sources, recipe, accelerator.device, group.index, group.size)
        config = model_config(recipe, images.training, images.sample) if scorer is None else None
        network = _given(scorer, sources, images) if config is None else config.build()
        if init is not None:
            start_from(network, init)
        threat = PatchThreatModel.parse(recipe.defense.patch, network.image_size)
        losses = Losses(recipe, network, threat, accelerator.device)
        require_certifiable(recipe, network.grid(), threat)
    class_weights = torch.ones(len(images.training.class_names))
    if recipe.data.class_weights:
        class_weights = torch.as_tensor(images.training.class_weights(), dtype=torch.float32)
    class_weights = class_weights.to(accelerator.device)

    network.to(accelerator.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # a torch stub gap
    if group.size > 1:
        synchronize_batch_norm(network)
    if minutes is not None and not resume:
        pace = measure_pace(recipe, network, threat, images, accelerator, group, class_weights)
        epochs = pace.epochs(60 * minutes - group.mean(time.monotonic() - called))
        recipe = recipe.changed(train={"epochs": epochs})
        on_message(
            f"an epoch takes {pace.epoch_seconds:.3g} s ({pace.step_seconds:.3g} s a step): training for {epochs} "
            f"epoch{'s' * (epochs > 1)} to fit into {minutes:g} minutes"
        )
    epoch_steps, epochs = images.batches.epoch_steps, recipe.train.epochs
    steps = epoch_steps * epochs
    optimizer = make_optimizer(recipe, network)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(recipe, steps))
    average = AveragedModel(network, multi_avg_fn=moving_average(recipe.train.ema), use_buffers=True)
    init_name = None if init is None else init.name
    run = RunFolder(out, recipe, network, average, optimizer, schedule, steps, decay_start(recipe, steps), init_name)
    with group.together():
        if group.is_main:
            run.open(resume)
    if group.size > 1:  # also where a folder is not shared, and where machines do not round alike
        run.take(group.from_main(run.content))
    stepper = Stepper(recipe, network, losses, optimizer, accelerator, group, class_weights, images.batches.share)
    on_message(
        f"training on {len(images.training):,} images of {len(images.training.class_names)} classes, "
        f"{len(sources.validation):,} held out ({sources.held_out_by}); {epochs} "
        f"epoch{'s' * (epochs > 1)} of {epoch_steps:,} steps"
    )

    def save_model() -> None:
        shipping = run.shipping
        if network.head == "fixed-point" and recipe.augment.ablation == "none":
            shipping.scale = scale_of(validation_scores(shipping, images.held_out))
        source = provenance(sources, accelerator, run.step, steps, run.seconds, limit, run.init)
        _write(out, shipping, config, source)

    started, seconds_before = time.monotonic(), run.seconds
    running, counted = torch.zeros((), device=accelerator.device), 0
    with _interruptions(group.size > 1) as interrupted, closing(images.batches.since(run.step)) as batches:
        while run.step < steps:
            with group.together():
                parts = next(batches)
            running = running + stepper.step(parts, run.step, run.step / steps)
            schedule.step()
            average.update_parameters(network)
            run.step, counted = run.step + 1, counted + 1

            stop = group.any(interrupted())
            epoch, position = divmod(run.step - 1, epoch_steps)
            epoch_ends = position == epoch_steps - 1
            saves = stop or epoch_ends or run.step == run.decay_start or run.step % recipe.train.checkpoint_every == 0
            progress = Progress(run.step, steps, epoch + 1, epochs, epoch_ends=epoch_ends)
            if saves or run.step % CHECK_LOSS_EVERY == 0:
                progress.loss = group.mean(running.item() / counted)
                running, counted = torch.zeros_like(running), 0
                if not math.isfinite(progress.loss) or (saves and not_finite(network.state_dict())):
                    raise BagcertError(
                        f"the loss or a weight is not finite at step {run.step} (epoch {epoch + 1}); the last good "
                        f"checkpoint is kept in {out}: try a lower optimizer.learning_rate or train.precision=fp32"
                    )
            run.seconds = progress.seconds = seconds_before + time.monotonic() - started
            validates = epoch_ends and ((epoch + 1) % recipe.train.validate_every == 0 or run.step == steps)
            with group.together() if saves else nullcontext():
                if validates and group.is_main:
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
                if saves and group.is_main:
                    run.save()
                    if stop and not validates:
                        save_model()
            if group.is_main:
                on_progress(progress)
            if stop:
                raise BagcertError(f"interrupted at step {run.step} of {steps}; --resume goes on from {out}")

    with group.together():
        if group.is_main:
            save_model()
            run.close()
    if scorer is not None:
        scorer.load_state_dict(run.shipping.state_dict())
        scorer.scale = run.shipping.scale
        scorer.eval()
    return out


def _given(scorer: RegionScorer | None, sources: Sources, images: TrainingData) -> RegionScorer:
    """Checks that a user-defined network fits the data, and returns it."""
    assert scorer is not None
    if scorer.channels != 3:
        raise UsageError(f"training is on RGB images, the network takes {scorer.channels} channels")
    if scorer.class_names != sources.training.class_names:
        raise UsageError(f"the network and {sources.name} have different classes")
    size = (images.held_out.shape[1], images.held_out.shape[2])
    if scorer.image_size != size:
        raise UsageError(
            f"the network is for images of {scorer.image_size[0]}x{scorer.image_size[1]} px, {sources.name} has "
            f"{size[0]}x{size[1]} px; give model.image_size"
        )
    return scorer


def _write(out: Path, shipping: RegionScorer, config: ModelConfig | None, source: dict) -> None:
    """Writes a model folder, or only the weights of a user-defined network."""
    if config is None:
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in shipping.net.state_dict().items()}
        write_atomically(out / MODULE_WEIGHTS, safetensors.torch.save(state))
        return
    scale = shipping.scale if config.head == "fixed-point" and not config.ablated else 1.0
    # A model that a run starts from brings its normalization.
    normalize = normalization(shipping.state_dict(), config)
    write_model(out, shipping, config.model_copy(update={"scale": scale, "provenance": source, **normalize}))


def _accelerator(device: str) -> Accelerator:
    """Creates the accelerator: the device of this process and the process group of the launcher."""
    chosen = resolve_device(device)
    if chosen.type == "cuda" and chosen.index is not None:
        if processes_here() > 1:
            raise UsageError(f"with several processes, use device cuda, and each gets its own GPU; got {device}")
        torch.cuda.set_device(chosen)
    # Accelerate fixes its mixed precision for the whole process; a process may train twice.
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="no")
    if accelerator.device.type == "cpu":
        tune_malloc()
    return accelerator


@contextmanager
def _interruptions(several: bool) -> Iterator[Callable[[], bool]]:
    """Defers Ctrl-C and SIGTERM to the end of a step, so that every saved state is consistent.

    A second Ctrl-C interrupts at once, but only with a single process: launchers send signals repeatedly.
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
