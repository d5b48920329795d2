"""Derandomized smoothing: a classifier votes on ablated images, and a patch changes only the votes that see it.

Each position keeps one band of columns, band of rows, or block of the image and hides the rest. The votes of the
classifier on these ablated images form a score map of 0 and 1 over the positions. Bands that wrap around the border are
represented by the incidence matrices of the grid, so every rule applies.

Source: Levine & Feizi, NeurIPS 2020; Salman et al., Smoothed ViT, CVPR 2022 (`votes="argmax"`).
Guarantee: that of the rule; "levine-feizi" is the published certificate, "vote" certifies at least as much.
Differences from the publications: the positions that a patch touches are counted instead of computed as
(p + k - 1) / stride, which is too small if cyclic positions meet at a gap shorter than the stride; every other class is
considered instead of one runner-up; ties go to the lowest class index in both prediction and certificate.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bagcert.data.photo import Images, as_batch
from bagcert.defenses.base import ScoreMapDefense
from bagcert.defenses.undefended import Undefended
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap, lowest_argmax
from bagcert.threat import PatchLike, PatchThreatModel

ABLATIONS = ("column", "row", "block")
VOTE_KINDS = ("threshold", "argmax")


def ablate(
    images: Float[Tensor, "batch 3 height width"], positions: Int[Tensor, "batch 2"], ablation: str, size_px: int
) -> Float[Tensor, "batch 6 height width"]:
    """Ablate each image at one position: `[x, 1 - x]` for kept pixels, zero for hidden pixels.

    This encoding distinguishes hidden from black pixels. Hidden pixels have no influence on the result, even if NaN.

    Args:
        images: images in [0, 1].
        positions: [first kept row, first kept column] for each image, modulo the side of the image. Column bands
            ignore the row, row bands ignore the column.
        ablation: "column", "row" or "block".
        size_px: number of kept columns, rows, or both; kept pixels wrap around the border.

    Raises:
        UsageError: unknown ablation or invalid size.

    >>> image = torch.full((1, 3, 1, 4), 0.25)
    >>> ablate(image, torch.tensor([[0, 3]]), "column", 2)[0, [0, 3], 0].tolist()
    [[0.25, 0.0, 0.0, 0.25], [0.75, 0.0, 0.0, 0.75]]
    """
    height, width = images.shape[2:]
    rows, cols = _kept_px(ablation, size_px, (height, width))
    device = images.device
    positions = positions.to(device)
    row = (torch.arange(height, device=device) - positions[:, :1]) % height < rows
    col = (torch.arange(width, device=device) - positions[:, 1:]) % width < cols
    kept = row[:, None, :, None] & col[:, None, None, :]
    return torch.where(kept, torch.cat([images, 1 - images], 1), images.new_zeros(()))


class DerandomizedSmoothing(ScoreMapDefense):
    """Certified defense from a classifier of ablated images: a rule applied to the votes of all positions.

    A vote must not depend on the rest of the batch. The ablated image of a position that the patch does not touch is
    bit-identical with and without the patch, and `predict` and `certify` compute votes with the same code, in float32
    and without autocast. However, kernels may round differently for another batch size, which could change a vote near
    the threshold. With `fixed_batch` every batch has the same shape. If images arrive one by one, set `at_once` to the
    number of positions. If the kernels of a device treat the rows of a batch differently, use `tolerance`: votes that
    close to a change count for the attacker, and certificates are marked `locality: measured`.

    Args:
        model: maps ablated images [batch, 6, height, width] (see `ablate`) to logits [batch, classes]. It is put into
            eval mode. Its output for one image must not depend on the other images of the batch.
        class_names, image_size, patch, name: as for `PixelDefense`.
        ablation: what a position keeps: a band of columns ("column"), a band of rows ("row") or a square ("block").
        size_px: width of the band, or side of the block.
        stride: distance between positions in pixels; the first position is 0.
        votes: "threshold" votes for every class whose softmax is at least `threshold` (several or none). "argmax" votes
            for the class with the largest logit; ties go to the lowest index.
        threshold: threshold in (0, 1].
        rule: the deployed rule, a name from `bagcert.rules.RULES`.
        at_once: number of ablated images per forward pass; bounds memory.
        fixed_batch: whether every forward pass has exactly `at_once` images; the last batch is padded.
        tolerance: bound on the change of a softmax value when it is recomputed.

    Raises:
        UsageError: an argument is out of range.

    >>> band = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))
    >>> defense = DerandomizedSmoothing(band, ("no", "yes"), (8, 8), size_px=2, patch=2)
    >>> defense.forward_passes(), defense.score_map(np.zeros((1, 8, 8, 3), dtype=np.uint8)).grid.map_size
    (8, (1, 8))
    """

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        image_size: tuple[int, int],
        *,
        ablation: str = "column",
        size_px: int = 4,
        stride: int = 1,
        votes: str = "threshold",
        threshold: float = 0.3,
        rule: str = "vote",
        patch: PatchLike = 5,
        name: str = "derandomized-smoothing",
        at_once: int = 256,
        fixed_batch: bool = True,
        tolerance: float = 0.0,
    ) -> None:
        self.classifier = Undefended(model, class_names, image_size)
        if votes not in VOTE_KINDS:
            raise UsageError(f"votes are {' or '.join(VOTE_KINDS)}, got {votes!r}")
        if not 0 < threshold <= 1:
            raise UsageError(f"the threshold of a vote must be above 0 and at most 1, got {threshold}")
        if at_once < 1:
            raise UsageError(f"a pass must take at least one ablated image, got {at_once}")
        if not 0 <= tolerance < 1:
            raise UsageError(f"the tolerance of softmax values must be at least 0 and below 1, got {tolerance}")
        get_rule(rule)
        self.model, self.class_names = self.classifier.model, self.classifier.class_names
        self.image_size = self.classifier.image_size
        self.grid = ablation_grid(ablation, size_px, stride, self.image_size)
        self.ablation, self.size_px, self.stride = ablation, size_px, stride
        self.votes, self.threshold = votes, threshold
        self.rule, self.patch, self.name = rule, patch, name
        self.at_once, self.fixed_batch, self.tolerance = at_once, fixed_batch, tolerance

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return self.classifier.device

    @property
    def positions(self) -> Int[Tensor, "positions 2"]:
        """All positions [first kept row, first kept column], in the order of the score map."""
        rows, cols = (torch.arange(count) * self.stride for count in self.grid.map_size)
        return torch.cartesian_prod(rows, cols)

    def score_map(self, images: Images) -> ScoreMap:
        """Compute the votes of a batch: 0 or 1 for each class and position. Images must have size `image_size`."""
        batch = as_batch(images)
        if tuple(batch.shape[2:]) != self.image_size:
            expected, found = (f"{size[0]}x{size[1]}" for size in (self.image_size, batch.shape[2:]))
            raise UsageError(f"this defense is for images of {expected} px, got {found} px")
        scores, slack = [], []
        for logits in self._logits(batch):
            scores.append(self._votes(logits))
            if self.tolerance > 0:
                slack.append(self._slack(logits))
        loose = self._as_map(slack, len(batch)) if slack else None
        return ScoreMap(self._as_map(scores, len(batch)), 0, 1, self.grid, loose)

    def forward_passes(self, threat: PatchThreatModel | None = None, certify: bool = True) -> int:
        """Number of ablated images per image, for both prediction and certificate."""
        rows, cols = self.grid.map_size
        return rows * cols

    def _logits(self, batch: Float[Tensor, "batch 3 height width"]) -> Iterator[Float[Tensor, "rows classes"]]:
        """Yield the logits of all ablated images in the order (image, position), one forward pass at a time."""
        positions, device = self.positions, self.device
        rows = torch.arange(len(batch) * len(positions))
        self.model.eval()  # batch norm in train mode would make votes depend on each other
        for part in rows.split(self.at_once):
            chosen = batch[(part // len(positions)).to(batch.device)].to(device)
            ablated = ablate(chosen, positions[part % len(positions)], self.ablation, self.size_px)
            if self.fixed_batch and len(part) < self.at_once:
                empty = ablated.new_zeros(self.at_once - len(part), *ablated.shape[1:])
                ablated = torch.cat([ablated, empty])
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                logits = self.classifier.logits(ablated)
            yield logits[: len(part)].float()

    def _votes(self, logits: Float[Tensor, "rows classes"]) -> Int[Tensor, "rows classes"]:
        """Compute the votes from logits; used by both `predict` and `certify`. NaN gives no vote."""
        if self.votes == "threshold":
            return (logits.softmax(1) >= self.threshold).to(torch.int16)
        label = lowest_argmax(logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
        return nn.functional.one_hot(label, logits.shape[1]).to(torch.int16)

    def _slack(self, logits: Float[Tensor, "rows classes"]) -> Int[Tensor, "rows classes"]:
        """1 for every vote that could change if each softmax value changes by at most `tolerance`, else 0."""
        softmax = logits.double().softmax(1)
        if self.votes == "threshold":
            steady = (softmax - self.threshold).abs() > self.tolerance
        else:
            first, second = softmax.topk(2, 1).values.T
            best_other = torch.where(softmax == first[:, None], second[:, None], first[:, None])
            steady = (softmax - best_other).abs() > 2 * self.tolerance
        return (~steady).to(torch.int16)  # NaN is not steady

    def _as_map(self, parts: list[Tensor], batch: int) -> Int[Tensor, "batch classes rows cols"]:
        votes = torch.cat(parts).unflatten(0, (batch, -1))
        return votes.transpose(1, 2).unflatten(2, self.grid.map_size).contiguous()


@lru_cache(maxsize=64)
def ablation_grid(ablation: str, size_px: int, stride: int, image_size: tuple[int, int]) -> RegionGrid:
    """Grid of the pixels that each position keeps; positions are 0, stride, 2 * stride, ... on each ablated axis.

    Raises:
        UsageError: unknown ablation, or a size or stride outside [1, side of the image].

    >>> grid = ablation_grid("column", 19, 10, (224, 224))
    >>> grid.map_size, int(grid.touched_cols(32).sum(1).max())
    ((1, 23), 6)
    """
    kept = _kept_px(ablation, size_px, image_size)
    axes = []
    for side, size, whole in zip(image_size, kept, (ablation == "column", ablation == "row"), strict=True):
        if whole:
            axes.append(np.ones((1, side), dtype=bool))
            continue
        if not 1 <= stride <= side:
            raise UsageError(f"the stride between positions must be from 1 to {side} px, got {stride}")
        first = np.arange(0, side, stride)[:, None]
        axes.append((np.arange(side)[None, :] - first) % side < size)
    return RegionGrid(*axes)


def _kept_px(ablation: str, size_px: int, image_size: tuple[int, int]) -> tuple[int, int]:
    """Number of rows and columns that a position keeps."""
    if ablation not in ABLATIONS:
        raise UsageError(f"an ablation must be one of {', '.join(ABLATIONS)}; got {ablation!r}")
    height, width = image_size
    rows = height if ablation == "column" else size_px
    cols = width if ablation == "row" else size_px
    if size_px < 1 or rows > height or cols > width:
        raise UsageError(f"a {ablation} of {size_px} px does not fit into an image of {height}x{width} px")
    return rows, cols
