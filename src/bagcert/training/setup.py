"""Setup of a training run: model config, initial weights and provenance."""

import platform
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

import bagcert
from bagcert.data.image_set import ImageSet
from bagcert.errors import UsageError
from bagcert.nets import get_architecture
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.saved_model import ModelConfig, read_model
from bagcert.rules import get_rule
from bagcert.training.data import Sources
from bagcert.training.recipe import Recipe


def model_config(recipe: Recipe, training: ImageSet, images: Tensor) -> ModelConfig:
    """Creates the model config of a recipe, with mean and standard deviation of uint8 images [images, 3, h, w]."""
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
        masks_per_axis=recipe.defense.masks_per_axis,
        recipe=recipe.model_dump(exclude_none=True),
    )


def start_from(scorer: RegionScorer, folder: Path) -> None:
    """Loads the weights of a model; keeps the random initialization of the last layer if the classes differ."""
    start = read_model(folder)[0]
    given, own = start.state_dict(), scorer.state_dict()
    head = set(scorer.class_layers)
    for name in sorted(given.keys() | own.keys()):
        if name in head and start.class_names != scorer.class_names:
            continue
        if name not in given or name not in own or given[name].shape != own[name].shape:
            raise UsageError(f"the model in {folder} cannot start this recipe: tensor {name!r} does not fit")
        own[name].copy_(given[name])


def provenance(
    sources: Sources,
    accelerator: Accelerator,
    step: int,
    steps: int,
    seconds: float,
    limit: int | None,
    init: str | None,
) -> dict[str, Any]:
    """Returns the provenance of a model, for its config."""
    device = accelerator.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    found = {
        "data": Path(sources.name).name,
        "split": sources.split,
        "validation": sources.held_out_by,
        "training_images": len(sources.training),
        "limit": limit,
        "init": init,
        "steps": step,
        "steps_planned": steps,
        "device": f"{device.type} ({name})",
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "training_seconds": round(seconds, 1),
        "versions": {"bagcert": bagcert.__version__, "torch": torch.__version__, "python": platform.python_version()},
    }
    return found if sources.class_folders is None else {**found, "class_folders": list(sources.class_folders)}
