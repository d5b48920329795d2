"""Score maps: integer scores per class and region, their range, and exact sums over them.

Integers bounded by 2047 make every sum exact and independent of order, batch and device, so that the
prediction on attacked scores is the one the proof speaks of. Source: METHOD section 2 of the design notes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from bagcert.errors import BagcertError, UsageError
from bagcert.grid import RegionGrid, WindowBlock

FIXED_POINT_LIMIT = 2047


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """What a region scorer says of a batch of images of one size: the only thing the rules ever see.

    Attributes:
        scores: integers [batch, classes, rows, cols], each within [low, high].
        low, high: the declared range, which an attacker can reach but not leave.
        grid: which pixels each region sees.

    Raises:
        UsageError: scores are not integers, out of range, of fewer than two classes, or not on the grid.
    """

    scores: Int[Tensor, "batch classes rows cols"]
    low: int
    high: int
    grid: RegionGrid

    def __post_init__(self) -> None:
        if self.scores.dtype.is_floating_point or self.scores.dtype in (torch.bool, torch.complex64):
            raise UsageError(f"scores must be integers, got {self.scores.dtype}")
        if self.scores.ndim != 4 or tuple(self.scores.shape[2:]) != self.grid.map_size:
            raise UsageError(
                f"scores must be [batch, classes, {self.grid.map_size[0]}, {self.grid.map_size[1]}], "
                f"got {list(self.scores.shape)}"
            )
        if self.scores.shape[1] < 2:
            raise UsageError("a certificate needs at least two classes, got one")
        if self.low >= self.high:
            raise UsageError(f"the range of scores must have low < high, got [{self.low}, {self.high}]")
        if self.scores.numel() and not (self.low <= self.scores.min() and self.scores.max() <= self.high):
            raise UsageError(
                f"scores must lie in [{self.low}, {self.high}], found "
                f"[{int(self.scores.min())}, {int(self.scores.max())}]"
            )

    def __len__(self) -> int:
        """How many images."""
        return len(self.scores)

    def __getitem__(self, images: slice | Tensor) -> "ScoreMap":
        """The score maps of some of the images."""
        return ScoreMap(self.scores[images], self.low, self.high, self.grid)

    @property
    def span(self) -> int:
        """`high - low`: the most an attacker can move one score."""
        return self.high - self.low

    @property
    def classes(self) -> int:
        """How many classes."""
        return self.scores.shape[1]

    @cached_property
    def class_sums(self) -> Int[Tensor, "batch classes"]:
        """`S_c`: the sum of every class over all regions, exact in int64."""
        return self.scores.sum((2, 3), dtype=torch.int64)

    def predict(self) -> Int[Tensor, " batch"]:
        """The class with the largest sum; among equals the lowest index."""
        return lowest_argmax(self.class_sums)

    @property
    def exact_dtype(self) -> torch.dtype:
        """The float type that holds every sum the rules form exactly."""
        rows, cols = self.grid.map_size
        return exact_dtype(self.span, rows * cols)

    def levels(self, images: slice | Tensor = slice(None)) -> Tensor:
        """`scores - low` of some images, from 0 to `span`, in `exact_dtype`.

        Differences between classes are those of the scores, and sums stay exact however far `low` is from 0.
        """
        scores = self.scores[images]
        if max(abs(self.low), abs(self.high)) < 2**24:
            return scores.to(self.exact_dtype) - self.low
        return (scores.long() - self.low).to(self.exact_dtype)

    def transposed(self) -> "ScoreMap":
        """The same map with rows and columns swapped."""
        return ScoreMap(self.scores.transpose(2, 3), self.low, self.high, self.grid.transposed())


def quantize(z: Tensor, scale: float) -> Int[Tensor, "batch classes rows cols"]:
    """The fixed-point head: clip(round(z * scale), -2047, 2047) as int16, with NaN as -2047.

    >>> quantize(torch.tensor([[[[0.26, float("inf"), float("nan")]]]]), 10.0).flatten().tolist()
    [3, 2047, -2047]
    """
    scaled = torch.nan_to_num(
        z.float() * scale, nan=-FIXED_POINT_LIMIT, posinf=FIXED_POINT_LIMIT, neginf=-FIXED_POINT_LIMIT
    )
    return scaled.round().clamp(-FIXED_POINT_LIMIT, FIXED_POINT_LIMIT).to(torch.int16)


def binarize(z: Tensor) -> Int[Tensor, "batch classes rows cols"]:
    """The binary head: the Heaviside step [z > 0] as int16, with NaN as 0."""
    return (z > 0).to(torch.int16)


def lowest_argmax(values: Tensor) -> Tensor:
    """The index of the largest value along dimension 1, the lowest among equals: the package's one tie rule."""
    return values.max(1).indices  # the first of equal maxima, like argmax, and several times as fast on CPUs


def tie_penalty(prediction: Int[Tensor, " batch"], classes: int) -> Int[Tensor, "batch classes"]:
    """`1[c < prediction]`: what the tie rule takes from the prediction's lead over each class."""
    return (torch.arange(classes, device=prediction.device)[None, :] < prediction[:, None]).long()


def exact_dtype(span: int, regions: int) -> torch.dtype:
    """float32 while every sum the rules form is below 2^24, float64 above.

    >>> exact_dtype(4094, 1024), exact_dtype(4094, 1025)
    (torch.float32, torch.float64)
    """
    return torch.float32 if 4 * span * regions < 2**24 else torch.float64


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """No autocast, no gradients, full float32 products whatever the user has set: sums of integers are exact inside.

    Raises:
        BagcertError: this device does not count an all-ones map with one zero correctly.
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), _full_precision():
        _check_counting(device.type)
        yield


@contextmanager
def _full_precision() -> Iterator[None]:
    """Turns off TF32 and bfloat16 matrix products, which round integers above 2^11 and 2^8."""
    homes = (torch.backends.cuda, torch.backends.mkldnn)
    backends: list[Any] = [home.matmul for home in homes if hasattr(home, "matmul")]
    if all(hasattr(backend, "fp32_precision") for backend in backends):
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
    else:  # torch before 2.9
        legacy = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("highest")
            yield
        finally:
            torch.set_float32_matmul_precision(legacy)


def window_sums(maps: Tensor, block: WindowBlock) -> Tensor:
    """Sums of [..., rows, cols] maps over every window of a block: [..., row windows, column windows].

    Exact when `maps` is in `exact_dtype` and the caller is inside `exact_arithmetic`.
    """
    rows = torch.as_tensor(block.rows, dtype=maps.dtype, device=maps.device)
    cols = torch.as_tensor(block.cols, dtype=maps.dtype, device=maps.device)
    return rows @ maps @ cols.T


def kept(block: WindowBlock, device: torch.device) -> Bool[Tensor, "row_windows col_windows"]:
    """Which products of the block are windows, as a tensor."""
    return torch.as_tensor(block.keep, device=device)


@cache
def _check_counting(device_type: str) -> None:
    side, device = 32, torch.device(device_type)
    ones = torch.ones(side, side, device=device)
    ones[0, 0] = 0
    row = torch.ones(1, side, device=device)
    for scale in (1, 4 * 2 * FIXED_POINT_LIMIT):
        found = (row @ (ones * scale) @ row.T).item()
        if found != (side * side - 1) * scale:
            raise BagcertError(
                f"device {device_type} counts {found} where {(side * side - 1) * scale} is right: not exact"
            )
