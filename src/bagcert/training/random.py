"""Random numbers for the images of a batch that do not depend on who works on which of them."""

from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ShardedGenerator:
    """A source of random numbers for some images of a batch.

    Every number is drawn for the whole batch, and those of the images at hand are kept. So an image gets the same
    numbers on one process and on many, and in one part of the batch as in another.

    Attributes:
        generator: at the same state for everyone who works on the batch.
        batch: images in the whole batch.
        rows: which of them are at hand, in their order there; on the device of the generator.
    """

    generator: torch.Generator
    batch: int
    rows: Int64[Tensor, " images"]


Source = torch.Generator | ShardedGenerator


def draw(high: int, images: int, source: Source, *shape: int) -> Tensor:
    """Integers from 0 to `high - 1`, [images, *shape], on the device of the source.

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
    """Numbers from 0 to 1, [count, images], on the device of the source."""
    if isinstance(source, torch.Generator):
        return torch.rand(count, images, generator=source, device=source.device)
    assert images == len(source.rows), "draws are for the images of a share, all of them"
    return draw_uniform(count, source.batch, source.generator)[:, source.rows]
