"""What is measured: images in, real-valued score maps out, on one backend."""

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
    """One deployed way to compute score maps.

    Attributes:
        scores: images float32 [batch, channels, height, width] to `z` [batch, classes, rows, cols] on the CPU, as it
            is deployed; contents are in [0, 1] or, where `takes_nan`, NaN.
        head: `z` to integer scores.
        grid: the declared geometry.
        channels: of the images.
        takes_nan: can an image hold NaN (not one of bytes).
        gradient: d/d(images) of the sum of `z` weighted by a second tensor; None where there are no gradients.
        threads: a context in which the backend uses so many threads; None where that cannot be set.
        batch_size: the only number of images it takes; None for any.
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
    """A scorer as it is deployed.

    Raises (where `grid` is None):
        UnsoundError: a layer is not local.
        UsageError: the network cannot be followed.
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
    """The autocast a scorer is deployed in, for calls that go around `forward_batch`."""
    if scorer.autocast_dtype is None:
        return nullcontext()
    return torch.autocast(scorer.device.type, dtype=scorer.autocast_dtype)


def outside(grid: RegionGrid, places: list[tuple[int, int, int, int]]) -> Bool[Tensor, "batch 1 rows cols"]:
    """Which regions no pixel of each [top, left, height, width] reaches."""
    reach = [
        torch.as_tensor(grid.rows_seen[:, top : top + height].any(1))[:, None]
        & torch.as_tensor(grid.cols_seen[:, left : left + width].any(1))
        for top, left, height, width in places
    ]
    return ~torch.stack(reach)[:, None]
