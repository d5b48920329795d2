"""Per-image random numbers that are independent of how the batch is sharded."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ShardedGenerator:
    """Random numbers for a share of the images of a batch.

    Numbers are drawn for the whole batch, and those of this share are selected. An image therefore gets the same
    numbers for any number of processes and accumulation steps.

    Attributes:
        generator: generator with the same state on all processes.
        rows: positions of the share's images in the batch, on the device of the generator.
    """

    generator: torch.Generator
    batch: int
    rows: Int64[Tensor, " images"]


Source = torch.Generator | ShardedGenerator


def draw(high: int, images: int, source: Source, *shape: int) -> Tensor:
    """Draws integers from 0 to `high - 1`, [images, *shape], on the device of the source.

    >>> whole = draw(9, 4, torch.Generator().manual_seed(0), 2)
    >>> share = ShardedGenerator(torch.Generator().manual_seed(0), 4, torch.tensor([3, 1]))
    >>> torch.equal(draw(9, 2, share, 2), whole[[3, 1]])
    True
    """
    if isinstance(source, torch.Generator):
        return torch.randint(0, high, (images, *shape), generator=source, device=source.device)
    assert images == len(source.rows), "draws are for the images of a share, all of them"
    return draw(high, source.batch, source.generator, *shape)[source.rows]


def draw_uniform(count: int, images: int, source: Source) -> Tensor:
    """Draws uniform numbers from 0 to 1, [count, images], on the device of the source."""
    if isinstance(source, torch.Generator):
        return torch.rand(count, images, generator=source, device=source.device)
    assert images == len(source.rows), "draws are for the images of a share, all of them"
    return draw_uniform(count, source.batch, source.generator)[:, source.rows]
