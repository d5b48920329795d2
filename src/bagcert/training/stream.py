"""Streaming batches: images are read and decoded on demand, for data sets larger than memory.

Sources store images in blocks that are read as a whole: row groups of Parquet files, or adjacent images in tar shards.
An epoch puts the blocks in random order, cuts the resulting sequence of images into windows, and shuffles each window.
The order depends only on the seed and the epoch and contains every image once. It is indexed directly, so that a
resumed run does not read earlier images.

The images of a batch are divided by the position of their blocks in the epoch, so that each block is read by one worker
of one process, or by two neighboring ones.
"""

import pickle
import signal
from collections.abc import Callable, Generator, Iterator

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from bagcert.data.image_set import ImageSet, as_stored
from bagcert.data.photo import Photo
from bagcert.errors import BagcertError, UsageError
from bagcert.training.batches import BatchPart, Share

Prepare = Callable[[Photo], np.ndarray]
Task = Int64[np.ndarray, "2 images"]
"""A worker's share of a step: positions in the batch, and the indices of the images."""


def stream_order(
    blocks: Int64[np.ndarray, " images"], window: int, seed: int, epoch: int
) -> Int64[np.ndarray, " images"]:
    """Returns the order of an epoch: blocks in random order, and images shuffled within windows of `window` images.

    >>> order = stream_order(np.arange(12) // 4, 4, 0, 0)
    >>> sorted(order.tolist()) == list(range(12)), len(set((order[:4] // 4).tolist()))  # the first four are one block
    (True, 1)
    """
    return _order_and_neighborhoods(blocks, window, seed, epoch)[0]


def _order_and_neighborhoods(blocks: np.ndarray, window: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns the order, and for each position in it the start of the image's block within its window."""
    random = np.random.default_rng((seed, epoch))
    _, number = np.unique(blocks, return_inverse=True)
    shuffled = random.permutation(number.max() + 1)[number]
    together = np.argsort(shuffled, kind="stable")
    windows = np.arange(len(blocks)) // window
    order = together[np.argsort(windows + random.random(len(blocks)), kind="stable")]
    return order, np.searchsorted(shuffled[together], shuffled[order]) % window


class StreamedBatches:
    """Batches of images that are decoded by worker processes.

    Args:
        images: the training set. Its source must be picklable if there are workers.
        prepare: Photo -> uint8 [height, width, 3]; None if all images have the right size.
        workers: number of worker processes; 0 decodes in threads of this process.
    """

    def __init__(
        self,
        images: ImageSet,
        prepare: Prepare | None,
        size: tuple[int, int],
        share: Share,
        seed: int,
        window: int,
        workers: int,
        device: torch.device,
    ) -> None:
        self.images, self.prepare, self.size, self.share = images, prepare or as_stored, size, share
        self.seed, self.window, self.workers, self.device = seed, window, workers, device
        self.epoch_steps = len(images) // share.batch
        self._blocks = images.blocks()

    def since(self, step: int) -> Generator[list[BatchPart], None, None]:
        """This process's parts of the batch of `step` (from 0), of the next one, and so on without end.

        Raises:
            UnreadableError: an image of the batch cannot be read.
            UsageError: it has another size, or the images cannot be handed to workers.
        """
        readers = max(1, self.workers)
        decoder = _Decoder(self.images, self.prepare, self.size)
        if self.workers:  # found out here, because a loader that fails to start waits ten seconds for its workers
            try:
                pickle.Pickler(_Nowhere()).dump(decoder)
            except (AttributeError, TypeError, pickle.PicklingError) as error:
                raise UsageError(
                    f"{self.images.name} cannot be handed to workers that decode it ({error}); set data.workers=0"
                ) from None
        loader = DataLoader(
            decoder,
            batch_sampler=_Tasks(self, step, readers),  # type: ignore[arg-type]  # a task is an array, not a list
            num_workers=self.workers,
            collate_fn=_as_they_are,
            worker_init_fn=_prepare_worker if self.workers else None,
            # Not fork: a forked process may deadlock on locks held by threads or connections of its parent.
            multiprocessing_context="spawn" if self.workers else None,
            pin_memory=self.device.type == "cuda",
        )
        answers = iter(loader)
        while True:
            # Tasks are distributed and returned round-robin, so a step has one task per reader.
            found = [next(answers) for _ in range(readers)]
            for answer in found:
                if isinstance(answer, BagcertError):
                    raise answer
            places, labels, pixels = (torch.cat(column) for column in zip(*found, strict=True))
            yield self._parts(places, labels, pixels)

    def tasks(self, step: int, readers: int) -> Iterator[Task]:
        """Iterates over tasks from `step` on: in every step, one for each reader of this process."""
        while True:
            epoch, first = divmod(step, self.epoch_steps)
            order, neighborhood = _order_and_neighborhoods(self._blocks, self.window, self.seed, epoch)
            for position in range(first, self.epoch_steps):
                start = position * self.share.batch
                mine: list[list[np.ndarray]] = [[] for _ in range(readers)]
                for part in np.array_split(np.arange(self.share.batch), self.share.parts):
                    neighbors = part[np.argsort(neighborhood[start + part], kind="stable")]
                    own = np.array_split(neighbors, self.share.processes)[self.share.process]
                    for reader, places in enumerate(np.array_split(own, readers)):
                        mine[reader].append(places)
                for parts in mine:
                    places = np.concatenate(parts)
                    yield np.stack([places, order[start + places]])
            step = (epoch + 1) * self.epoch_steps

    def _parts(self, places: Tensor, labels: Tensor, pixels: Tensor) -> list[BatchPart]:
        parts = []
        for part in np.array_split(np.arange(self.share.batch), self.share.parts):
            chosen = (places >= int(part[0])) & (places <= int(part[-1]))
            images = pixels[chosen].to(self.device, non_blocking=True).permute(0, 3, 1, 2)
            parts.append(BatchPart(images.contiguous(), labels[chosen].to(self.device), places[chosen].to(self.device)))
        return parts


class _Tasks:
    def __init__(self, batches: StreamedBatches, step: int, readers: int) -> None:
        self.batches, self.step, self.readers = batches, step, readers

    def __iter__(self) -> Iterator[Task]:
        return self.batches.tasks(self.step, self.readers)


class _Nowhere:
    """A file that keeps nothing."""

    def write(self, data: bytes) -> int:
        return len(data)


class _Decoder(Dataset):
    def __init__(self, images: ImageSet, prepare: Prepare, size: tuple[int, int]) -> None:
        self.images, self.prepare, self.size = images, prepare, size

    def __getitems__(self, task: Task) -> tuple[Tensor, Tensor, Tensor] | BagcertError:
        """Returns positions, labels and pixels [images, height, width, 3] of a task, or the error of an image."""
        places, indices = task
        pixels = np.empty((len(indices), *self.size, 3), dtype=np.uint8)
        in_worker = torch.utils.data.get_worker_info() is not None
        try:
            # A worker is one of many; alone, a process decodes in threads.
            pieces = [[index] for index in indices] if in_worker else [indices]
            found = [photo for piece in pieces for photo in self.images.prepare_each(piece, self._sized)]
        except BagcertError as error:
            return error
        for place, photo in enumerate(found):
            if isinstance(photo, BagcertError):
                return photo
            pixels[place] = photo
        return torch.from_numpy(places), torch.from_numpy(self.images.labels[indices]), torch.from_numpy(pixels)

    def _sized(self, photo: Photo) -> np.ndarray:
        pixels = self.prepare(photo)
        if pixels.shape[:2] != tuple(self.size):
            raise UsageError(
                f"{photo.source} has {pixels.shape[0]}x{pixels.shape[1]} px, others {self.size[0]}x{self.size[1]}; "
                "bring them to one size with model.image_size"
            )
        return pixels


def _as_they_are(answer: object) -> object:
    return answer


def _prepare_worker(number: int) -> None:
    """Sets up a worker: it ignores signals, ends with its parent process, and gets its share of the cache size."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    info = torch.utils.data.get_worker_info()
    assert info is not None
    source = info.dataset.images.source  # type: ignore[attr-defined]
    if hasattr(source, "cache_bytes"):
        source.cache_bytes //= info.num_workers
