"""Score maps: integer scores per class and region, their range, and exact sums over them.

Scores are bounded integers (at most 2047 in absolute value with the fixed-point head), so every sum is exact and
independent of order, batch and device. The prediction on attacked scores is therefore the one that the proof covers.
See docs/method.md, "Score map".
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.aggregation import PRODUCT_LIMIT, WEIGHT_LIMIT, AttentionPooling, pooling_dtype
from bagcert.devices import full_precision
from bagcert.errors import UnsoundError, UsageError
from bagcert.grid import RegionGrid, WindowBlock

FIXED_POINT_LIMIT = 2047
EXACT_SUMS = 2**53  # float64 represents every integer below this value
MANY_CLASSES = 32


@dataclass(frozen=True, eq=False)
class ScoreMap:
    """Integer scores of a batch of images of one size; the only input of the rules besides the threat model.

    Attributes:
        scores: integers [batch, classes, rows, cols] in [low, high].
        low, high: the range of the scores, which an attacker cannot leave.
        grid: which pixels each region sees.
        slack: bound on the change of each score when it is recomputed: non-negative integers of the same shape, or None
            if locality is exact. Rules assume the worst case. See docs/method.md, "Locality is checked".
        readout: None if the score of a class is the sum of its region scores. Otherwise `scores` is the evidence
            [batch, values + heads, rows, cols] that the readout pools.

    Raises:
        UsageError: scores are not integers, out of range, have fewer than two classes or do not match the grid; sums
            over the range would not be exact; the slack has another shape, is not integer or is negative.
    """

    scores: Int[Tensor, "batch classes rows cols"]
    low: int
    high: int
    grid: RegionGrid
    slack: Int[Tensor, "batch classes rows cols"] | None = None
    readout: AttentionPooling | None = None

    def __post_init__(self) -> None:
        if not _is_integer(self.scores.dtype):
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
        regions = self.grid.map_size[0] * self.grid.map_size[1]
        if 4 * max(self.span, abs(self.low), abs(self.high)) * regions >= EXACT_SUMS:
            raise UsageError(
                f"sums of scores in [{self.low}, {self.high}] over {regions:,} regions can reach 2^53, where float64 "
                "rounds them; scale the scores down"
            )
        if self.scores.numel() and not (self.low <= self.scores.min() and self.scores.max() <= self.high):
            raise UsageError(
                f"scores must lie in [{self.low}, {self.high}], found "
                f"[{int(self.scores.min())}, {int(self.scores.max())}]"
            )
        if self.readout is not None:
            self._check_evidence(self.readout)
        if self.slack is not None:
            if self.slack.shape != self.scores.shape or not _is_integer(self.slack.dtype):
                raise UsageError(
                    f"slack must be integers {list(self.scores.shape)}, got {self.slack.dtype} {list(self.slack.shape)}"
                )
            if self.slack.numel() and self.slack.min() < 0:
                raise UsageError(f"slack must be at least 0, found {int(self.slack.min())}")

    def _check_evidence(self, readout: AttentionPooling) -> None:
        if self.scores.shape[1] != readout.channels:
            raise UsageError(f"the readout pools {readout.channels} channels, the map has {self.scores.shape[1]}")
        if self.low < -PRODUCT_LIMIT or self.high > PRODUCT_LIMIT:
            raise UsageError(f"pooled evidence lies within {PRODUCT_LIMIT}, got the range [{self.low}, {self.high}]")
        weights = self.scores[:, readout.values :]
        if weights.numel() and not (weights.min() >= 1 and weights.max() <= WEIGHT_LIMIT):
            raise UsageError(
                f"attention weights must lie in [1, {WEIGHT_LIMIT}], found [{int(weights.min())}, {int(weights.max())}]"
            )
        if self.slack is not None:
            raise UsageError("attention pooling needs a network whose locality is exact; this map has slack")

    def __repr__(self) -> str:
        rows, cols = self.grid.map_size
        height, width = self.grid.image_size
        exact = "" if self.slack is None else ", with slack"
        pooled = "" if self.readout is None else ", pooled by attention"
        return (
            f"ScoreMap({len(self)} images of {height}x{width} px, {self.classes} classes, {rows}x{cols} regions, "
            f"scores in [{self.low}, {self.high}]{exact}{pooled}, {self.scores.device})"
        )

    def __len__(self) -> int:
        """Number of images."""
        return len(self.scores)

    def __getitem__(self, images: slice | Tensor) -> "ScoreMap":
        """Select images of the batch."""
        slack = None if self.slack is None else self.slack[images]
        return replace(self, scores=self.scores[images], slack=slack)

    @property
    def span(self) -> int:
        """`high - low`, the largest change of one score that an attacker can cause."""
        return self.high - self.low

    @property
    def classes(self) -> int:
        """Number of classes."""
        return self.scores.shape[1] if self.readout is None else self.readout.classes

    @cached_property
    def class_sums(self) -> Int[Tensor, "batch classes"]:
        """Sums `S_c` of the scores of each class over all regions, exact in int64.

        Raises:
            UsageError: class scores are not sums; use `class_scores`.
        """
        require_sum(self.readout, "a sum of region scores")
        return self.scores.sum((2, 3), dtype=torch.int64)

    @cached_property
    def class_scores(self) -> Int[Tensor, "batch classes"]:
        """Class scores over all regions, exact in int64: `class_sums`, or the output of the readout in its units."""
        if self.readout is None:
            return self.class_sums
        return self._read(self.scores.sum((2, 3), dtype=torch.int64))

    @property
    def region_scores(self) -> Int[Tensor, "batch classes rows cols"]:
        """Class scores of every region. With a readout, its output if only this region is kept.

        The region scores of a readout do not add up to `class_scores`.
        """
        return self.scores if self.readout is None else self._read(self.scores.movedim(1, -1)).movedim(-1, 1)

    def predict(self) -> Int[Tensor, " batch"]:
        """Predict the class with the largest score over all regions; ties go to the lowest index."""
        return lowest_argmax(self.class_scores)

    def evidence(self, images: slice) -> Float[Tensor, "batch channels regions"]:
        """Evidence of some images, in a float dtype in which every sum is exact."""
        return self.scores[images].flatten(2).to(self._pooling_dtype)

    @property
    def _pooling_dtype(self) -> torch.dtype:
        return pooling_dtype(self.grid.map_size[0] * self.grid.map_size[1])

    def _read(self, sums: Int[Tensor, "*batch channels"]) -> Int[Tensor, "*batch classes"]:
        """Apply the readout to sums over the kept regions."""
        assert self.readout is not None
        with exact_arithmetic(self.scores.device):
            return self.readout.scores(sums.to(self._pooling_dtype)).long()

    @property
    def exact_dtype(self) -> torch.dtype:
        """Float dtype in which every sum computed by the rules is exact."""
        rows, cols = self.grid.map_size
        return exact_dtype(self.span, rows * cols)

    def levels(self, images: slice | Tensor = slice(None)) -> Tensor:
        """Shifted scores `scores - low` of some images, from 0 to `span`, in `exact_dtype`.

        Differences between classes are unchanged, and sums are exact for any `low`.

        Raises:
            UsageError: class scores are not sums over regions.
        """
        require_sum(self.readout, "a level of a class")
        # With many classes, sums are fastest in channels-last layout; with few, in contiguous layout.
        layout = torch.channels_last if self.classes >= MANY_CLASSES else torch.contiguous_format
        scores = self.scores[images].contiguous(memory_format=layout)
        if max(abs(self.low), abs(self.high)) < 2**24:
            return scores.to(self.exact_dtype) - self.low
        return (scores.long() - self.low).to(self.exact_dtype)

    def transposed(self) -> "ScoreMap":
        """Swap rows and columns of the map and of its grid."""
        return self.turned(self.grid.transposed())

    def turned(self, grid: RegionGrid) -> "ScoreMap":
        """Swap rows and columns of the map; `grid` is the grid of the result."""
        slack = None if self.slack is None else self.slack.transpose(2, 3)
        return replace(self, scores=self.scores.transpose(2, 3), grid=grid, slack=slack)

    def worst_case(self, prediction: Int[Tensor, " batch"]) -> "ScoreMap":
        """The worst map for `prediction` within the slack: its scores lower, all other scores higher, within the range.

        The result has no slack. If a rule proves `prediction` on it from sums of score differences, the proof holds for
        every map within the slack, since no difference is smaller there.
        """
        if self.slack is None:
            return self
        own = torch.zeros(len(self), self.classes, 1, 1, dtype=torch.bool, device=self.scores.device)
        own[torch.arange(len(self), device=own.device), prediction] = True
        scores, slack = self.scores.long(), self.slack.long().clamp(max=self.span)
        worst = torch.where(own, scores - slack, scores + slack).clamp(self.low, self.high)
        return replace(self, scores=worst, slack=None)


def require_sum(readout: object | None, what: str, instead: str = "") -> None:
    """Check that class scores are sums of region scores.

    Args:
        readout: readout of the model or map; None if class scores are sums.
        what: the feature that needs sums; start of the error message.
        instead: advice; end of the error message.

    Raises:
        UsageError: `readout` is not None.
    """
    if readout is not None:
        raise UsageError(
            f"{what} needs class scores that are sums over regions; this model pools regions by attention"
            + (instead and f": {instead}")
        )


def quantize(z: Tensor, scale: float) -> Int[Tensor, "batch classes rows cols"]:
    """Apply the fixed-point head: clip(round(z * scale), -2047, 2047) as int16; NaN becomes -2047.

    >>> quantize(torch.tensor([[[[0.26, float("inf"), float("nan")]]]]), 10.0).flatten().tolist()
    [3, 2047, -2047]
    """
    scaled = torch.nan_to_num(
        z.float() * scale, nan=-FIXED_POINT_LIMIT, posinf=FIXED_POINT_LIMIT, neginf=-FIXED_POINT_LIMIT
    )
    return scaled.round().clamp(-FIXED_POINT_LIMIT, FIXED_POINT_LIMIT).to(torch.int16)


def binarize(z: Tensor) -> Int[Tensor, "batch classes rows cols"]:
    """Apply the binary head: the Heaviside step [z > 0] as int16; NaN becomes 0."""
    return (z > 0).to(torch.int16)


def slack_of(
    z: Float[Tensor, "batch classes rows cols"], tolerance: float, head: Callable[[Tensor], Tensor], span: int
) -> Int[Tensor, "batch classes rows cols"]:
    """Bound on the change of each integer score if `z` changes by at most `tolerance`.

    With H the head, the bound is max(H(z + tolerance) - H(z), H(z) - H(z - tolerance)), rounded outward. A binary score
    has slack if |z| <= tolerance, a fixed-point score only if a rounding boundary is that close. NaN and infinities may
    not occur with another order of summation, so their slack is `span`.

    Args:
        z: real-valued scores, float32.
        tolerance: bound on the change of `z`.
        head: monotone function from float32 scores to integers.
        span: span of the integers.

    >>> slack_of(torch.tensor([[[[0.2, -1e-4, float("nan")]]]]), 1e-3, binarize, 1).flatten().tolist()
    [0, 1, 1]
    """
    exact = z.double()  # z + tolerance may round to z in float32, so the next larger number is used
    above = torch.nextafter((exact + tolerance).float(), torch.full_like(z, torch.inf))
    below = torch.nextafter((exact - tolerance).float(), torch.full_like(z, -torch.inf))
    scores = head(z)
    slack = torch.maximum(head(above) - scores, scores - head(below))
    return slack.masked_fill(~z.isfinite(), span)


def lowest_argmax(values: Tensor) -> Tensor:
    """Index of the largest value along dimension 1; ties go to the lowest index. All predictions use this tie rule."""
    return values.max(1).indices  # first of equal maxima, like argmax, but several times faster on CPUs


def tie_penalty(prediction: Int[Tensor, " batch"], classes: int) -> Int[Tensor, "batch classes"]:
    """`1[c < prediction]`, the amount by which the tie rule reduces the lead over each class c."""
    return (torch.arange(classes, device=prediction.device)[None, :] < prediction[:, None]).long()


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def exact_dtype(span: int, regions: int) -> torch.dtype:
    """Float dtype in which every sum computed by the rules is exact: float32 below 2^24, else float64.

    >>> exact_dtype(4094, 1024), exact_dtype(4094, 1025)
    (torch.float32, torch.float64)
    """
    return torch.float32 if 4 * span * regions < 2**24 else torch.float64


@contextmanager
def exact_arithmetic(device: torch.device) -> Iterator[None]:
    """Context manager in which sums of integers are exact: no autocast, no gradients, full-precision float32 products.

    Raises:
        UnsoundError: the self-test of the device failed (`check_counting`), or another thread changed the precision of
            products while the context was active (`full_precision`).
    """
    with torch.no_grad(), torch.autocast(device.type, enabled=False), full_precision():
        _check_counting(str(device))
        yield


def check_counting(device: torch.device) -> None:
    """Run the self-test of `exact_arithmetic` on a device.

    Raises:
        UnsoundError: sums of integers are not exact on this device.
    """
    with exact_arithmetic(device):
        pass


def window_sums(maps: Tensor, block: WindowBlock) -> Tensor:
    """Sum maps [..., rows, cols] over every window of a block; returns [..., row windows, column windows].

    Exact if `maps` has the dtype `exact_dtype` and the caller is inside `exact_arithmetic`.
    """
    rows = torch.as_tensor(block.rows, dtype=maps.dtype, device=maps.device)
    cols = torch.as_tensor(block.cols, dtype=maps.dtype, device=maps.device)
    if maps.ndim == 4 and maps.stride(1) == 1 and maps.shape[1] >= MANY_CLASSES:
        # Channels-last layout: two products of large matrices instead of small products for every class.
        inner = maps.permute(0, 2, 3, 1)
        of_rows = rows @ inner.flatten(2)
        return (cols @ of_rows.unflatten(2, inner.shape[2:])).permute(0, 3, 1, 2)
    return rows @ maps @ cols.T


def kept(block: WindowBlock, device: torch.device) -> Bool[Tensor, "row_windows col_windows"]:
    """`block.keep` as a tensor on a device."""
    return torch.as_tensor(block.keep, device=device)


@cache
def _check_counting(device_name: str) -> None:
    """Check sums of an all-ones map with one zero, by summation and by products, at the limits of both dtypes."""
    side, device = 32, torch.device(device_name)
    types = (torch.float32,) if device.type == "mps" else (torch.float32, torch.float64)  # mps does not support float64
    for dtype in types:
        ones = torch.ones(2, side, side, dtype=dtype, device=device)
        ones[1, 0, 0] = 0
        row = torch.ones(1, side, dtype=dtype, device=device)
        for scale in (1, 4 * 2 * FIXED_POINT_LIMIT):
            expected = [side * side * scale, (side * side - 1) * scale]
            levels = ones * scale
            for sums in (
                levels.sum((1, 2)),
                (row @ levels @ row.T).flatten(),
                levels.flatten(1) @ row.new_ones(side**2),
                (row @ (row @ levels.permute(1, 2, 0).flatten(1)).view(side, 2)).flatten(),
            ):
                if (found := sums.tolist()) != expected:
                    raise UnsoundError(f"sums are not exact on device {device_name}: got {found}, expected {expected}")
