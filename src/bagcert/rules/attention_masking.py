"""Double masking and detection for attention pooling: the same definitions, with a readout for every kept set.

The proof of double masking holds for any function of the kept regions, so nothing but the labels changes. Labels of one
mask cost a readout per mask. The certificate needs a readout per pair of masks, but only for images on which all
labels of one mask agree: each mask is also a pair with itself.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.aggregation import AttentionPooling
from bagcert.certificate import Certificate
from bagcert.errors import UsageError
from bagcert.rules.union_masking import Unions
from bagcert.rules.windows import Windows, completed, majority
from bagcert.scores import ScoreMap, exact_arithmetic, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel

MOST_PAIRS = 10_000_000
NO_LABEL = 2.0**24
"""A lead above that of any row."""
ROWS_AT_ONCE = 4096
"""Readouts in one product: their pooled values stay in the cache of a processor core."""


@dataclass(frozen=True, eq=False)
class Masks:
    """What the attacked patches may hide: all windows, or for K patches all unions of K windows.

    Attributes:
        masks: boolean [masks, regions].
        placements: [masks, K, 4], a placement in pixels for each of the windows of a mask.
    """

    masks: Bool[Tensor, "masks regions"]
    placements: Int[Tensor, "masks patches 4"]

    @classmethod
    def of(cls, score_map: ScoreMap, threat: PatchThreatModel) -> "Masks":
        """The masks of a threat on the grid of a map.

        Raises:
            UsageError: several patches lead to more masks or pairs of masks than can be enumerated.
        """
        if threat.patches > 1:
            unions = Unions.of(score_map, threat)
            if len(unions) ** 2 > 2 * MOST_PAIRS:
                raise UsageError(
                    f"double masking against {threat} needs {len(unions) ** 2 // 2:,} readouts per image, more than "
                    f"{MOST_PAIRS:,}; use fewer patches"
                )
            return cls(unions.masks, unions.windows.placements[unions.members])
        windows = Windows.of(score_map, threat)
        return cls(windows.masks.flatten(1)[windows.keep], windows.placements[windows.keep][:, None])

    def __len__(self) -> int:
        return len(self.masks)

    @cached_property
    def whole(self) -> Bool[Tensor, " masks"]:
        """Masks that leave no region."""
        return self.masks.all(1)

    @cached_property
    def completed(self) -> Bool[Tensor, " masks"]:
        """Masks which, together with some mask, leave no region."""
        return completed(self.masks, torch.ones_like(self.whole))

    @cached_property
    def pairs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Pairs (i, j) with i < j, the distinct intersections [k, regions] of masks, and that of each pair."""
        i, j = torch.triu_indices(len(self), len(self), 1, device=self.masks.device)
        shared: list[Tensor] = []
        number: list[Tensor] = []
        for part in torch.arange(len(i), device=i.device).split(1 << 20):
            distinct, index = torch.unique(self.masks[i[part]] & self.masks[j[part]], dim=0, return_inverse=True)
            number.append(index + sum(len(found) for found in shared))
            shared.append(distinct)
        return i, j, torch.cat(shared), torch.cat(number)

    def without(
        self, evidence: Float[Tensor, "*batch channels regions"], masks: Tensor
    ) -> Float[Tensor, "*batch masks channels"]:
        """Sums over all regions but those of each mask."""
        return (evidence @ (~masks).T.to(evidence.dtype)).transpose(-1, -2)

    def pair_sums(self, evidence: Float[Tensor, "channels regions"]) -> Iterator[tuple[slice, Tensor]]:
        """Sums over all regions but those of two masks [pairs, channels], some pairs at a time."""
        i, j, shared, number = self.pairs
        total = evidence.sum(1)
        single = total - self.masks.to(evidence.dtype) @ evidence.T
        twice = shared.to(evidence.dtype) @ evidence.T - total
        for start in range(0, len(i), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            sums = single.index_select(0, i[part]).add_(single.index_select(0, j[part]))
            yield part, sums.add_(twice.index_select(0, number[part]))


def attention_double_masking(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """`double_masking` for a map with a readout.

    margin = min over mask pairs and c != y of z_y - z_c - 1[c < y], in units of the readout; -1 at most where some pair
    leaves no region. It is exact where the image is certified. Where it is not, it is the smallest found: over all
    single masks, and over all pairs if every single mask gives y.
    """
    readout, masks = _parts(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction = torch.empty_like(margin)
    pair = torch.empty(batch, 2, dtype=torch.int64, device=device)
    with exact_arithmetic(device):
        for image in range(batch):
            evidence = score_map.evidence(image)
            sums = masks.without(evidence, masks.masks)
            scores = readout.scores(sums)
            label = _prediction(masks, readout, evidence, scores)
            lead, worst = _lead(scores, label, sums).min(0)
            first = second = int(worst)
            if lead >= 0 and len(masks) > 1:
                i, j, _, _ = masks.pairs
                for part, sums in masks.pair_sums(evidence):
                    least, worst = _lead(readout.scores(sums), label, sums).min(0)
                    if least < lead:
                        lead, first, second = least, int(i[part][worst]), int(j[part][worst])
            margin[image], prediction[image] = lead.long(), label
            pair[image, 0], pair[image, 1] = first, second
    if bool(masks.completed.any()):
        margin.clamp_(max=-1)
    placement = masks.placements[pair].flatten(1, 2)
    return Certificate(prediction, margin >= 0, margin, placement, "double-masking", threat)


def attention_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Int[Tensor, " batch"]:
    """`double_masking_prediction` for a map with a readout."""
    readout, masks = _parts(score_map, threat)
    prediction = torch.empty(len(score_map), dtype=torch.int64, device=score_map.scores.device)
    with exact_arithmetic(prediction.device):
        for image in range(len(score_map)):
            evidence = score_map.evidence(image)
            scores = readout.scores(masks.without(evidence, masks.masks))
            prediction[image] = _prediction(masks, readout, evidence, scores)
    return prediction


def attention_detection(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """`detection` for a map with a readout: margin = min over masks and c != y of z_y - z_c - 1[c < y]."""
    readout, masks = _parts(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction, worst = score_map.predict(), torch.empty_like(margin)
    with exact_arithmetic(device):
        for image in range(batch):
            sums = masks.without(score_map.evidence(image), masks.masks)
            lead, worst[image] = _lead(readout.scores(sums), prediction[image], sums).min(0)
            margin[image] = lead.long()
    if bool(masks.whole.any()):
        margin.clamp_(max=-1)
    placement = masks.placements[worst].squeeze(1)
    return Certificate(prediction, margin >= 0, margin, placement, "detection", threat)


def _parts(score_map: ScoreMap, threat: PatchThreatModel) -> tuple[AttentionPooling, Masks]:
    assert score_map.readout is not None
    return score_map.readout, Masks.of(score_map, threat)


def _lead(
    scores: Float[Tensor, "rows classes"], label: Tensor, sums: Float[Tensor, "rows channels"]
) -> Float[Tensor, " rows"]:
    """For each row by how much `label` leads its best rival, less the tie penalty: >= 0 iff the row's label is `label`.

    Rows in which nothing is kept have no label; callers count them apart.
    """
    label = label.reshape(1)
    lead = scores[:, label] - scores - tie_penalty(label, scores.shape[1])
    lead[:, label] = torch.inf
    return lead.amin(1).masked_fill(sums[:, -1] == 0, NO_LABEL)


def _prediction(
    masks: Masks,
    readout: AttentionPooling,
    evidence: Float[Tensor, "channels regions"],
    scores: Float[Tensor, "masks classes"],
) -> Int[Tensor, ""]:
    """The double-masking prediction of one image from its scores under every single mask."""
    first = lowest_argmax(scores).masked_fill(masks.whole, -1)
    plain = lowest_argmax(readout.scores(evidence.sum(1)[None]))
    answer = majority(first[None], readout.classes, plain)[0]
    # A mask whose pairs include one without a label cannot pass.
    for mask in ((first >= 0) & (first != answer) & ~masks.completed).nonzero()[:, 0].tolist():
        sums = masks.without(evidence * ~masks.masks[mask], masks.masks)
        if bool((lowest_argmax(readout.scores(sums)) == first[mask]).all()):
            return first[mask]
    return answer
