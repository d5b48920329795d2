"""Batches for training: who works on which images of a step, and where the images come from.

The batch of a step follows from the seed and the step alone. However many processes share it, every image is in
exactly one process's share, and the images of one part of a batch are the same.
"""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

from bagcert.errors import UsageError


@dataclass(frozen=True)
class Share:
    """How the batch of a step is cut into parts, and each part shared by the processes.

    Attributes:
        batch: images of the whole batch, over all processes.
        parts: how many pieces it is worked through in, one after another, to save memory.
        process, processes: whose share this is.

    Raises:
        UsageError: a part would leave a process without an image.
    """

    batch: int
    parts: int = 1
    process: int = 0
    processes: int = 1

    def __post_init__(self) -> None:
        if self.batch // self.parts < self.processes:
            raise UsageError(
                f"a batch of {self.batch} images is too small for train.accumulate={self.parts} on {self.processes} "
                f"process{'es' * (self.processes > 1)}: each needs an image of every part"
            )

    def rows(self) -> list[np.ndarray]:
        """For each part, the places in the batch of this process's images."""
        return [part[self.process :: self.processes] for part in np.array_split(np.arange(self.batch), self.parts)]


@dataclass(frozen=True, eq=False)
class BatchPart:
    """One process's images of one part of a batch.

    Attributes:
        images: uint8 [images, 3, height, width], on the device.
        labels: int64 [images], on the device.
        rows: int64 [images], the place of each image in the whole batch.
    """

    images: UInt8[Tensor, "images channels height width"]
    labels: Int64[Tensor, " images"]
    rows: Int64[Tensor, " images"]


@runtime_checkable
class Batches(Protocol):
    """A training set as a process sees it.

    Attributes:
        share: which images of a batch are this process's.
        epoch_steps: steps in an epoch; what is left when no whole batch remains waits for the next epoch's order.
    """

    share: Share
    epoch_steps: int

    def since(self, step: int) -> Generator[list[BatchPart], None, None]:
        """This process's parts of the batch of `step` (from 0), of the next one, and so on without end."""


def epoch_order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, " count"]:
    """Every image once, in an order of its own for each epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class MemoryBatches:
    """Batches of images that all lie decoded on the device."""

    def __init__(
        self,
        images: UInt8[Tensor, "images channels height width"],
        labels: Int64[Tensor, " images"],
        share: Share,
        seed: int,
    ) -> None:
        self.images, self.labels, self.share, self.seed = images, labels, share, seed
        self.epoch_steps = len(images) // share.batch

    def since(self, step: int) -> Generator[list[BatchPart], None, None]:
        """This process's parts of the batch of `step` (from 0), of the next one, and so on without end."""
        device = self.images.device
        rows = [torch.from_numpy(part) for part in self.share.rows()]
        while True:
            epoch, first = divmod(step, self.epoch_steps)
            order = torch.from_numpy(epoch_order(self.seed, epoch, len(self.images)))
            for position in range(first, self.epoch_steps):
                batch = order[position * self.share.batch : (position + 1) * self.share.batch]
                chosen = [batch[part].to(device) for part in rows]
                yield [
                    BatchPart(self.images[index], self.labels[index], part.to(device))
                    for index, part in zip(chosen, rows, strict=True)
                ]
            step = (epoch + 1) * self.epoch_steps
