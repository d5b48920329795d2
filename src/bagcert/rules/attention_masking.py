"""Double masking and detection for attention pooling.

The definitions are the same as for sums of scores. The proof of double masking holds for any function of the kept
regions, so only the computation of the labels changes. One-mask labels cost one readout per mask. The certificate needs
one readout per pair of masks, but only for images on which all one-mask labels agree, because each mask also forms a
pair with itself.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.aggregation import AttentionPooling, pooling_dtype
from bagcert.certificate import Certificate
from bagcert.errors import UsageError
from bagcert.rules.masks import Windows, completed, majority
from bagcert.rules.union_masking import Unions
from bagcert.scores import ScoreMap, exact_arithmetic, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel

MOST_PAIRS = 10_000_000
NO_LABEL = 2.0**24
"""Stands for the lead of a row without a label; larger than every real lead."""
ROWS_AT_ONCE = 1664
"""Number of readouts per matrix product. At this size their pooled values fit into the cache of a CPU core."""


@dataclass(frozen=True, eq=False)
class Masks:
    """Masks for one threat: all windows, or for K patches all unions of K windows.

    Attributes:
        masks: boolean [masks, regions], True for the masked regions.
        placements: int64 [masks, K, 4], one placement `[top, left, height, width]` in pixels per window of a mask.
    """

    masks: Bool[Tensor, "masks regions"]
    placements: Int[Tensor, "masks patches 4"]

    @classmethod
    def of(cls, score_map: ScoreMap, threat: PatchThreatModel) -> "Masks":
        """Compute the masks of a threat on the grid of a score map.

        Raises:
            UsageError: for several patches, the number of masks or of pairs of masks exceeds the limit.
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
        """Which masks cover all regions."""
        return self.masks.all(1)

    @cached_property
    def completed(self) -> Bool[Tensor, " masks"]:
        """Which masks cover all regions together with some other mask."""
        return completed(self.masks, torch.ones_like(self.whole))

    @cached_property
    def blocks(self) -> list["_Block"]:
        """All pairs of masks, including each mask with itself, in blocks of at most ROWS_AT_ONCE pairs."""
        dtype = pooling_dtype(self.masks.shape[1])
        return [_Block.of(self.masks, dtype, *pairs) for pairs in _pairs(len(self), self.masks.device)]

    def in_threads(self, work: Callable[[slice], None], count: int) -> None:
        """Call `work` on the slices of `at_once(count)`, inside `exact_arithmetic`.

        On a CPU the slices are shared among `torch.get_num_threads()` threads. Operations on ROWS_AT_ONCE rows are too
        small to be divided among threads themselves.
        """
        device = self.masks.device

        def exact(images: slice) -> None:
            with exact_arithmetic(device):  # gradients and autocast are switched off per thread
                work(images)

        slices = list(self.at_once(count))
        threads = torch.get_num_threads() if device.type == "cpu" and len(slices) > 1 else 1
        if threads == 1:
            for images in slices:
                exact(images)
            return
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(exact, slices))
        torch.set_num_threads(threads)  # the number set last is the default of new threads

    def at_once(self, count: int) -> Iterator[slice]:
        """Split `count` items into slices such that one row per item and mask gives at most ROWS_AT_ONCE rows."""
        step = max(1, ROWS_AT_ONCE // len(self))
        for start in range(0, count, step):
            yield slice(start, min(start + step, count))

    def without(
        self, evidence: Float[Tensor, "*batch channels regions"], masks: Tensor
    ) -> Float[Tensor, "*batch masks channels"]:
        """Sum the evidence over the regions outside each mask."""
        return (~masks).to(evidence.dtype) @ evidence.mT

    def pair_sums(
        self, evidence: Float[Tensor, "channels regions"], single: Float[Tensor, "masks channels"]
    ) -> Iterator[tuple["_Block", Float[Tensor, "pairs channels"]]]:
        """Sum the evidence over the regions outside each pair of masks, one block at a time.

        Args:
            evidence: evidence of one image.
            single: the result of `without` for every mask.
        """
        # total - W(m) - W(m') + O(m, m') = single(m) + single(m') - total + O(m, m')
        less = single - evidence.sum(1)
        for block in self.blocks:
            sums = less.index_select(0, block.first).add_(single.index_select(0, block.second))
            both = block.shared @ evidence.T
            sums[: len(block.number)] += both.index_select(0, block.number)
            yield block, sums


@dataclass(frozen=True, eq=False)
class _Block:
    """A block of pairs of masks; pairs whose masks overlap come first.

    Attributes:
        first, second: indices of the two masks of each pair.
        shared: the distinct intersections of two masks, 1 in their regions and 0 elsewhere.
        number: index into `shared` for each overlapping pair.
    """

    first: Int[Tensor, " pairs"]
    second: Int[Tensor, " pairs"]
    shared: Float[Tensor, "sets regions"]
    number: Int[Tensor, " overlapping"]

    @classmethod
    def of(cls, masks: Bool[Tensor, "masks regions"], dtype: torch.dtype, first: Tensor, second: Tensor) -> "_Block":
        """Build the block of the given pairs, for evidence of a dtype."""
        both = masks[first] & masks[second]
        overlapping = both.any(1)
        order = torch.cat([overlapping.nonzero()[:, 0], (~overlapping).nonzero()[:, 0]])
        shared, number = torch.unique(both[overlapping], dim=0, return_inverse=True)
        return cls(first[order], second[order], shared.to(dtype), number)


def _pairs(count: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all pairs (i, j) with i <= j < count in lexicographic order, at most ROWS_AT_ONCE at a time."""
    ends = torch.arange(count, 0, -1, device=device).cumsum(0)  # number of pairs whose first mask is at most i
    for start in range(0, count * (count + 1) // 2, ROWS_AT_ONCE):
        rank = torch.arange(start, min(start + ROWS_AT_ONCE, count * (count + 1) // 2), device=device)
        first = torch.searchsorted(ends, rank, right=True)
        yield first, count - (ends[first] - rank)


def attention_double_masking(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """Certify the double-masking prediction of a map with a readout; see `double_masking`.

    margin = min over mask pairs and c != y of z_y - z_c - 1[c < y], in units of the readout; at most -1 if some pair
    covers all regions. The margin of a certified image is exact. For other images it is the minimum over all single
    masks, or over all pairs if every single mask gives y.
    """
    readout, masks = _parts(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction = torch.empty_like(margin)
    pair = torch.empty(batch, 2, dtype=torch.int64, device=device)

    def certify(images: slice) -> None:
        evidence = score_map.evidence(images)
        sums = masks.without(evidence, masks.masks)
        scores = readout.scores(sums)
        prediction[images] = _predictions(masks, readout, evidence, scores)
        leads, worst = _lead(scores, prediction[images], sums).min(1)
        margin[images], pair[images] = leads.long(), worst[:, None]
        if len(masks) == 1:
            return
        for k in (leads >= 0).nonzero()[:, 0].tolist():
            image, lead = images.start + k, leads[k]
            for block, rows in masks.pair_sums(evidence[k], sums[k]):
                least, at = _lead(readout.scores(rows)[None], prediction[image, None], rows[None])[0].min(0)
                if least < lead:
                    lead = least
                    pair[image, 0], pair[image, 1] = block.first[at], block.second[at]
            margin[image] = lead.long()

    masks.in_threads(certify, batch)
    if bool(masks.completed.any()):
        margin.clamp_(max=-1)
    placement = masks.placements[pair].flatten(1, 2)
    return Certificate(prediction, margin >= 0, margin, placement, "double-masking", threat)


def attention_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Int[Tensor, " batch"]:
    """Compute the double-masking prediction of a map with a readout; see `double_masking_prediction`."""
    readout, masks = _parts(score_map, threat)
    prediction = torch.empty(len(score_map), dtype=torch.int64, device=score_map.scores.device)

    def predict(images: slice) -> None:
        evidence = score_map.evidence(images)
        scores = readout.scores(masks.without(evidence, masks.masks))
        prediction[images] = _predictions(masks, readout, evidence, scores)

    masks.in_threads(predict, len(score_map))
    return prediction


def attention_detection(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """Certify the plain prediction of a map with a readout by detection; see `detection`.

    margin = min over masks and c != y of z_y - z_c - 1[c < y]; at most -1 if some mask covers all regions.
    """
    readout, masks = _parts(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction, worst = score_map.predict(), torch.empty_like(margin)

    def certify(images: slice) -> None:
        sums = masks.without(score_map.evidence(images), masks.masks)
        lead, worst[images] = _lead(readout.scores(sums), prediction[images], sums).min(1)
        margin[images] = lead.long()

    masks.in_threads(certify, batch)
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
    """Lead of `label` over the best other class in each row, minus the tie penalty.

    The result is >= 0 if and only if the label of the row is `label`. Rows without kept regions have no label and get
    `NO_LABEL`; callers handle them separately.
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
    """Compute the double-masking predictions from the scores under every single mask."""
    first = lowest_argmax(scores.mT).masked_fill(masks.whole, -1)
    plain = lowest_argmax(readout.scores(evidence.sum(2)))
    answer = majority(first, readout.classes, plain)
    # A mask cannot pass if one of its pairs covers all regions and so has no label.
    doubtful = (first >= 0) & (first != answer[:, None]) & ~masks.completed
    open_ = torch.ones(len(answer), dtype=torch.bool, device=answer.device)
    images, tried = doubtful.nonzero(as_tuple=True)  # sorted by image, then by mask
    for some in masks.at_once(len(images)):
        image, mask = images[some], tried[some]
        image, mask = image[open_[image]], mask[open_[image]]
        sums = masks.without(evidence[image] * ~masks.masks[mask][:, None], masks.masks)
        passed = (lowest_argmax(readout.scores(sums).mT) == first[image, mask][:, None]).all(1)
        for k in passed.nonzero()[:, 0].tolist():  # the first passing mask decides
            if open_[image[k]]:
                answer[image[k]], open_[image[k]] = first[image[k], mask[k]], False
    return answer
