"""Streams: every image once per epoch, in an order that follows from the seed, whoever reads it."""

import multiprocessing
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
import pytest
import torch

from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.training.batches import BatchPart, Share
from bagcert.training.stream import StreamedBatches, stream_order
from tests import refused

COUNT, BLOCK = 103, 7


@dataclass(frozen=True)
class Source:
    """Images that show their own number, in blocks; those in `broken` cannot be read."""

    broken: tuple[int, ...] = ()
    wide: tuple[int, ...] = ()

    def __call__(self, row: int) -> Photo:
        if row in self.broken:
            raise UnreadableError(f"image {row} is broken")
        return Photo(np.full((4, 5 + (row in self.wide), 3), row, dtype=np.uint8), source=f"image {row}")

    def block_of(self, rows: np.ndarray) -> np.ndarray:
        return rows // BLOCK


def images(source: Callable[[int], Photo] = Source()) -> ImageSet:
    return ImageSet("numbers", "all", np.arange(COUNT), tuple(map(str, range(COUNT))), source)


def batches(share: Share, workers: int = 0, source: Callable[[int], Photo] = Source()) -> StreamedBatches:
    return StreamedBatches(images(source), None, (4, 5), share, 3, 30, workers, torch.device("cpu"))


def taken(found: StreamedBatches, steps: int, first: int = 0) -> list[list[BatchPart]]:
    return list(islice(found.since(first), steps))


def test_order_keeps_blocks_together() -> None:
    blocks = np.arange(COUNT) // BLOCK
    orders = [stream_order(blocks, 30, seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(COUNT))
        for start in range(0, COUNT, 30):
            assert len(set(blocks[order[start : start + 30]])) <= 30 // BLOCK + 2
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(stream_order(blocks, 30, 1, 1), orders[3])
    alone = stream_order(np.arange(COUNT), 1, 0, 0)  # blocks of one image each are shuffled as a whole
    assert abs(np.corrcoef(alone, np.arange(COUNT))[0, 1]) < 0.5


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_images_taken_once_per_epoch(processes: int) -> None:
    shares = [batches(Share(10, 2, process, processes)) for process in range(processes)]
    steps = shares[0].epoch_steps
    assert steps == COUNT // 10
    found = [taken(share, 2 * steps) for share in shares]
    alone = taken(batches(Share(10, 2)), 2 * steps)
    for step in range(2 * steps):
        for part in range(2):
            mine = [found[process][step][part] for process in range(processes)]
            pairs = [(int(row), int(label)) for each in mine for row, label in zip(each.rows, each.labels, strict=True)]
            whole = zip(alone[step][part].rows.tolist(), alone[step][part].labels.tolist(), strict=True)
            assert sorted(pairs) == sorted(whole), "the batch of a step is the same however it is shared"
            assert all(torch.equal(each.images[:, 0, 0, 0].long(), each.labels) for each in mine)
            assert max(map(len, (each.rows for each in mine))) - min(map(len, (each.rows for each in mine))) <= 1
    for epoch in (0, steps):
        labels = [int(x) for share in found for parts in share[epoch : epoch + steps] for p in parts for x in p.labels]
        assert len(set(labels)) == len(labels) == 10 * steps, "the last images, too few for a batch, wait"


def test_a_stream_goes_on_where_it_was() -> None:
    whole = taken(batches(Share(10, 1, 1, 2)), 25)
    for first in (1, 9, 10, 17):
        for found, expected in zip(taken(batches(Share(10, 1, 1, 2)), 25 - first, first), whole[first:], strict=True):
            assert torch.equal(found[0].rows, expected[0].rows)
            assert torch.equal(found[0].images, expected[0].images)


def test_workers_decode_what_one_process_would() -> None:
    alone, workers = (taken(batches(Share(10, 3, 0, 2), count), 12) for count in (0, 2))
    for part, other in zip(chain(*workers), chain(*alone), strict=True):
        assert torch.equal(part.rows, other.rows)
        assert torch.equal(part.labels, other.labels)
        assert torch.equal(part.images, other.images)


def test_a_signal_to_all_processes_stops_no_worker() -> None:
    """Ctrl-C and launchers reach workers too; the process they work for still wants what it asked for."""
    found = batches(Share(10), 1).since(0)
    first = [next(found) for _ in range(3)]
    (worker,) = multiprocessing.active_children()
    assert worker.pid is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(worker.pid, number)
    later = [next(found) for _ in range(9)]
    for parts, expected in zip((*first, *later), taken(batches(Share(10)), 12), strict=True):
        assert torch.equal(parts[0].images, expected[0].images)


def test_most_blocks_are_read_by_one_process_only() -> None:
    blocks = np.arange(6000) // 25
    many = ImageSet("many", "all", np.zeros(6000, dtype=np.int64), ("a",), Blocks(25))
    readers: dict[int, set[int]] = {int(block): set() for block in blocks}
    for process in range(4):
        share = Share(200, 1, process, 4)
        found = StreamedBatches(many, None, (4, 5), share, 0, 1500, 0, torch.device("cpu"))
        for _, (_, chosen) in zip(range(found.epoch_steps), found.tasks(0, 1), strict=False):
            for block in blocks[chosen]:
                readers[int(block)].add(process)
    assert np.mean([len(each) for each in readers.values()]) < 1.8  # of 4


@dataclass(frozen=True)
class Blocks:
    size: int

    def __call__(self, row: int) -> Photo:
        return Photo(np.zeros((4, 5, 3), dtype=np.uint8))

    def block_of(self, rows: np.ndarray) -> np.ndarray:
        return rows // self.size


def test_images_refused() -> None:
    refused(UnreadableError, r"^image 50 is broken$", taken, batches(Share(10), 0, Source(broken=(50,))), 11)
    with pytest.raises(UsageError, match=r"image 50 has 4x6 px, others 4x5; .*model\.image_size"):
        taken(batches(Share(10), 0, Source(wide=(50,))), 11)
    refused(BagcertError, r"^image 50 is broken$", taken, batches(Share(10), 1, Source(broken=(50,))), 11)


def test_images_that_cannot_be_pickled_refused() -> None:
    with pytest.raises(UsageError, match=r"data\.workers=0"):
        taken(batches(Share(10), 1, lambda row: Photo(np.zeros((4, 5, 3), dtype=np.uint8))), 1)
