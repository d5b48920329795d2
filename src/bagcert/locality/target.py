"""Target of a locality measurement: a backend that maps images to real-valued score maps."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bagcert.grid import RegionGrid
from bagcert.nets.region_scorer import RegionScorer


@dataclass(frozen=True, eq=False)
class Backend:
    """A deployed computation of score maps.

    Attributes:
        scores: maps images float32 [batch, channels, height, width] to `z` [batch, classes, rows, cols] on the CPU, as
            deployed. Pixels are in [0, 1], or NaN if `takes_nan`.
        takes_nan: whether images can contain NaN (not the case for uint8 images).
        gradient: gradient with respect to the images of the sum of `z` weighted by a second tensor; None if there are
            no gradients.
        threads: context manager that sets the number of threads; None if it cannot be set.
        batch_size: the only supported batch size; None for any.
    """

    scores: Callable[[Tensor], Tensor]
    head: Callable[[Tensor], Tensor]
    grid: RegionGrid
    channels: int
    takes_nan: bool = True
    gradient: Callable[[Tensor, Tensor], Tensor] | None = None
    threads: Callable[[int], AbstractContextManager[None]] | None = None
    batch_size: int | None = None


def torch_backend(scorer: RegionScorer, grid: RegionGrid | None = None) -> Backend:
    """Create the backend of a region scorer as deployed with torch.

    Raises:
        UnsoundError: a layer is not local (only if `grid` is None).
        UsageError: the network cannot be traced (only if `grid` is None).
    """

    def scores(images: Float[Tensor, "batch channels height width"]) -> Tensor:
        return scorer.forward_batch(images).cpu()

    def gradient(images: Float[Tensor, "batch channels height width"], weights: Tensor) -> Tensor:
        dtype, device = scorer.autocast_dtype, scorer.device
        with torch.enable_grad(), torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            leaf = images.to(device).requires_grad_()
            (result,) = torch.autograd.grad((scorer(leaf).float() * weights.to(device)).sum(), leaf)
        return result.cpu()

    return Backend(
        scores,
        scorer.integers,
        scorer.grid() if grid is None else grid,
        scorer.channels,
        gradient=gradient,
        threads=_torch_threads if scorer.device.type == "cpu" else None,
    )


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def precision(scorer: RegionScorer) -> AbstractContextManager[object]:
    """Autocast context of a deployed scorer, for calls that bypass `forward_batch`."""
    if scorer.autocast_dtype is None:
        return nullcontext()
    return torch.autocast(scorer.device.type, dtype=scorer.autocast_dtype)


def outside(grid: RegionGrid, places: list[tuple[int, int, int, int]]) -> Bool[Tensor, "batch 1 rows cols"]:
    """Which regions see no pixel of each rectangle [top, left, height, width]."""
    reach = [
        torch.as_tensor(grid.rows_seen[:, top : top + height].any(1))[:, None]
        & torch.as_tensor(grid.cols_seen[:, left : left + width].any(1))
        for top, left, height, width in places
    ]
    return ~torch.stack(reach)[:, None]
