"""The largest square patch an image is certified against, from its score map, at no further forward pass.

Only the windows matter, and they change at few sides: a camera image of 4000 px over a 16x16 map has a few dozen
window sets. Each is evaluated once. See docs/method.md, "Largest
certified patch".
"""

from functools import cache, lru_cache

import torch
from jaxtyping import Int
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid, WindowBlock
from bagcert.rules import get_rule
from bagcert.rules.double_masking import double_masking
from bagcert.rules.masks import Windows
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

VOTING_RULES = ("vote", "levine-feizi")
"""Rules without masks: their prediction does not depend on the patch."""


def largest_certified_px(
    score_map: ScoreMap, rule: str, *, threat: PatchThreatModel | None = None, certificate: Certificate | None = None
) -> Int[Tensor, " batch"]:
    """The side in pixels of the largest square patch each image is certified against as deployed; 0 if none.

    For the vote rules over the sides 1 ... min(H, W): by bisection for one patch, since a larger one costs more. The
    bound for several patches is not monotone, so all sides are tried, the largest first. For masking rules, whose
    prediction belongs to one mask set, the largest square that the masks of `threat` cover where the image is
    certified, else 0.

    Args:
        score_map: the scores of a batch.
        rule: a name in `RULES`.
        threat: what the masks are built for, needed by masking rules; for the vote rules only its number of
            patches counts.
        certificate: that of a masking rule, if it is at hand already.

    Raises:
        UsageError: unknown rule, a masking rule without a threat, or a vote rule with allowed placements, where
            a smaller patch may fit where a larger one does not.
    """
    chosen = get_rule(rule)
    if rule not in VOTING_RULES:
        if threat is None:
            raise UsageError(f"the masks of {rule} are built for a patch; name the threat")
        certificate = certificate or chosen.certify(score_map, threat)
        return certificate.certified.long() * covered_px(score_map.grid, threat)
    if threat is not None and threat.allowed is not None:
        raise UsageError("the largest certified patch is over all placements; this threat allows only some")
    last_px = torch.tensor([0, *_last_px(score_map.grid)], device=score_map.scores.device)
    if threat is not None and threat.patches > 1:
        return last_px[_scanned(score_map, rule, threat.patches)]
    return last_px[_bisected(score_map, rule)]


def _scanned(score_map: ScoreMap, rule: str, patches: int) -> Int[Tensor, " batch"]:
    """How many of the distinct sides there are up to the largest that each image is certified against."""
    device = score_map.scores.device
    result = torch.zeros(len(score_map), dtype=torch.int64, device=device)
    open_ = torch.arange(len(score_map), device=device)
    for number, side in reversed(list(enumerate(distinct_sides(score_map.grid), 1))):
        if not len(open_):
            break
        holds = get_rule(rule).certify(score_map[open_], _squares(score_map.grid, side, patches)).certified
        result[open_[holds]] = number
        open_ = open_[~holds]
    return result


def _bisected(score_map: ScoreMap, rule: str) -> Int[Tensor, " batch"]:
    """The same for one patch, where no side beyond one that fails holds."""
    sides = distinct_sides(score_map.grid)
    device = score_map.scores.device
    # sides[low - 1] holds (0: nothing known to hold), sides[high] fails (len(sides): nothing known to fail)
    low = torch.zeros(len(score_map), dtype=torch.int64, device=device)
    high = torch.full_like(low, len(sides))
    while bool((low < high).any()):
        middle = (low + high) // 2
        for index in middle[low < high].unique().tolist():
            (images,) = ((middle == index) & (low < high)).nonzero(as_tuple=True)
            holds = get_rule(rule).certify(score_map[images], _squares(score_map.grid, sides[index])).certified
            low[images[holds]] = index + 1
            high[images[~holds]] = index
    return low


def largest_certifiable_px(score_map: ScoreMap, label: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Over double-masking defenses built for every square: the largest side whose certificate holds with `label`.

    Agreement under two masks is not monotone in the side, so all window sets are tried, the largest first; an
    image is done at its first success. 0 where no side succeeds.

    Args:
        score_map: the scores of a batch.
        label: what the deployed defense answers, int64 [batch].
    """
    device = score_map.scores.device
    result = torch.zeros(len(score_map), dtype=torch.int64, device=device)
    sides, last_px = distinct_sides(score_map.grid), _last_px(score_map.grid)
    open_ = torch.arange(len(score_map), device=device)
    for side, last in reversed(list(zip(sides, last_px, strict=True))):
        if not len(open_):
            break
        threat = _squares(score_map.grid, side)
        if bool(Windows.of(score_map, threat).completed.any()):
            continue  # two masks can hide everything: no image is certified
        found = double_masking(score_map[open_], threat)
        success = found.certified & (found.prediction == label[open_])
        result[open_[success]] = last
        open_ = open_[~success]
    return result


def covered_px(grid: RegionGrid, threat: PatchThreatModel) -> int:
    """The side of the largest square whose every reach lies in a mask built for `threat`, with as many patches."""
    masks = grid.windows(threat)
    low, high = 0, min(grid.image_size)
    while low < high:
        middle = (low + high + 1) // 2
        if _has_room(threat, middle) and _covers(masks, grid, middle, threat):
            low = middle
        else:
            high = middle - 1
    return low


@lru_cache(maxsize=64)
def distinct_sides(grid: RegionGrid) -> tuple[int, ...]:
    """The sides at which the maximal windows of a square patch change, ascending, the first being 1.

    Windows only grow with the side, so equal sets at two sides mean equal sets between them.
    """

    @cache
    def windows(side: int) -> tuple[bytes, bytes]:
        (block,) = grid.windows(_squares(grid, side))
        return block.rows.tobytes(), block.cols.tobytes()

    def changes(low: int, high: int) -> list[int]:
        """Sides in (low, high] whose windows differ from those of the side before."""
        if windows(low) == windows(high):
            return []
        if high - low == 1:
            return [high]
        middle = (low + high) // 2
        return changes(low, middle) + changes(middle, high)

    return 1, *changes(1, min(grid.image_size))


def _last_px(grid: RegionGrid) -> list[int]:
    """For each distinct window set the largest side that leads to it."""
    sides = distinct_sides(grid)
    return [*(side - 1 for side in sides[1:]), min(grid.image_size)]


def _squares(grid: RegionGrid, side: int, patches: int = 1) -> PatchThreatModel:
    return PatchThreatModel(grid.image_size, ((side, side),), patches)


def _has_room(threat: PatchThreatModel, side: int) -> bool:
    return bool(threat.placements((side, side)).any())


def _covers(masks: tuple[WindowBlock, ...], grid: RegionGrid, side: int, threat: PatchThreatModel) -> bool:
    """Does every reach of the squares of a side lie in a mask?"""
    squares = PatchThreatModel(grid.image_size, ((side, side),), threat.patches, threat.allowed)
    for block in grid.windows(squares):
        covered = ~block.keep
        for mask in masks:
            rows = ~(block.rows @ ~mask.rows.T)  # [row windows, row windows of the mask]: lies inside
            cols = ~(block.cols @ ~mask.cols.T)
            covered |= rows @ mask.keep @ cols.T
        if not covered.all():
            return False
    return True
