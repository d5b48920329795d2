"""`bagcert.train`: training from Python, from a recipe or with a user-defined network."""

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.defenses.bagcert import BagCert, load, model_folder
from bagcert.errors import UsageError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.training.choose import choose_recipe
from bagcert.training.loop import Progress
from bagcert.training.loop import train as run
from bagcert.training.recipe import Recipe, parse_recipe


def train(
    what: str | Path | Recipe | RegionScorer | nn.Module,
    data: Any = None,
    *,
    patch: int | str | tuple[int, int] | None = None,
    out: str | Path | None = None,
    epochs: int | None = None,
    minutes: int | float | None = None,
    size: int | tuple[int, int] | None = None,
    validation: Any = None,
    settings: Mapping[str, Any] | None = None,
    init: str | Path | None = None,
    limit: int | None = None,
    resume: bool = False,
    device: str = "auto",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> BagCert:
    """Trains a model with a certified loss, and returns it ready to certify.

    Args:
        what: the name or file of a recipe, a folder of class folders, a run folder to resume, or a `Recipe`; or a
            network: a module that maps images [batch, 3, height, width] in [0, 1] to region scores [batch, classes,
            rows, cols], whose geometry is derived as by `RegionScorer.from_module`, or a `RegionScorer`. A network is
            trained in place.
        data: a data set, its name or path, or a torch dataset, instead of the recipe's. A network needs it.
        patch: patch to train against and to deploy against, in px of the network's images or in percent of their area
            (`"2%"`).
        out: the run folder; by default `runs/NAME`. For a network: folder for checkpoints and weights, which by default
            are not kept.
        epochs: number of epochs, instead of the recipe's.
        minutes: train for as many epochs as fit into this time.
        size: (height_px, width_px) of the network's images, or the side of a square; by default the size of the images.
        validation: validation images, instead of a part of the training images.
        settings: further recipe keys, such as `{"train.batch_size": 32}`, see docs/recipes.md.
        init: model whose weights to start from.
        limit: train on the first `limit` images only.
        resume: resume from the checkpoint in `out`.
        device: auto, cpu, cuda, cuda:N or mps.
        on_progress: called after every step.

    Raises:
        UsageError: invalid or inconsistent arguments.
        UnsoundError: the network is not local, or reaches beyond its derived geometry.
        BagcertError: the loss is not finite, or the run was interrupted.
    """
    if epochs is not None and minutes is not None:
        raise UsageError("epochs and minutes both say how long to train; give one of them")
    if isinstance(patch, tuple):
        patch = "x".join(map(str, patch))
    sizes = (size, size) if isinstance(size, int) else size
    given = {"train.epochs": epochs, "model.image_size": sizes, "defense.patch": None if patch is None else str(patch)}
    changes = {**{key: value for key, value in given.items() if value is not None}, **(settings or {})}
    images = data if data is None or isinstance(data, str) else _images(data, "train", limit)
    held_out = None if validation is None else _images(validation, "val", None)
    folder = None if out is None else Path(out)
    options: dict[str, Any] = {"resume": resume, "limit": limit, "device": device, "on_progress": on_progress}
    options |= {"minutes": minutes, "validation": held_out, "init": None if init is None else model_folder(init)}
    if isinstance(what, nn.Module):
        if images is None:
            raise UsageError("a network is trained on images; give data")
        return _train_network(what, images, changes, folder, options)
    if isinstance(what, Recipe):
        recipe = _changed(what, changes)
        folder = folder or Path("runs") / recipe.name
    else:
        recipe, folder = choose_recipe(str(what), folder, resume=resume)
        if minutes is None or not resume:
            recipe = _changed(recipe, changes)
    run(recipe, folder, images, **options)
    return load(folder, device)


def _train_network(
    network: nn.Module, data: str | ImageSet, changes: dict[str, Any], out: Path | None, options: dict[str, Any]
) -> BagCert:
    """Trains a user-defined network. Its geometry is derived before training, and its locality measured afterwards."""
    images = data if isinstance(data, ImageSet) else load_dataset(data, "train", options["limit"])
    recipe = _changed(parse_recipe({"name": _name(network), "augment": {"flip": False}}), changes)
    if isinstance(network, RegionScorer):
        scorer = network
    else:
        size = recipe.model.image_size
        if size is None:
            stored = images.read([0])[0].upright().shape
            size = (stored[0], stored[1])
        scorer = RegionScorer.from_module(network, images.class_names, size)
    sizes: dict[str, Any] = {"image_size": scorer.image_size, "head": scorer.head}
    # A readout's sizes are the network's own; the recipe only checks them.
    if scorer.readout is not None:
        readout = scorer.readout
        sizes |= {"values": readout.values, "attention_heads": readout.heads, "hidden": readout.first.out_features}
    recipe = recipe.changed(model=sizes)
    with tempfile.TemporaryDirectory(prefix="bagcert-train-") as scratch:
        run(recipe, out or Path(scratch), data if isinstance(data, str) else images, scorer=scorer, **options)
    defense = recipe.defense
    model = BagCert(scorer, defense.rule, patch=defense.patch, masks_per_axis=defense.masks_per_axis)
    return model.check_locality()


def _images(data: Any, split: str, limit: int | None) -> ImageSet:
    return data.take(limit) if isinstance(data, ImageSet) else load_dataset(data, split, limit)


def _name(network: nn.Module) -> str:
    inner = network.net if isinstance(network, RegionScorer) else network
    return type(inner).__name__.lstrip("_")[:100] or "network"


def _changed(recipe: Recipe, changes: Mapping[str, Any]) -> Recipe:
    """Returns the recipe with changed values, validated."""
    values = recipe.model_dump(exclude_none=True)
    for key, value in changes.items():
        section, _, last = key.partition(".")
        if last:
            values.setdefault(section, {})[last] = value
        else:
            values[section] = value
    return parse_recipe(values)
