"""Double masking against several patches: the masks are all unions of K windows, enumerated."""

from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement
from math import comb

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.errors import UsageError
from bagcert.rules.windows import CHUNK_ELEMENTS, Best, Windows, chunks, completed, majority
from bagcert.scores import ScoreMap, exact_arithmetic, lowest_argmax, tie_penalty
from bagcert.threat import PatchThreatModel

MOST_UNIONS = 20_000
_PARTNERS = 16  # second masks tried before the full second round


@dataclass(frozen=True, eq=False)
class Unions:
    """All unions of K windows, repetition included, in lexicographic order of their windows.

    Attributes:
        windows: what they are unions of.
        members: window indices [unions, K].

    Raises (`of`):
        UsageError: more than 20,000 unions.
    """

    windows: Windows
    members: Int[Tensor, "unions patches"]

    @classmethod
    def of(cls, score_map: ScoreMap, threat: PatchThreatModel) -> "Unions":
        """The unions a threat of K patches leads to on the grid of a score map."""
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
        """The unions as sets of regions."""
        return self.windows.masks.flatten(1)[self.members].any(1)

    @cached_property
    def outside(self) -> Bool[Tensor, "unions regions"]:
        """What each leaves over."""
        return ~self.masks

    @cached_property
    def completed(self) -> Bool[Tensor, " unions"]:
        """Unions which, together with some union, leave no region."""
        return completed(self.masks, torch.ones_like(self.masks[:, 0]))

    def sums(self, maps: Float[Tensor, "*batch regions"]) -> Float[Tensor, "*batch unions"]:
        """Sums over every union of flattened maps."""
        part = max(1, 4 * CHUNK_ELEMENTS // maps.shape[-1])
        return torch.cat([maps @ masks.to(maps.dtype).T for masks in self.masks.split(part)], -1)


def union_double_masking(score_map: ScoreMap, threat: PatchThreatModel) -> Certificate:
    """`double_masking` for K patches; `worst_placement` is [batch, 2K, 4]."""
    unions = Unions.of(score_map, threat)
    batch, device = len(score_map), score_map.scores.device
    margin = torch.empty(batch, dtype=torch.int64, device=device)
    prediction = torch.empty_like(margin)
    pair = torch.empty(batch, 2, dtype=torch.int64, device=device)
    with exact_arithmetic(device):
        for images in chunks(batch, score_map.classes * len(unions)):
            levels = score_map.levels(images).flatten(2)
            sums = unions.sums(levels)
            label = _prediction(unions, levels, sums)
            margin[images], pair[images] = _worst_pairs(unions, levels, sums, label)
            prediction[images] = label
    if bool(unions.completed.any()):
        margin.clamp_(max=-1)
    placement = unions.windows.placements[unions.members[pair].flatten(1)]
    return Certificate(prediction, margin >= 0, margin, placement, "double-masking", threat)


def union_prediction(score_map: ScoreMap, threat: PatchThreatModel) -> Int[Tensor, " batch"]:
    """`double_masking_prediction` for K patches."""
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
            # Most lose to the majority label as soon as one strong second mask is taken out as well.
            lead = scores[label] - scores[common]
            partners = unions.outside[unions.sums(lead).topk(min(_PARTNERS, len(unions))).indices]
            (rows,) = (survives & (first[image] == label)).nonzero(as_tuple=True)
            left = unions.outside[rows].to(lead.dtype) @ (lead * partners).T
            survives[rows] = (left >= int(common < label)).all(1)
        for row in survives.nonzero()[:, 0].tolist():
            label = first[image, row]
            lead = (scores[label] - scores) * unions.outside[row]
            left = lead.sum(1) - unions.sums(lead).amax(1)
            if bool((left >= tie_penalty(label[None], len(scores))[0]).all()):
                answer[image] = label
                break
    return answer


def _worst_pairs(
    unions: Unions,
    levels: Float[Tensor, "batch classes regions"],
    sums: Float[Tensor, "batch classes unions"],
    label: Int[Tensor, " batch"],
) -> tuple[Int[Tensor, " batch"], Int[Tensor, "batch 2"]]:
    """The exact margin over all classes and pairs of unions, and a pair that attains it, by branch and bound."""
    every = torch.arange(len(levels), device=levels.device)
    lead = levels[every, label][:, None] - levels
    base = lead.sum(2) - tie_penalty(label, levels.shape[1])
    base[every, label] = torch.inf
    removed = sums[every, label][:, None] - sums
    single, at = removed.max(2)
    # A union takes at most what its windows take of the positive part, a pair of unions at most the 2K largest.
    patches = unions.members.shape[1]
    windows = unions.windows.masks[unions.windows.keep].flatten(1).to(levels.dtype)
    floor = base - _top(lead.clamp(min=0) @ windows.T, 2 * patches)

    left, rival = (base - single).min(1)
    best = Best(left, at[every, rival][:, None].repeat(1, 2))
    for image, rival in (floor < best.margin[:, None]).nonzero().tolist():
        own, start = lead[image, rival], base[image, rival]
        if floor[image, rival] >= best.margin[image]:
            continue
        first = at[image, rival]
        _try(unions, own, start, removed[image, rival], first[None], image, best)
        # What a union and K more windows can take at most decides which unions need all their partners.
        positive = own.clamp(min=0)
        ceiling = (
            torch.cat([_top((positive * part) @ windows.T, patches) for part in unions.outside.split(4096)])
            + removed[image, rival]
        )
        order = ceiling.sort(descending=True, stable=True).indices
        for some in order.split(max(1, CHUNK_ELEMENTS // (8 * max(len(unions), len(own))))):
            some = some[start - ceiling[some] < best.margin[image]]
            if not len(some):
                break
            _try(unions, own, start, removed[image, rival], some, image, best)
    return best.margin.long(), best.pair


def _try(unions: Unions, lead: Tensor, start: Tensor, removed: Tensor, some: Tensor, image: int, best: Best) -> None:
    """Completes some unions by every second union."""
    more, second = unions.sums(lead * unions.outside[some]).max(1)
    left = start - removed[some] - more
    best.improve(torch.full_like(some, image), left, torch.stack([some, second], 1))


def _top(values: Float[Tensor, "*batch windows"], count: int) -> Float[Tensor, "*batch"]:
    """The sum of the `count` largest values, none negative.

    Past 2^24 float32 may round it, which changes no comparison: no margin comes near that.
    """
    return values.topk(min(count, values.shape[-1]), dim=-1).values.sum(-1)
