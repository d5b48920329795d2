"""Pixel masks: sets of rectangles that cover every patch of a threat, and predictions on masked images.

Source: Xiang et al., PatchCleanser, USENIX Security 2022 (mask sets). Guarantee: every patch of the threat is contained
in at least one mask of the set, and K patches are contained in one union of K masks. Differences from the publication:
several shapes and patches, sides that are not a multiple of the stride, and no duplicate masks.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, product
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.defenses.undefended import Undefended
from bagcert.errors import UsageError
from bagcert.scores import lowest_argmax
from bagcert.threat import PatchThreatModel

MOST_MASKS = 3_000
"""Limit for the number of masks; all pairs of this many masks need 4.5 million forward passes per image."""


def axis_masks(image_px: int, patch_px: int, stride_px: int) -> tuple[list[int], int]:
    """Start positions of the masks along one axis, ascending, and the side of the masks in pixels.

    With image side n, patch side p and stride s (at most n - p + 1), the side is p + s - 1 and the starts are
    min(i * s, n - side) without duplicates. A patch at j is contained in the mask i = floor(j / s).

    >>> axis_masks(32, 5, 5)
    ([0, 5, 10, 15, 20, 23], 9)
    """
    stride = min(stride_px, image_px - patch_px + 1)
    side = patch_px + stride - 1
    starts = [min(start, image_px - side) for start in range(0, image_px - patch_px + 1, stride)]
    return sorted(set(starts)), side


def stride_for(image_px: int, patch_px: int, masks: int) -> int:
    """Stride in pixels with which `masks` masks cover one axis: ceil((n - p + 1) / masks)."""
    return -(-(image_px - patch_px + 1) // masks)


def unions(rectangles: list[tuple[int, ...]], patches: int, most: int, remedy: str) -> Int[Tensor, "unions patches 4"]:
    """All unions of `patches` rectangles, with repetition, in lexicographic order.

    Args:
        rectangles: `[top, left, height, width]` in pixels.
    """
    count = comb(len(rectangles) + patches - 1, patches)
    if count > most:
        what = f"{count:,} rectangles" if patches == 1 else f"{count:,} unions of {patches} of {len(rectangles):,}"
        raise UsageError(f"this threat needs {what}, more than {most:,}; {remedy}")
    members = torch.tensor(list(combinations_with_replacement(range(len(rectangles)), patches)))
    return torch.tensor(rectangles, dtype=torch.int64)[members]


def covered(
    rectangles: Int[Tensor, "rows rectangles 4"], image_size: tuple[int, int]
) -> Bool[Tensor, "rows height width"]:
    """Which pixels are covered by at least one of the rectangles `[top, left, height, width]` of each row."""
    top, left, height, width = rectangles[..., None].unbind(2)
    y, x = (torch.arange(side, device=rectangles.device) for side in image_size)
    rows, cols = (y >= top) & (y < top + height), (x >= left) & (x < left + width)
    return (rows[..., :, None] & cols[..., None, :]).any(1)


@dataclass(frozen=True, eq=False)
class PixelMasks:
    """A set of masks; each mask is the union of K rectangles for a threat of K patches.

    Attributes:
        image_size: (height_px, width_px).
        rectangles: `[top, left, height, width]` in pixels of the rectangles of each mask. For one patch they are sorted
            by (shape, top, left), for several patches in lexicographic order of these.
    """

    image_size: tuple[int, int]
    rectangles: Int[Tensor, "masks patches 4"]

    @classmethod
    def per_axis(cls, threat: PatchThreatModel, masks_per_axis: int) -> "PixelMasks":
        """Build the masks of PatchCleanser: at most `masks_per_axis` along each axis, for every shape of the threat.

        Raises:
            UsageError: fewer than one mask per axis, or more than 3,000 masks.
        """
        if masks_per_axis < 1:
            raise UsageError(f"there must be at least one mask per axis, got {masks_per_axis}")
        return cls._of(threat, lambda image, patch: stride_for(image, patch, masks_per_axis), "use fewer per axis")

    @classmethod
    def strided(cls, threat: PatchThreatModel, stride: int) -> "PixelMasks":
        """Build masks at every `stride` pixels and at the far border, each `stride - 1` px larger than the patch.

        Raises:
            UsageError: a stride of 0, or more than 3,000 masks.
        """
        if stride < 1:
            raise UsageError(f"the stride of masks must be at least 1 px, got {stride}")
        return cls._of(threat, lambda image, patch: stride, "use a larger stride")

    @classmethod
    def _of(cls, threat: PatchThreatModel, stride: Callable[[int, int], int], remedy: str) -> "PixelMasks":
        # The masks cover all placements even if placements are restricted, so contained shapes need no masks.
        shapes = PatchThreatModel(threat.image_size, threat.shapes).shapes
        found: dict[tuple[int, ...], None] = {}  # an ordered set
        for shape in shapes:
            axes = [axis_masks(n, p, stride(n, p)) for n, p in zip(threat.image_size, shape, strict=True)]
            (tops, height), (lefts, width) = axes
            found |= dict.fromkeys((top, left, height, width) for top, left in product(tops, lefts))
        return cls(threat.image_size, unions(list(found), threat.patches, MOST_MASKS, remedy))

    def __len__(self) -> int:
        """Number of masks."""
        return len(self.rectangles)

    def to(self, device: torch.device) -> "PixelMasks":
        """Move the masks to a device."""
        return PixelMasks(self.image_size, self.rectangles.to(device))

    @cached_property
    def completing(self) -> Bool[Tensor, "masks masks"]:
        """Which pairs of masks cover all pixels."""
        height, width = self.image_size
        areas = self.rectangles[..., 2:].prod(-1).sum(1)
        if 2 * int(areas.max()) < height * width:
            return torch.zeros(len(self), len(self), dtype=torch.bool, device=areas.device)
        left = ~covered(self.rectangles, self.image_size).flatten(1)
        return torch.stack([~(left & one).any(1) for one in left])

    @cached_property
    def whole(self) -> Bool[Tensor, " masks"]:
        """Which masks cover all pixels."""
        return self.completing.diagonal()

    @cached_property
    def completed(self) -> Bool[Tensor, " masks"]:
        """Which masks cover all pixels together with some other mask."""
        return self.completing.any(1)


class MaskedClassifier:
    """Evaluates a classifier on masked images in batches of bounded size.

    Args:
        fill: value of masked pixels in [0, 1], one value or one per channel.
        tolerance: in logits. A masked image agrees with a label only if the lead of that label is at least the
            tolerance, since the same image may be rounded differently in another batch.
    """

    def __init__(
        self, classifier: Undefended, fill: float | Sequence[float], batch_size: int, tolerance: float
    ) -> None:
        values = [float(value) for value in (fill if isinstance(fill, Sequence) else [fill] * 3)]
        if len(values) != 3 or not all(0 <= value <= 1 for value in values):
            raise UsageError(f"masked pixels are filled with one value or three, each in [0, 1]; got {fill}")
        if batch_size < 1:
            raise UsageError(f"the batch size must be at least 1, got {batch_size}")
        if not 0 <= tolerance < torch.inf:
            raise UsageError(f"the tolerance must be a finite number of logits, at least 0; got {tolerance}")
        self.classifier, self.batch_size, self.tolerance = classifier, batch_size, tolerance
        self.fill = torch.tensor(values)[:, None, None]

    def labels(
        self,
        images: Float[Tensor, "batch 3 height width"],
        masks: PixelMasks,
        image: Int[Tensor, " rows"],
        *chosen: Int[Tensor, " rows"],
    ) -> tuple[Int[Tensor, " rows"], Float[Tensor, " rows"]]:
        """Compute the labels of masked images and their leads over the runner-up.

        Ties go to the lowest index. Must be called inside `bagcert.scores.exact_arithmetic`.

        Args:
            chosen: one or more index tensors of masks; all masks of a row are applied together.
        """
        self.classifier.model.eval()
        fill = self.fill.to(images.device)
        labels, leads = [], []
        for some in torch.arange(len(image), device=images.device).split(self.batch_size):
            hidden = covered(torch.cat([masks.rectangles[one[some]] for one in chosen], 1), masks.image_size)
            logits = self.classifier.logits(torch.where(hidden[:, None], fill, images[image[some]])).float()
            best = logits.topk(2, 1).values
            labels.append(lowest_argmax(logits))
            leads.append((best[:, 0] - best[:, 1]).nan_to_num(nan=-torch.inf, posinf=torch.inf))
        return torch.cat(labels), torch.cat(leads)

    def agreement(
        self,
        images: Float[Tensor, "batch 3 height width"],
        masks: PixelMasks,
        label: Int[Tensor, " batch"],
        pairs: Int[Tensor, "2 pairs"],
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> tuple[Bool[Tensor, " batch"], Int[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Check whether all pairs of masks give the label; an image is finished at its first pair that does not.

        Args:
            pairs: indices of masks, in the order in which they are tried.
            on_progress: called with the number of finished pairs, summed over images.

        Returns:
            Whether all pairs agree; the index of the first pair that does not agree, or of the pair with the smallest
            lead; and the lead of that pair over the runner-up, -inf for a pair with another label.
        """
        count, every = pairs.shape[1], torch.arange(len(images), device=images.device)
        least = torch.full((len(images),), torch.inf, device=images.device)
        worst, agrees = torch.zeros_like(label), torch.ones_like(label, dtype=torch.bool)
        at = 0
        while at < count and bool(agrees.any()):
            open_ = every[agrees]
            one, two = pairs[:, at : at + max(1, self.batch_size // len(open_))]
            rows = (open_.repeat_interleave(len(one)), one.repeat(len(open_)), two.repeat(len(open_)))
            found, lead = (part.unflatten(0, (len(open_), -1)) for part in self.labels(images, masks, *rows))
            lead = lead.where(found == label[open_, None], -torch.inf)
            fails = ~(lead >= self.tolerance)
            agrees[open_] = ~fails.any(1)
            place = torch.where(fails.any(1), lowest_argmax(fails.long()), lowest_argmax(-lead))
            lead = lead.gather(1, place[:, None])[:, 0]
            lower = fails.any(1) | (lead < least[open_])
            least[open_[lower]], worst[open_[lower]] = lead[lower], at + place[lower]
            at += len(one)
            on_progress(int(agrees.sum()) * min(at, count) + int((~agrees).sum()) * count)
        return agrees, worst, least
