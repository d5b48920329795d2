"""The images of a training run: what is trained on, in memory or as a stream, and what is held out to choose by."""

from dataclasses import dataclass, replace

import numpy as np
import psutil
import torch
from torch import Tensor

from bagcert.data.image_set import ImageSet
from bagcert.data.preprocess import Preprocessing
from bagcert.errors import UsageError
from bagcert.training.batches import Batches, MemoryBatches, Share
from bagcert.training.launcher import processes_here
from bagcert.training.recipe import Recipe
from bagcert.training.stream import StreamedBatches, stream_order

SAMPLED_IMAGES = 2048
"""Images of a stream from which mean and deviation of the pixels are taken."""


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a run trains on, as one process sees it.

    Attributes:
        training: the images trained on.
        batches: of them.
        sample: uint8 [images, 3, height, width]: all of them, or some where they come as a stream.
        held_out: uint8 [images, height, width, 3], not trained on.
        held_out_labels: int64 [images].
    """

    training: ImageSet
    batches: Batches
    sample: Tensor
    held_out: np.ndarray
    held_out_labels: np.ndarray


def load_training_data(
    source: ImageSet, recipe: Recipe, device: torch.device, process: int = 0, processes: int = 1
) -> TrainingData:
    """Splits the images, and decodes those that must be there from the start.

    In memory these are all images. Of a stream they are a sample, and as many held-out images as one validation looks
    at; both are found in a few neighborhoods of the files, so that nothing like the whole set is read.

    Raises:
        UsageError: batches too small to share, images of different sizes, or more of them than memory holds.
        UnreadableError: an image that cannot be read.
    """
    source.require_classes()
    training, validation = source.split_off(recipe.data.validation, recipe.data.split_seed)
    prepare = Preprocessing(recipe.model.image_size).apply if recipe.model.image_size else None
    larger = Preprocessing((recipe.augment.resize, recipe.augment.resize)).apply if recipe.augment.resize else prepare
    size = min(recipe.train.batch_size, len(training))
    share = Share(size, recipe.train.accumulate, process, processes)
    seed = recipe.train.seed
    if not recipe.data.streaming:
        _require_memory(source, recipe)
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


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def _require_memory(source: ImageSet, recipe: Recipe) -> None:
    """Refuses before the decoding what would end in the middle of it."""
    side = recipe.augment.resize
    height, width = (side, side) if side else recipe.model.image_size or source.read([0])[0].stored_size
    needed = len(source) * height * width * 3
    there = psutil.virtual_memory().available // processes_here()
    if needed > there:
        raise UsageError(
            f"{len(source):,} decoded images of {height}x{width} px need {needed / 2**30:.1f} GiB of memory in every "
            f"process, and {there / 2**30:.1f} GiB are free: set data.streaming=true"
        )
