"""PatchCleanser: double masking of pixels, for any classifier.

Source: Xiang, Mahloujifar, Mittal, PatchCleanser, USENIX Security 2022; docs/method.md, "Double masking".

Guarantee: recovery. If the masked predictions under all pairs of masks agree on an image, no patch of the threat
changes the prediction, because the mask that covers the patch gives the clean label together with any second mask.

Differences from the publication: masks are tried in a fixed order; ties go to the lowest class; the certificate does
not use the true label; a pair of masks that covers all pixels never agrees; in the certificate a label whose lead is
within the rounding tolerance does not agree either; several shapes and several patches are supported.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bagcert.certificate import Certificate
from bagcert.data.photo import Images
from bagcert.defenses.base import Placements
from bagcert.defenses.pixel_defense import PixelDefense
from bagcert.defenses.pixel_masks import MaskedClassifier, PixelMasks
from bagcert.rules.masks import majority
from bagcert.scores import exact_arithmetic, lowest_argmax
from bagcert.threat import PatchLike, PatchThreatModel

RULE = "patchcleanser"
_TABLE_ELEMENTS = 2**23  # labels of mask pairs held at once in the second round


class PatchCleanser(PixelDefense):
    """Certified defense that applies double masking to the pixels of an image.

    Args:
        model, class_names, image_size, patch, name: as for `PixelDefense`. Train the network with cutout.
        masks_per_axis: k; there are k^2 masks for one shape. Fewer, larger masks need fewer passes and certify less.
        fill: value of masked pixels, one value or one per channel, typically the mean color of the data.
        batch_size: number of masked images per forward pass.
        tolerance: in logits. In the certificate a label with a smaller lead over the runner-up does not agree, since
            the same masked image may be rounded differently in another batch.

    Raises:
        UsageError: as for `PixelDefense`, or more than 3,000 masks.

    >>> model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    >>> defense = PatchCleanser(model, ("red", "green", "blue"), (8, 8), patch=2, masks_per_axis=3)
    >>> defense.certify(torch.tensor([0, 90, 0], dtype=torch.uint8).expand(1, 8, 8, 3)).certified.tolist()
    [True]
    """

    rule = RULE
    guarantee = "recovery"

    def __init__(
        self,
        model: nn.Module,
        class_names: Sequence[str],
        image_size: tuple[int, int],
        *,
        patch: PatchLike = 5,
        masks_per_axis: int = 6,
        name: str = "patchcleanser",
        fill: float | Sequence[float] = 0.5,
        batch_size: int = 256,
        tolerance: float = 1e-4,
    ) -> None:
        super().__init__(model, class_names, image_size, patch=patch, name=name)
        self.masks_per_axis = masks_per_axis
        self.masked = MaskedClassifier(self.classifier, fill, batch_size, tolerance)
        self.masks(self.deployed_threat())

    def masks(self, threat: PatchThreatModel) -> PixelMasks:
        """Build the masks for a threat. The limit is 3,000 masks, or unions of masks for several patches."""
        return PixelMasks.per_axis(threat, self.masks_per_axis)

    def forward_passes(self, threat: PatchThreatModel, certify: bool) -> int:
        """Maximum number of masked images per image.

        With M masks a certificate needs at most M (M + 1) / 2 passes, one per pair. A prediction needs M passes if all
        masks agree. Otherwise the second round evaluates each pair at most once, and no pair of two masks that both
        give the majority label.
        """
        count = len(self.masks(threat))
        pairs = count * (count + 1) // 2
        common = -(-count // len(self.class_names))
        return pairs if certify else pairs - common * (common - 1) // 2

    def predict(
        self, images: Images, patch: PatchLike | None = None, *, rule: str | None = None, placements: Placements = None
    ) -> Int[Tensor, " batch"]:
        """Predict by double masking.

        The prediction is the label on which all masks agree, otherwise the label of the first disagreeing mask that
        passes the second round, otherwise the majority label.
        """
        batch, threat = self.check_inputs(images, patch, rule, placements)
        masks = self.masks(threat).to(batch.device)
        with exact_arithmetic(batch.device):
            return torch.cat([self._predict(some, masks)[0] for some in batch.split(self.masked.batch_size)])

    def certify(
        self,
        images: Images,
        patch: PatchLike | None = None,
        *,
        rule: str | None = None,
        placements: Placements = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Certificate:
        """Compute prediction and certificate of each image; an image is finished at its first disagreeing pair.

        The margin is 0 if all pairs of masks agree (certified) and -1 otherwise. `worst_placement` contains two masks
        (not patches), [batch, 2, 4], or [batch, 2K, 4] for K patches: the first pair that disagrees (the same mask
        twice if a single mask disagrees) or, for certified images, the pair with the smallest lead. The masks cover all
        placements, also if `placements` restricts them. `on_progress` is called with (number of finished pairs of
        masks, total number of pairs) over all images.
        """
        batch, threat = self.check_inputs(images, patch, rule, placements)
        masks = self.masks(threat).to(batch.device)
        count, done = len(masks), 0
        total = len(batch) * count * (count + 1) // 2
        predictions, certified, worst = [], [], []
        with exact_arithmetic(batch.device):
            for some in batch.split(self.masked.batch_size):
                label, first, lead = self._predict(some, masks)

                def settled(pairs: int, before: int = done) -> None:
                    on_progress(before + pairs, total)

                agrees, pair = self._prove(some, masks, label, first, lead, settled)
                predictions.append(label)
                certified.append(agrees)
                worst.append(masks.rectangles[pair].flatten(1, 2))
                done += len(some) * count * (count + 1) // 2
                on_progress(done, total)
        holds = torch.cat(certified)
        return Certificate(torch.cat(predictions), holds, holds.long() - 1, torch.cat(worst), RULE, threat)

    def _predict(
        self, images: Float[Tensor, "batch 3 height width"], masks: PixelMasks
    ) -> tuple[Int[Tensor, " batch"], Int[Tensor, "batch masks"], Float[Tensor, "batch masks"]]:
        """Compute the predictions, and labels and leads of the first round; -1 for a mask that covers all pixels."""
        every = torch.arange(len(images), device=images.device).repeat_interleave(len(masks))
        each = torch.arange(len(masks), device=images.device).repeat(len(images))
        label, lead = (part.unflatten(0, (len(images), -1)) for part in self.masked.labels(images, masks, every, each))
        first = label.masked_fill(masks.whole, -1)
        plain = label[:, 0]
        if bool(masks.whole.all()):
            plain = lowest_argmax(self.classifier.logits(images))
        answer = majority(first, len(self.class_names), plain)
        disagrees = (first >= 0) & (first != answer[:, None]) & ~masks.completed
        for some in disagrees.any(1).nonzero()[:, 0].split(max(1, _TABLE_ELEMENTS // len(masks) ** 2)):
            answer[some] = self._second_round(images[some], masks, first[some], answer[some], disagrees[some])
        return answer, first, lead

    def _second_round(
        self,
        images: Float[Tensor, "rows 3 height width"],
        masks: PixelMasks,
        first: Int[Tensor, "rows masks"],
        answer: Int[Tensor, " rows"],
        disagrees: Bool[Tensor, "rows masks"],
    ) -> Int[Tensor, " rows"]:
        """The label of the first disagreeing mask whose pairs all agree with it, else the majority label `answer`."""
        count = len(masks)
        table = torch.full((len(images), count, count), -1, dtype=torch.int32, device=images.device)
        table.diagonal(dim1=1, dim2=2).copy_(first)
        while bool(disagrees.any()):
            (image,) = disagrees.any(1).nonzero(as_tuple=True)
            mask = lowest_argmax(disagrees[image].long())  # the first remaining disagreeing mask
            label, known = first[image, mask], table[image, mask]
            fails = ((known >= 0) & (known != label[:, None])).any(1)
            passes = (known == label[:, None]).all(1)
            disagrees[image[fails], mask[fails]] = False
            disagrees[image[passes]] = False
            answer[image[passes]] = label[passes]
            going = ~(fails | passes)
            image, mask, missing = image[going], mask[going], known[going] < 0
            turn = missing & (missing.cumsum(1) <= max(1, self.masked.batch_size // max(1, len(image))))
            row, other = turn.nonzero(as_tuple=True)
            if len(row):
                found, _ = self.masked.labels(images, masks, image[row], mask[row], other)
                table[image[row], mask[row], other] = found.int()
                table[image[row], other, mask[row]] = found.int()
        return answer

    def _prove(
        self,
        images: Float[Tensor, "batch 3 height width"],
        masks: PixelMasks,
        label: Int[Tensor, " batch"],
        first: Int[Tensor, "batch masks"],
        lead: Float[Tensor, "batch masks"],
        on_progress: Callable[[int], None],
    ) -> tuple[Bool[Tensor, " batch"], Int[Tensor, "batch 2"]]:
        """Determine which images keep their label under every pair of masks, and the worst pair of each image."""
        lead = lead.where(first == label[:, None], -torch.inf)
        fails = ~(lead >= self.masked.tolerance)
        holds = ~fails.any(1)
        worst = torch.where(holds, lowest_argmax(-lead), lowest_argmax(fails.long()))[:, None].repeat(1, 2)
        if bool(masks.completed.any()):
            # A pair that covers all pixels never agrees, so no image is certified.
            whole = masks.completing.nonzero()[0].expand(int(holds.sum()), -1)
            worst[holds] = whole
            return torch.zeros_like(holds), worst
        (open_,) = holds.nonzero(as_tuple=True)
        pairs = torch.triu_indices(len(masks), len(masks), 1, device=images.device)
        before = len(images) * len(masks) + (len(images) - len(open_)) * pairs.shape[1]
        agrees, at, least = self.masked.agreement(
            images[open_], masks, label[open_], pairs, lambda settled: on_progress(before + settled)
        )
        holds[open_] = agrees
        lower = ~agrees | (least < lead[open_].amin(1))
        worst[open_[lower]] = pairs.T[at[lower]]
        return holds, worst
