"""The data of a training run: training images, in memory or streamed, and the held-out validation split."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

from bagcert.data import DATASETS, load_dataset
from bagcert.data.class_names import read_class_names
from bagcert.data.image_set import ImageSet
from bagcert.data.preprocess import Preprocessing
from bagcert.data.remote import is_address
from bagcert.errors import UsageError
from bagcert.training.batches import Batches, MemoryBatches, Share
from bagcert.training.groups import groups_of, split_by_group
from bagcert.training.launcher import processes_here
from bagcert.training.recipe import Recipe
from bagcert.training.stream import StreamedBatches, stream_order

SAMPLED_IMAGES = 2048  # number of streamed images from which mean and standard deviation of the pixels are computed


VALIDATION_FOLDERS = ("val", "valid", "validation")
"""Names of a validation split next to `train`, which replaces holding out a part of the training images."""


@dataclass(frozen=True, eq=False)
class Sources:
    """The data of a run before any image is decoded.

    Attributes:
        held_out_by: how the validation images were chosen, for the model's provenance.
        class_folders: class folders in the order of the classes if they have display names, else None.
    """

    training: ImageSet
    validation: ImageSet
    name: str
    split: str
    held_out_by: str
    class_folders: tuple[str, ...] | None = None


@dataclass(frozen=True, eq=False)
class TrainingData:
    """The data of a run in one process.

    Attributes:
        sample: uint8 [images, 3, height, width], all training images, or some of a stream.
        held_out: uint8 [images, height, width, 3], not trained on. The first `train.validate_images` are stratified by
            class.
    """

    training: ImageSet
    batches: Batches
    sample: Tensor
    held_out: np.ndarray
    held_out_labels: np.ndarray


def load_sources(
    recipe: Recipe, data: str | ImageSet | None, limit: int | None, validation: ImageSet | None = None
) -> Sources:
    """Loads the training split and the validation split of a recipe, without decoding images.

    Class folders may have a split `val` (or `valid`, `validation`) next to `train`, which is then the validation split.
    Otherwise a share of the training images is held out, by class or by group.

    Raises:
        UsageError: no such data, splits with different classes, or no image can be held out.
        UnreadableError: files that cannot be read, or only one class.
    """
    spec = data if isinstance(data, ImageSet) else data or recipe.data.name
    source = spec if isinstance(spec, ImageSet) else load_dataset(spec, "train", limit)
    if validation is None and isinstance(spec, str):
        validation = _validation_folder(spec)
    folders: tuple[str, ...] = getattr(source.source, "folders", source.class_names)
    if recipe.data.class_names is not None:
        names = read_class_names(Path(recipe.data.class_names), folders)
        source = replace(source, class_names=names)
        validation = None if validation is None else replace(validation, class_names=names)
    source.require_classes()
    section = recipe.data
    if validation is not None:
        if validation.class_names != source.class_names:
            raise UsageError(f"the validation images {validation.name} have other classes than the training images")
        training, how = source, f"split {validation.split}"
    elif section.groups is not None:
        held = split_by_group(source.labels, groups_of(source, section.groups), section.validation, section.split_seed)
        training = source.subset(np.flatnonzero(~held))
        validation = replace(source.subset(np.flatnonzero(held)), split="validation")
        how = f"{section.validation:g} of the {source.split} images by group, seed {section.split_seed}"
    else:
        training, validation = source.split_off(section.validation, section.split_seed)
        how = f"{section.validation:g} of the {source.split} images, seed {section.split_seed}"
    renamed = folders if folders != source.class_names else None
    return Sources(training, validation, source.name, source.split, how, renamed)


def load_training_data(
    sources: Sources, recipe: Recipe, device: torch.device, process: int = 0, processes: int = 1
) -> TrainingData:
    """Decodes the images that are needed before the first step.

    Without streaming, these are all images. With streaming, they are a sample and the held-out images of one
    validation, both taken from a few blocks of the files, so that only a small part of the data is read.
    """
    training, validation = sources.training, sources.validation
    prepare = Preprocessing(recipe.model.image_size).apply if recipe.model.image_size else None
    larger = Preprocessing((recipe.augment.resize, recipe.augment.resize)).apply if recipe.augment.resize else prepare
    size = min(recipe.train.batch_size, len(training))
    share = Share(size, recipe.train.accumulate, process, processes)
    seed = recipe.train.seed
    if not recipe.data.streaming:
        validation = _sample_first(validation, recipe)
        _require_memory(training, len(training) + len(validation), recipe)
        images = _tensor(training.array(larger)).contiguous().to(device)
        labels = torch.from_numpy(training.labels).to(device)
        batches: Batches = MemoryBatches(images, labels, share, seed)
        return TrainingData(training, batches, images, validation.array(prepare), validation.labels)
    chosen = stream_order(training.blocks(), recipe.data.shuffle, recipe.data.split_seed, 0)[:SAMPLED_IMAGES]
    sample = training.subset(np.sort(chosen)).array(larger)
    chosen = stream_order(validation.blocks(), recipe.data.shuffle, recipe.data.split_seed, 0)
    validation = validation.subset(np.sort(chosen[: recipe.train.validate_images]))
    held_out = replace(validation).array(prepare)
    batches = StreamedBatches(
        training, larger, sample.shape[1:3], share, seed, recipe.data.shuffle, recipe.data.workers, device
    )
    return TrainingData(training, batches, _tensor(sample), held_out, validation.labels)


def _validation_folder(spec: str) -> ImageSet | None:
    if spec in DATASETS or is_address(spec):
        return None
    root = Path(spec).expanduser()
    name = next((name for name in VALIDATION_FOLDERS if (root / name).is_dir()), None)
    # A folder of that name may also be a class.
    if name is None or not (root / "train").is_dir():
        return None
    return load_dataset(spec, name)


def _sample_first(validation: ImageSet, recipe: Recipe) -> ImageSet:
    """Reorders the images so that a stratified sample for one validation comes first.

    Class folders are sorted by class; without reordering, the first images would all be of the first classes.
    """
    count = recipe.train.validate_images
    if count >= len(validation):
        return validation
    numbers = replace(validation, rows=np.arange(len(validation)))
    rest, sample = numbers.split_off(count / len(validation), recipe.data.split_seed)
    assert sample.rows is not None
    assert rest.rows is not None
    return validation.subset(np.concatenate([sample.rows, rest.rows]))


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _require_memory(source: ImageSet, count: int, recipe: Recipe) -> None:
    side = recipe.augment.resize
    height, width = (side, side) if side else recipe.model.image_size or source.read([0])[0].stored_size
    needed = count * height * width * 3
    there = psutil.virtual_memory().available // processes_here()
    if needed > there:
        raise UsageError(
            f"{count:,} decoded images of {height}x{width} px need {needed / 2**30:.1f} GiB of memory in every "
            f"process, and {there / 2**30:.1f} GiB are free: set data.streaming=true"
        )
