"""Sharding of a step's batch across processes and accumulation steps, and batches of images in memory.

The batch of a step depends only on the seed and the step. For any number of processes, every image belongs to exactly
one process, and the images of each accumulation step are the same.
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
    """Sharding of a batch: it is cut into parts for gradient accumulation, and each part is divided among processes.

    Attributes:
        parts: number of gradient accumulation steps.
        process, processes: rank of this process, and number of processes.

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
        """Returns for each part the positions of this process's images in the batch."""
        return [part[self.process :: self.processes] for part in np.array_split(np.arange(self.batch), self.parts)]


@dataclass(frozen=True, eq=False)
class BatchPart:
    """One process's images of one part of a batch.

    Attributes:
        images: uint8 [images, 3, height, width], on the device.
        labels: int64 [images], on the device.
        rows: int64 [images], the position of each image in the whole batch.
    """

    images: UInt8[Tensor, "images channels height width"]
    labels: Int64[Tensor, " images"]
    rows: Int64[Tensor, " images"]


@runtime_checkable
class Batches(Protocol):
    """Iterator over one process's share of the batches of a training set.

    Attributes:
        epoch_steps: number of steps in an epoch. An incomplete last batch is dropped.
    """

    share: Share
    epoch_steps: int

    def since(self, step: int) -> Generator[list[BatchPart], None, None]:
        """This process's parts of the batch of `step` (from 0), of the next one, and so on without end."""


def epoch_order(seed: int, epoch: int, count: int) -> Int64[np.ndarray, " count"]:
    """Returns a random permutation of the images for an epoch."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class MemoryBatches:
    """Batches of decoded images that are stored on the device."""

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
