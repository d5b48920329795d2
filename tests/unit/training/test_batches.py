"""Who works on which images: no image is lost, none is taken twice, and parts do not depend on the processes."""

import numpy as np
import pytest
import torch

from bagcert.errors import UsageError
from bagcert.training.batches import MemoryBatches, Share
from tests import refused


@pytest.mark.parametrize(("batch", "parts", "processes"), [(9, 1, 1), (9, 2, 3), (12, 3, 4), (7, 7, 1), (10, 3, 3)])
def test_places_of_a_batch_shared(batch: int, parts: int, processes: int) -> None:
    shares = [Share(batch, parts, process, processes).rows() for process in range(processes)]
    alone = Share(batch, parts).rows()
    assert np.array_equal(np.concatenate(alone), np.arange(batch))
    for part in range(parts):
        together = np.concatenate([share[part] for share in shares])
        assert sorted(together.tolist()) == alone[part].tolist()
        assert all(len(share[part]) for share in shares)


def test_a_share_without_an_image_is_refused() -> None:
    refused(UsageError, r"batch of 9 images is too small for train\.accumulate=4 on 3 processes", Share, 9, 4, 0, 3)


def test_batches_in_memory_follow_from_seed_and_step() -> None:
    images = torch.arange(23, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 2, 2)
    batches = MemoryBatches(images, torch.arange(23), Share(5, 2), seed=4)
    assert batches.epoch_steps == 4
    found = batches.since(0)
    steps = [next(found) for _ in range(8)]
    for epoch in (steps[:4], steps[4:]):
        labels = torch.cat([part.labels for parts in epoch for part in parts])
        assert len(set(labels.tolist())) == 20
    for parts in steps:
        assert [part.rows.tolist() for part in parts] == [[0, 1, 2], [3, 4]]
        assert all(torch.equal(part.images[:, 0, 0, 0].long(), part.labels) for part in parts)
    later = batches.since(6)
    assert torch.equal(next(later)[1].labels, steps[6][1].labels)
    assert torch.equal(next(later)[0].labels, steps[7][0].labels)
