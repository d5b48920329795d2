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
from bagcert.rules.masks import Windows, completed, majority
from bagcert.rules.union_masking import Unions
from bagcert.scores import ScoreMap, exact_arithmetic, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel

MOST_PAIRS = 10_000_000
NO_LABEL = 2.0**24
"""A lead above that of any row."""
ROWS_AT_ONCE = 1664
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
    def blocks(self) -> list["_Block"]:
        """All pairs of masks, each mask with itself included, in blocks of at most ROWS_AT_ONCE pairs."""
        return [_Block.of(self.masks, *pairs) for pairs in _pairs(len(self), self.masks.device)]

    def at_once(self, count: int) -> Iterator[slice]:
        """Slices of `count` items with a row for every mask each, so that products have ROWS_AT_ONCE rows at most."""
        step = max(1, ROWS_AT_ONCE // len(self))
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def without(
        self, evidence: Float[Tensor, "*batch channels regions"], masks: Tensor
    ) -> Float[Tensor, "*batch masks channels"]:
        """Sums over all regions but those of each mask."""
        return (~masks).to(evidence.dtype) @ evidence.mT

    def pair_sums(
        self, evidence: Float[Tensor, "channels regions"], single: Float[Tensor, "masks channels"]
    ) -> Iterator[tuple["_Block", Float[Tensor, "pairs channels"]]]:
        """Sums over all regions but those of two masks, a block at a time.

        Args:
            single: `without` of every mask.
        """
        # total - W(m) - W(m') + O(m, m') = single(m) + single(m') - total + O(m, m')
        less = single - evidence.sum(1)
        for block in self.blocks:
            sums = less.index_select(0, block.first).add_(single.index_select(0, block.second))
            both = block.shared.to(evidence.dtype) @ evidence.T
            sums[: len(block.number)] += both.index_select(0, block.number)
            yield block, sums


@dataclass(frozen=True, eq=False)
class _Block:
    """Some pairs of masks; those that share regions come first.

    Attributes:
        first, second: the masks of each pair.
        shared: boolean [sets, regions], the distinct sets of shared regions.
        number: which of them each pair shares, for the pairs that share any.
    """

    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]
    shared: Bool[Tensor, "sets regions"]
    number: Int[Tensor, " overlapping"]

    @classmethod
    def of(cls, masks: Bool[Tensor, "masks regions"], first: Tensor, second: Tensor) -> "_Block":
        """The block of these pairs."""
        both = masks[first] & masks[second]
        overlapping = both.any(1)
        order = torch.cat([overlapping.nonzero()[:, 0], (~overlapping).nonzero()[:, 0]])
        shared, number = torch.unique(both[overlapping], dim=0, return_inverse=True)
        return cls(first[order], second[order], shared, number)


def _pairs(count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """All pairs (i, j) with i <= j < count in lexicographic order, at most ROWS_AT_ONCE at a time."""
    ends = torch.arange(count, 0, -1, device=device).cumsum(0)  # how many pairs have a first mask of at most i
    for start in range(0, count * (count + 1) // 2, ROWS_AT_ONCE):
        rank = torch.arange(start, min(start + ROWS_AT_ONCE, count * (count + 1) // 2), device=device)
        first = torch.searchsorted(ends, rank, right=True)
        yield first, count - (ends[first] - rank)


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
        for some in masks.at_once(batch):
            evidence = score_map.evidence(some)
            sums = masks.without(evidence, masks.masks)
            scores = readout.scores(sums)
            prediction[some] = _predictions(masks, readout, evidence, scores)
            leads, worst = _lead(scores, prediction[some], sums).min(1)
            margin[some], pair[some] = leads.long(), worst[:, None]
            if len(masks) == 1:
                continue
            for k in (leads >= 0).nonzero()[:, 0].tolist():
                image, lead = some.start + k, leads[k]
                for block, rows in masks.pair_sums(evidence[k], sums[k]):
                    least, at = _lead(readout.scores(rows)[None], prediction[image, None], rows[None])[0].min(0)
                    if least < lead:
                        lead = least
                        pair[image, 0], pair[image, 1] = block.first[at], block.second[at]
                margin[image] = lead.long()
    if bool(masks.completed.any()):
        margin.clamp_(max=-1)
    placement = masks.placements[pair].flatten(1, 2)
    return Certificate(prediction, margin >= 0, margin, placement, "double-masking", threat)


def attention_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Int[Tensor, " batch"]:
    """`double_masking_prediction` for a map with a readout."""
    readout, masks = _parts(score_map, threat)
    prediction = torch.empty(len(score_map), dtype=torch.int64, device=score_map.scores.device)
    with exact_arithmetic(prediction.device):
        for some in masks.at_once(len(score_map)):
            evidence = score_map.evidence(some)
            scores = readout.scores(masks.without(evidence, masks.masks))
            prediction[some] = _predictions(masks, readout, evidence, scores)
    return prediction


def attention_detection(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """`detection` for a map with a readout: margin = min over masks and c != y of z_y - z_c - 1[c < y]."""
    readout, masks = _parts(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction, worst = score_map.predict(), torch.empty_like(margin)
    with exact_arithmetic(device):
        for some in masks.at_once(batch):
            sums = masks.without(score_map.evidence(some), masks.masks)
            lead, worst[some] = _lead(readout.scores(sums), prediction[some], sums).min(1)
            margin[some] = lead.long()
    if bool(masks.whole.any()):
        margin.clamp_(max=-1)
    return Certificate(prediction, margin >= 0, margin, masks.placements[worst], "detection", threat)


def _parts(score_map: ScoreMap, threat: PatchThreatModel) -> tuple[AttentionPooling, Masks]:
    assert score_map.readout is not None
    return score_map.readout, Masks.of(score_map, threat)


def _lead(
    scores: Float[Tensor, "batch rows classes"],
    label: Int[Tensor, " batch"],
    sums: Float[Tensor, "batch rows channels"],
) -> Float[Tensor, "batch rows"]:
    """For each row by how much `label` leads its best rival, less the tie penalty: >= 0 iff the row's label is `label`.

    Rows in which nothing is kept have no label; callers count them apart.
    """
    own = label[:, None, None].expand(-1, scores.shape[1], 1)
    lead = scores.gather(2, own) - scores - tie_penalty(label, scores.shape[2])[:, None]
    return lead.scatter_(2, own, torch.inf).amin(2).masked_fill(sums[..., -1] == 0, NO_LABEL)


def _predictions(
    masks: Masks,
    readout: AttentionPooling,
    evidence: Float[Tensor, "batch channels regions"],
    scores: Float[Tensor, "batch masks classes"],
) -> Int[Tensor, " batch"]:
    """The double-masking prediction of each image from its scores under every single mask."""
    first = lowest_argmax(scores.mT).masked_fill(masks.whole, -1)
    plain = lowest_argmax(readout.scores(evidence.sum(2)))
    answer = majority(first, readout.classes, plain)
    # A mask whose pairs include one without a label cannot pass.
    doubtful = (first >= 0) & (first != answer[:, None]) & ~masks.completed
    open_ = torch.ones(len(answer), dtype=torch.bool, device=answer.device)
    images, tried = doubtful.nonzero(as_tuple=True)  # in the order of the images, then in that of the masks
    for some in masks.at_once(len(images)):
        image, mask = images[some], tried[some]
        image, mask = image[open_[image]], mask[open_[image]]
        sums = masks.without(evidence[image] * ~masks.masks[mask][:, None], masks.masks)
        passed = (lowest_argmax(readout.scores(sums).mT) == first[image, mask][:, None]).all(1)
        for k in passed.nonzero()[:, 0].tolist():  # the first that passes decides
            if open_[image[k]]:
                answer[image[k]], open_[image[k]] = first[image[k], mask[k]], False
    return answer
