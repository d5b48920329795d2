"""The largest square patch against which an image is certified, from its score map without another forward pass.

Certificates depend on the patch only through the windows, and the windows change at few patch sizes: a camera image of
4000 px with a 16x16 map has a few dozen distinct window sets. Each is evaluated once. See docs/method.md, "Largest
certified patch".
"""

from dataclasses import replace
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
    """Side in pixels of the largest square patch against which each image is certified as deployed; 0 if none.

    For the vote rules, all sides from 1 to min(H, W) are considered. For one patch the certificate is monotone in the
    side, so bisection is used. For several patches the bound is not monotone, so all sides are tried, largest first.
    For masking rules the prediction depends on the mask set, so the result is the largest square covered by the masks
    of `threat` if the image is certified, and 0 otherwise.

    Args:
        score_map: scores of a batch.
        rule: a name in `RULES`.
        threat: threat model for which the masks are built; required by masking rules. Vote rules use only its number
            of patches.
        certificate: certificate of the masking rule for `score_map` and `threat`; computed if None.

    Returns:
        int64 [batch], in pixels.

    Raises:
        UsageError: unknown rule, a masking rule without a threat, or a vote rule with restricted placements, where a
            smaller patch may fit where a larger one does not.
    """
    chosen = get_rule(rule)
    if rule not in VOTING_RULES:
        if threat is None:
            raise UsageError(f"the rule {rule} needs a threat to build its masks")
        certificate = certificate or chosen.certify(score_map, threat)
        return certificate.certified.long() * covered_px(score_map.grid, threat)
    score_map = _without_limit(score_map)
    if threat is not None and threat.allowed is not None:
        raise UsageError("the largest certified patch is not defined for restricted placements")
    last_px = torch.tensor([0, *_last_px(score_map.grid)], device=score_map.scores.device)
    if threat is not None and threat.patches > 1:
        return last_px[_scanned(score_map, rule, threat.patches)]
    return last_px[_bisected(score_map, rule)]


def _scanned(score_map: ScoreMap, rule: str, patches: int) -> Int[Tensor, " batch"]:
    """Number of distinct sides up to the largest one that is certified, found by trying all sides."""
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
    """Number of distinct sides up to the largest one that is certified, found by bisection.

    Valid for one patch only: if a side is not certified, no larger side is.
    """
    sides = distinct_sides(score_map.grid)
    device = score_map.scores.device
    # Invariant: sides[low - 1] is certified (low = 0: none known), sides[high] is not (high = len(sides): none known).
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
    """Side in pixels of the largest square patch for which a double-masking defense built for it certifies `label`.

    Agreement under two masks is not monotone in the side, so all window sets are tried, largest first, until one
    succeeds. The result is 0 if none does.

    Args:
        score_map: scores of a batch.
        label: prediction of the deployed defense, int64 [batch].

    Returns:
        int64 [batch], in pixels.
    """
    score_map, device = _without_limit(score_map), score_map.scores.device
    result = torch.zeros(len(score_map), dtype=torch.int64, device=device)
    sides, last_px = distinct_sides(score_map.grid), _last_px(score_map.grid)
    open_ = torch.arange(len(score_map), device=device)
    for side, last in reversed(list(zip(sides, last_px, strict=True))):
        if not len(open_):
            break
        threat = _squares(score_map.grid, side)
        if bool(Windows.of(score_map, threat).completed.any()):
            continue  # two masks can cover all regions, so no image is certified
        found = double_masking(score_map[open_], threat)
        success = found.certified & (found.prediction == label[open_])
        result[open_[success]] = last
        open_ = open_[~success]
    return result


def covered_px(grid: RegionGrid, threat: PatchThreatModel) -> int:
    """Side in pixels of the largest square patch whose every reach is contained in a mask built for `threat`."""
    masks, grid = grid.windows(threat), grid.with_masks_per_axis(None)
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
    """Sides at which the maximal windows of a square patch change, ascending and starting with 1.

    Windows grow monotonically with the side. If two sides have equal window sets, so do all sides between them.
    """

    @cache
    def windows(side: int) -> tuple[bytes, bytes]:
        (block,) = grid.windows(_squares(grid, side))
        return block.rows.tobytes(), block.cols.tobytes()

    def changes(low: int, high: int) -> list[int]:
        """Sides in (low, high] whose windows differ from those of the next smaller side."""
        if windows(low) == windows(high):
            return []
        if high - low == 1:
            return [high]
        middle = (low + high) // 2
        return changes(low, middle) + changes(middle, high)

    return 1, *changes(1, min(grid.image_size))


def _last_px(grid: RegionGrid) -> list[int]:
    """The largest side for each distinct window set."""
    sides = distinct_sides(grid)
    return [*(side - 1 for side in sides[1:]), min(grid.image_size)]


def _without_limit(score_map: ScoreMap) -> ScoreMap:
    """The score map without a limit for the windows per axis, whose windows grow monotonically with the side."""
    return replace(score_map, grid=score_map.grid.with_masks_per_axis(None))


def _squares(grid: RegionGrid, side: int, patches: int = 1) -> PatchThreatModel:
    return PatchThreatModel(grid.image_size, ((side, side),), patches)


def _has_room(threat: PatchThreatModel, side: int) -> bool:
    return bool(threat.placements((side, side)).any())


def _covers(masks: tuple[WindowBlock, ...], grid: RegionGrid, side: int, threat: PatchThreatModel) -> bool:
    """Whether every reach of a square patch of this side is contained in a mask."""
    squares = PatchThreatModel(grid.image_size, ((side, side),), threat.patches, threat.allowed)
    for block in grid.windows(squares):
        covered = ~block.keep
        for mask in masks:
            rows = ~(block.rows @ ~mask.rows.T)  # [row windows, row windows of the mask]: whether contained
            cols = ~(block.cols @ ~mask.cols.T)
            covered |= rows @ mask.keep @ cols.T
        if not covered.all():
            return False
    return True
