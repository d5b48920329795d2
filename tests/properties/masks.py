"""Counts how often a patch within a mask breaks a certificate: random masks, notations, maps, networks and contents.

What the attacker may use is enumerated from what the notation promises, every rectangle, not from the threat.

python -m tests.properties.masks --cases 10000 --json
"""

from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import nn

from bagcert.defenses.derandomized_smoothing import DerandomizedSmoothing
from bagcert.defenses.failsafe import FailSafe
from bagcert.defenses.interval_bounds import IntervalBounds
from bagcert.defenses.minority_reports import MinorityReports
from bagcert.defenses.patchcleanser import PatchCleanser
from bagcert.proofs.verify import verify_record
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle, tiny
from tests.properties.agreement import expected
from tests.properties.cases import RANGES, Case, Choose, attacked, build_grid, build_scores, from_generator
from tests.properties.command import run

MOST_MASKS = 24
MOST_ATTACKS = 400  # images per defense
NAMES = ("a", "b", "c")


@dataclass
class MaskCase(Case):
    """A case under a mask, with what its notation promises.

    Attributes:
        promise: every (height, width) that the notation promises.
    """

    notation: str
    promise: tuple[tuple[int, int], ...]

    @property
    def geometry(self):
        grid = self.score_map.grid
        return grid.rows_seen, grid.cols_seen, self.promise, self.threat.allowed


def draw_notation(choose: Choose, image_size: tuple[int, int]) -> tuple[str, tuple[tuple[int, int], ...]]:
    """A patch without a count, and every shape it promises."""
    every = tuple(product(range(1, image_size[0] + 1), range(1, image_size[1] + 1)))
    kind = choose(1, 0, 3)[0]
    if kind == 0:
        area = choose(1, 1, 9)[0]
        return f"area:{area}", tuple((h, w) for h, w in every if h * w <= area)
    if kind == 1:
        largest = [(choose(1, 1, min(image_size))[0],) * 2]
        text = str(largest[0][0])
    else:
        largest = [(choose(1, 1, image_size[0])[0], choose(1, 1, image_size[1])[0]) for _ in range(kind - 1)]
        text = "+".join(f"{h}x{w}" for h, w in largest)
    return text, tuple((h, w) for h, w in every if any(h <= high and w <= wide for high, wide in largest))


def draw_mask(choose: Choose, image_size: tuple[int, int]) -> np.ndarray:
    """Boolean [height, width], somewhere white: noise, a few white rectangles, or all but a few pixels."""
    height, width = image_size
    kind = choose(1, 0, 2)[0]
    if kind == 0:
        allowed = np.array(choose(height * width, 0, 2)).reshape(image_size) > 0
    elif kind == 1:
        allowed = np.zeros(image_size, dtype=bool)
        for _ in range(choose(1, 1, 3)[0]):
            (top,), (left,) = choose(1, 0, height - 1), choose(1, 0, width - 1)
            allowed[top : top + choose(1, 1, 4)[0], left : left + choose(1, 1, 4)[0]] = True
    else:
        allowed = np.ones(image_size, dtype=bool)
        for _ in range(choose(1, 0, 2)[0]):
            allowed[choose(1, 0, height - 1)[0], choose(1, 0, width - 1)[0]] = False
    if not allowed.any():
        allowed[0, 0] = True
    return allowed


def build_masked(choose: Choose) -> MaskCase:
    """Two images, a mask and a notation; two patches become one where their unions would be too many."""
    grid = build_grid(choose)
    text, promise = draw_notation(choose, grid.image_size)
    allowed = draw_mask(choose, grid.image_size)
    low, high = RANGES[choose(1, 0, len(RANGES) - 1)[0]]
    score_map = ScoreMap(torch.as_tensor(build_scores(choose, low, high, grid.map_size)), low, high, grid)
    patches = choose(1, 1, 2)[0]
    windows = oracle.mask_set(grid.rows_seen, grid.cols_seen, promise, allowed)
    if patches == 2 and len(windows) * (len(windows) + 1) // 2 > MOST_MASKS:
        patches = 1
    notation = f"{patches}*{text}" if patches > 1 else text
    threat = PatchThreatModel.parse(notation, grid.image_size, allowed)
    return MaskCase(score_map, threat, notation, promise)


def check_maps(case: MaskCase, totals: dict[str, int]) -> None:
    """Every rule: its figures against the definitions, its certificates against attacks, its records by the checker."""
    from tests.unit.proofs.test_verify import record_of

    certificates = {name: rule.certify(case.score_map, case.threat) for name, rule in RULES.items()}
    masks = case.masks
    for image in range(len(case.score_map)):
        maps = case.with_scores(attacked(case, image, limit=64, most=1500))
        for name, (label, margin) in expected(case, image).items():
            found = certificates[name]
            totals["disagreements"] += (int(found.prediction[image]), int(found.margin[image])) != (label, margin)
            totals["records_refused"] += not verify_record(record_of(case.score_map, found, image)).ok
            if not found.certified[image]:
                continue
            totals["attacked_certificates"] += 1
            changed = (RULES[name].predict(maps, case.threat) != found.prediction[image]).numpy()
            if name == "detection":
                changed[changed] = [not oracle.alert(scores, masks) for scores in maps.scores.numpy()[changed]]
            totals["broken_certificates"] += bool(changed.any())


def networks(case: MaskCase, seed: int) -> list:
    """Defenses on pixels, with small random networks."""
    height, width = size = case.threat.image_size
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(3 * height * width, 8), nn.ReLU(), nn.Linear(8, 3))
    ablated = nn.Sequential(nn.Flatten(), nn.Linear(6 * height * width, 3))
    for layer in (plain[1], plain[3], ablated[1]):
        nn.init.zeros_(layer.bias)
    return [
        PatchCleanser(plain, NAMES, size, patch=case.notation, masks_per_axis=3),
        MinorityReports(plain, NAMES, size, patch=case.notation),
        IntervalBounds(plain, NAMES, size, patch=case.notation),
        DerandomizedSmoothing(ablated, NAMES, size, ablation="block", size_px=2, patch=case.notation, votes="argmax"),
        tiny.color_model("double-masking", case.notation, size),
    ]


def attacks(case: MaskCase, image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Images [attacks, height, width, 3] with patches of any promised shape anywhere in the white part."""
    rectangles = oracle.promised(case.threat.image_size, case.promise, case.threat.allowed)
    found = np.repeat(image[None], MOST_ATTACKS, 0)
    for attack in found:
        for _ in range(case.threat.patches):
            (h, w), top, left = rectangles[random.integers(len(rectangles))]
            content = random.integers(0, 256, (h, w, 3))
            content = content if random.random() < 0.3 else (content[:1, :1] > 127) * 255
            attack[top : top + h, left : left + w] = content
    return found


def check_pixels(case: MaskCase, random: np.random.Generator, totals: dict[str, int]) -> None:
    """Every defense on pixels, and the fail-safe: what is certified stays under attack."""
    height, width = case.threat.image_size
    images = np.repeat(random.integers(0, 256, (2, 1, 1, 3)), height, 1).repeat(width, 2).astype(np.uint8)
    images ^= random.integers(0, 64, images.shape, dtype=np.uint8)
    allowed = case.threat.allowed
    for defense in networks(case, int(random.integers(2**30))):
        certificate = defense.certify(images, placements=allowed)
        for image in certificate.certified.nonzero()[:, 0].tolist():
            totals["attacked_certificates"] += 1
            attacked_images = attacks(case, images[image], random)
            changed = (defense.predict(attacked_images, placements=allowed) != certificate.prediction[image]).numpy()
            if isinstance(defense, MinorityReports) and changed.any():
                changed[changed] = ~defense.alert(attacked_images[changed], placements=allowed).numpy()
            totals["broken_certificates"] += bool(changed.any())
    fail_safe = FailSafe(tiny.color_model("vote", case.notation, (height, width)), case.threat)
    for image in images:
        verdicts = fail_safe(np.concatenate([image[None], attacks(case, image, random)]))
        labels = {verdict.label for verdict in verdicts if verdict.certified}
        totals["attacked_certificates"] += bool(labels)
        totals["broken_certificates"] += len(labels) > 1


def count(cases: int, seed: int = 0, pixels_every: int = 10) -> dict[str, int]:
    """Runs `cases` cases of two images each, every `pixels_every`-th on pixels as well."""
    random = np.random.default_rng(seed)
    choose = from_generator(random)
    totals = {"cases": 0, "smaller_shapes": 0, "several_patches": 0, "attacked_certificates": 0}
    totals |= {"broken_certificates": 0, "disagreements": 0, "records_refused": 0}
    for number in range(cases):
        case = build_masked(choose)
        totals["cases"] += 1
        totals["smaller_shapes"] += not set(case.threat.maximal_shapes) <= set(case.threat.shapes)
        totals["several_patches"] += case.threat.patches > 1
        check_maps(case, totals)
        if number % pixels_every == 0:
            check_pixels(case, random, totals)
    return totals


if __name__ == "__main__":
    run(count, "masks", __doc__, cases=1000, pixels_every=10)
