"""Double masking against K patches, where the masks are all unions of K windows."""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.errors import UsageError
from bagcert.rules.masks import CHUNK_ELEMENTS, Best, Windows, chunks, completed, majority
from bagcert.scores import ScoreMap, exact_arithmetic, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel

MOST_UNIONS = 20_000
_PARTNERS = 16  # number of second masks tried before the full second round


@dataclass(frozen=True, eq=False)
class Unions:
    """All unions of K windows, with repetition, in lexicographic order of their window indices.

    Attributes:
        windows: the windows of the threat.
        members: window indices [unions, K].
    """

    windows: Windows
    members: Int[Tensor, "unions patches"]

    @classmethod
    def of(cls, score_map: ScoreMap, threat: PatchThreatModel) -> "Unions":
        """Compute the unions of a threat of K patches on the grid of a score map.

        Raises:
            UsageError: more than 20,000 unions.
        """
        windows = Windows.of(score_map, threat)
        kept = windows.keep.nonzero()[:, 0].tolist()
        count = comb(len(kept) + threat.patches - 1, threat.patches)
        if count > MOST_UNIONS:
            raise UsageError(
                f"masking against {threat} needs {count:,} unions of {threat.patches} of {len(kept)} windows, more "
                f"than {MOST_UNIONS:,}; use the vote rule, which certifies against several patches at no cost"
            )
        members = torch.tensor(list(combinations_with_replacement(kept, threat.patches)), device=windows.device)
        return cls(windows, members)

    def __len__(self) -> int:
        return len(self.members)

    @cached_property
    def masks(self) -> Bool[Tensor, "unions regions"]:
        """Which regions belong to each union."""
        return self.windows.masks.flatten(1)[self.members].any(1)

    @cached_property
    def outside(self) -> Bool[Tensor, "unions regions"]:
        """Which regions lie outside each union."""
        return ~self.masks

    @cached_property
    def completed(self) -> Bool[Tensor, " unions"]:
        """Which unions cover all regions together with some other union."""
        return completed(self.masks, torch.ones_like(self.masks[:, 0]))

    def sums(self, maps: Float[Tensor, "*batch regions"]) -> Float[Tensor, "*batch unions"]:
        """Sum flattened maps over every union."""
        part = max(1, 4 * CHUNK_ELEMENTS // maps.shape[-1])
        return torch.cat([maps @ masks.to(maps.dtype).T for masks in self.masks.split(part)], -1)


def union_double_masking(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """Certify the double-masking prediction against K patches; `worst_placement` is [batch, 2K, 4].

    See `double_masking`.
    """
    unions = Unions.of(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction = torch.empty_like(margin)
    pair = torch.empty(batch, 2 * threat.patches, dtype=torch.int64, device=device)
    with exact_arithmetic(device):
        for images in chunks(batch, score_map.classes * len(unions)):
            levels = score_map.levels(images).flatten(2)
            sums = unions.sums(levels)
            label = _prediction(unions, levels, sums)
            margin[images], pair[images] = _worst_pairs(unions, levels, sums, label)
            prediction[images] = label
    if bool(unions.completed.any()):
        margin.clamp_(max=-1)
    placement = unions.windows.placements[pair]
    return Certificate(prediction, margin >= 0, margin, placement, "double-masking", threat)


def union_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Int[Tensor, " batch"]:
    """Compute the double-masking prediction for K patches; see `double_masking_prediction`."""
    unions = Unions.of(score_map, threat)
    prediction = torch.empty(len(score_map), dtype=torch.int64, device=score_map.scores.device)
    with exact_arithmetic(prediction.device):
        for images in chunks(len(score_map), score_map.classes * len(unions)):
            levels = score_map.levels(images).flatten(2)
            prediction[images] = _prediction(unions, levels, unions.sums(levels))
    return prediction


def _prediction(
    unions: Unions, levels: Float[Tensor, "batch classes regions"], sums: Float[Tensor, "batch classes unions"]
) -> Int[Tensor, " batch"]:
    total = levels.sum(2)
    first = lowest_argmax(total[..., None] - sums).masked_fill(unions.masks.all(1), -1)
    answer = majority(first, levels.shape[1], lowest_argmax(total))
    disagrees = (first >= 0) & (first != answer[:, None]) & ~unions.completed
    for image in disagrees.any(1).nonzero()[:, 0].tolist():
        scores, common = levels[image], int(answer[image])
        survives = disagrees[image].clone()
        for label in first[image][survives].unique().tolist():
            # For most masks the majority label wins as soon as one strong second mask is removed as well.
            lead = scores[label] - scores[common]
            partners = unions.outside[unions.sums(lead).topk(min(_PARTNERS, len(unions))).indices]
            (rows,) = (survives & (first[image] == label)).nonzero(as_tuple=True)
            left = unions.outside[rows].to(lead.dtype) @ (lead * partners).T
            survives[rows] = (left >= int(common < label)).all(1)
        while bool(survives.any()):
            row = int(survives.float().argmax())  # the first
            label = int(first[image, row])
            lead = scores[label] - scores
            penalty = tie_penalty(first[image, row : row + 1], len(scores))[0]
            left = (lead * unions.outside[row]).sum(1) - penalty
            worst, partner = unions.sums(lead * unions.outside[row]).max(1)
            rival = int((left - worst).argmin())
            if (left - worst)[rival] >= 0:
                answer[image] = label
                break
            # A second mask that rules out this mask rules out most other masks with the same label.
            survives[row] = False
            (rows,) = (survives & (first[image] == label)).nonzero(as_tuple=True)
            left = unions.outside[rows].to(lead.dtype) @ (lead[rival] * unions.outside[partner[rival]])
            survives[rows] = left >= penalty[rival]
    return answer


def _worst_pairs(
    unions: Unions,
    levels: Float[Tensor, "batch classes regions"],
    sums: Float[Tensor, "batch classes unions"],
    label: Int[Tensor, " batch"],
) -> tuple[Int[Tensor, " batch"], Int[Tensor, "batch windows"]]:
    """Find the exact margin over all classes and pairs of unions by branch and bound, and 2K windows attaining it."""
    every = torch.arange(len(levels), device=levels.device)
    lead = levels[every, label][:, None] - levels
    base = lead.sum(2) - tie_penalty(label, levels.shape[1])
    base[every, label] = torch.inf
    removed = sums[every, label][:, None] - sums
    single, at = removed.max(2)
    # 2K windows reduce the lead by at most the 2K largest window sums of its positive part.
    patches = unions.members.shape[1]
    kept = unions.windows.keep.nonzero()[:, 0]
    masks = unions.windows.masks[kept].flatten(1)
    positive = lead.clamp(min=0) @ masks.T.to(levels.dtype)
    floor = base - _top(positive, 2 * patches)

    left, rival = (base - single).min(1)
    best = Best(left, unions.members[at[every, rival]].repeat(1, 2))
    for image, rival in (floor < best.margin[:, None]).nonzero().tolist():
        if floor[image, rival] >= best.margin[image]:
            continue
        own, first = lead[image, rival], at[image, rival]
        more, second = unions.sums(own * unions.outside[first]).max(0)
        left = base[image, rival] - single[image, rival] - more
        best.improve(*_one(image, left, torch.cat([unions.members[first], unions.members[second]])))
        # Strongest windows first: the windows that can still follow are then weak, which makes the bounds tight.
        order = positive[image, rival].sort(descending=True, stable=True).indices
        search = _Search(own, masks[order].to(own.dtype), kept[order], base[image, rival], image, best)
        nothing = torch.zeros(1, 0, dtype=torch.int64, device=levels.device)
        search.extend(torch.ones_like(own)[None], own.new_zeros(1), nothing, 2 * patches)
    return best.margin.long(), best.pair


@dataclass(frozen=True, eq=False)
class _Search:
    """Branch and bound for the 2K windows that reduce one lead the most; any K of them form one mask.

    Attributes:
        lead: score difference between the label and another class in each region.
        masks: the windows as 0 and 1, strongest first.
        ids: their window indices.
        base: sum of the lead minus the tie penalty.
        image: index of the image whose best margin is improved.
        best: the best margins found so far.
    """

    lead: Float[Tensor, " regions"]
    masks: Float[Tensor, "windows regions"]
    ids: Int[Tensor, " windows"]
    base: Float[Tensor, ""]
    image: int
    best: Best

    def extend(
        self,
        outside: Float[Tensor, "nodes regions"],
        taken: Float[Tensor, " nodes"],
        chosen: Int[Tensor, "nodes depth"],
        remaining: int,
    ) -> None:
        """Extend each node by `remaining` more windows in every way that could improve the best margin.

        Windows are added in ascending order, so each set of windows is visited once.
        """
        left = self.lead * outside
        gain = left @ self.masks.T
        if chosen.shape[1]:
            place = torch.arange(len(self.masks), device=gain.device)
            gain.masked_fill_(place < chosen[:, -1:], -torch.inf)
        if remaining == 1:
            most, last = gain.max(1)
            node = (taken + most).argmax()
            found = self.ids[torch.cat([chosen[node], last[node : node + 1]])]
            self.best.improve(*_one(self.image, self.base - taken[node] - most[node], found))
            return
        # A later window reduces the remaining lead by at most the sum of its positive part.
        ceiling = (left.clamp(min=0) @ self.masks.T).flip(1).cummax(1).values.flip(1)
        total = taken[:, None] + gain
        bound = total + (remaining - 1) * ceiling
        node, window = (self.base - bound < self.best.margin[self.image]).nonzero(as_tuple=True)
        order = bound[node, window].sort(descending=True, stable=True).indices
        for some in order.split(max(1, CHUNK_ELEMENTS // (4 * self.masks.shape[1]))):
            n, w = node[some], window[some]
            open_ = self.base - bound[n, w] < self.best.margin[self.image]
            n, w = n[open_], w[open_]
            if len(n):
                further = torch.cat([chosen[n], w[:, None]], 1)
                self.extend(outside[n] * (1 - self.masks[w]), total[n, w], further, remaining - 1)


def _one(image: int, margin: Tensor, windows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Convert one candidate to the arguments of `Best.improve`."""
    return torch.full_like(windows[:1], image), margin[None], windows[None]


def _top(values: Float[Tensor, "*batch windows"], count: int) -> Float[Tensor, "*batch"]:
    """Sum of the `count` largest values; all values must be non-negative.

    Above 2^24 the float32 sum may be rounded. This changes no comparison because margins are far below that value.
    """
    return values.topk(min(count, values.shape[-1]), dim=-1).values.sum(-1)
