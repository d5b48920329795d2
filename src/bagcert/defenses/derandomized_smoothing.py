"""De-randomized smoothing: one vote per ablated image, of which a patch can change only those that see it.

Every position keeps one band of columns, band of rows, or block of the image, hides the rest, and lets an ordinary
classifier vote. The votes are a score map of 0 and 1 over the positions, and bands that wrap around the border are
incidence like any other, so that every rule applies.

Source: Levine & Feizi, NeurIPS 2020; Salman et al., Smoothed ViT, CVPR 2022 (`votes="argmax"`).
Guarantee: that of the rule; "levine-feizi" is the published certificate, "vote" certifies at least as much.
Where it differs from the publications: the positions a patch touches are counted, not taken from (p + k - 1) / stride,
which is too few where cyclic positions meet at a gap shorter than the stride; every rival class is looked at, not one
runner-up among equals; ties go to the lowest class index in prediction and certificate alike.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from bagcert.data.photo import as_batch
from bagcert.defenses.base import ScoreMapDefense
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap, lowest_argmax
from bagcert.threat import PatchLike, PatchThreatModel

ABLATIONS = ("column", "row", "block")
VOTE_KINDS = ("threshold", "argmax")


def ablate(
    images: Float[Tensor, "batch 3 height width"],
    positions: Int[Tensor, "batch 2"],
    ablation: str,
    size_px: int,
) -> Float[Tensor, "batch 6 height width"]:
    """What the classifier sees of each image at one position: `[x, 1 - x]`, zero where hidden.

    So hidden is told from black. Of a hidden pixel nothing is left, not even a NaN.

    Args:
        images: in [0, 1].
        positions: [first kept row, first kept column] of each image, any integers: they count modulo the side. Bands of
            columns do not look at the row, nor bands of rows at the column.
        ablation: "column", "row" or "block".
        size_px: how many columns, rows, or both are kept; they wrap around the border.

    Raises:
        UsageError: another ablation or size.

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
    """Any classifier of ablated images as a certified defense: votes of all positions, and a rule that counts them.

    Args:
        model: ablated images [batch, 6, height, width] (see `ablate`) to logits [batch, classes]. It is put into eval
            mode. Its answer on one image must not depend on the others in the batch.
        class_names: one per logit.
        image_size: (height_px, width_px).
        ablation: what a position keeps: a band of "column"s, of "row"s, or a square "block".
        size_px: how wide that is.
        stride: between positions, which start at 0.
        votes: "threshold", a vote for every class whose softmax is at least `threshold` (several or none), or
            "argmax", one vote for the largest logit, the lowest index among equals.
        threshold: above 0, at most 1.
        rule: the deployed rule, a name from `bagcert.rules.RULES`.
        patch: the deployed patch, in the notation of `PatchThreatModel.parse`.
        name: for tables.
        at_once: ablated images per pass through the model, which bounds memory.
        fixed_batch: every pass has exactly `at_once` images, the last filled up with empty ones.
        tolerance: how far a softmax value may be off when it is computed again.

    Raises:
        UsageError: an argument outside what is said here.

    Can a vote depend on what else is in the batch? The ablated image of a position that the patch does not touch is the
    same to the last bit, and `predict` and `certify` decide every vote in the same code, in float32 and outside of
    autocast. But kernels may round differently for another batch size, which could turn a vote at the threshold. With
    `fixed_batch` no other size occurs (and one shape means one choice of kernel where those are benchmarked); choose
    `at_once` as the number of positions if images come one by one. What then still moves, if a device's kernels treat
    rows of a batch differently, is for `tolerance`: votes that near to being another count for the attacker, and
    certificates are marked `locality: measured`.

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
        if len(class_names) < 2:
            raise UsageError(f"a classifier needs at least two class names, got {len(class_names)}")
        if votes not in VOTE_KINDS:
            raise UsageError(f"votes are {' or '.join(VOTE_KINDS)}, got {votes!r}")
        if not 0 < threshold <= 1:
            raise UsageError(f"the threshold of a vote must be above 0 and at most 1, got {threshold}")
        if at_once < 1:
            raise UsageError(f"a pass must take at least one ablated image, got {at_once}")
        if not 0 <= tolerance < 1:
            raise UsageError(f"the tolerance of softmax values must be at least 0 and below 1, got {tolerance}")
        get_rule(rule)
        self.model = model.eval()
        self.class_names = tuple(class_names)
        self.image_size = (image_size[0], image_size[1])
        self.grid = ablation_grid(ablation, size_px, stride, self.image_size)
        self.ablation, self.size_px, self.stride = ablation, size_px, stride
        self.votes, self.threshold = votes, threshold
        self.rule, self.patch, self.name = rule, patch, name
        self.at_once, self.fixed_batch, self.tolerance = at_once, fixed_batch, tolerance

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        weight = next(self.model.parameters(), None)
        return torch.device("cpu") if weight is None else weight.device

    @property
    def positions(self) -> Int[Tensor, "positions 2"]:
        """[first kept row, first kept column] of every position, in the order of the score map."""
        rows, cols = (torch.arange(count) * self.stride for count in self.grid.map_size)
        return torch.cartesian_prod(rows, cols)

    def score_map(self, images: np.ndarray | Tensor) -> ScoreMap:
        """The votes of a batch: 0 or 1 for each class and position.

        Raises:
            UsageError: bad images, images of another size, or a model that does not give one logit per class name.
        """
        batch = as_batch(images)
        if tuple(batch.shape[2:]) != self.image_size:
            expected, found = (f"{size[0]}x{size[1]}" for size in (self.image_size, batch.shape[2:]))
            raise UsageError(f"positions are laid out for images of {expected} px, got {found} px")
        scores, slack = [], []
        for logits in self._logits(batch):
            scores.append(self._votes(logits))
            if self.tolerance > 0:
                slack.append(self._slack(logits))
        loose = self._as_map(slack, len(batch)) if slack else None
        return ScoreMap(self._as_map(scores, len(batch)), 0, 1, self.grid, loose)

    def forward_passes(self, threat: PatchThreatModel | None = None, certify: bool = True) -> int:
        """Ablated images per image, for prediction and certificate alike."""
        rows, cols = self.grid.map_size
        return rows * cols

    def _logits(self, batch: Float[Tensor, "batch 3 height width"]) -> Iterator[Float[Tensor, "rows classes"]]:
        """Logits of every ablated image in the order (image, position), a pass at a time."""
        positions, device = self.positions, self.device
        rows = torch.arange(len(batch) * len(positions))
        self.model.eval()  # all of it: a batch norm in train mode would make votes depend on each other
        for part in rows.split(self.at_once):
            chosen = batch[(part // len(positions)).to(batch.device)].to(device)
            ablated = ablate(chosen, positions[part % len(positions)], self.ablation, self.size_px)
            if self.fixed_batch and len(part) < self.at_once:
                empty = ablated.new_zeros(self.at_once - len(part), *ablated.shape[1:])
                ablated = torch.cat([ablated, empty])
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                logits = self.model(ablated)
            if logits.shape != (len(ablated), len(self.class_names)):
                raise UsageError(
                    f"the model must give [batch, {len(self.class_names)}] logits for its class names, "
                    f"got {list(logits.shape)}"
                )
            yield logits[: len(part)].float()

    def _votes(self, logits: Float[Tensor, "rows classes"]) -> Int[Tensor, "rows classes"]:
        """The one place where votes are decided. A NaN is no vote."""
        if self.votes == "threshold":
            return (logits.softmax(1) >= self.threshold).to(torch.int16)
        label = lowest_argmax(logits.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf))
        return nn.functional.one_hot(label, logits.shape[1]).to(torch.int16)

    def _slack(self, logits: Float[Tensor, "rows classes"]) -> Int[Tensor, "rows classes"]:
        """1 for every vote that could be another if each softmax value were off by at most `tolerance`."""
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
    """Which pixels each position keeps; positions lie at 0, stride, 2 * stride ... on each axis that is ablated.

    Raises:
        UsageError: another ablation, or a size or stride that is not at least 1 and at most the side.

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
    """How many rows and columns a position keeps."""
    if ablation not in ABLATIONS:
        raise UsageError(f"an ablation is one of {', '.join(ABLATIONS)}; got {ablation!r}")
    height, width = image_size
    rows = height if ablation == "column" else size_px
    cols = width if ablation == "row" else size_px
    if size_px < 1 or rows > height or cols > width:
        raise UsageError(f"a {ablation} of {size_px} px does not fit into an image of {height}x{width} px")
    return rows, cols
