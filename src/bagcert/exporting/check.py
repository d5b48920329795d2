"""Checks of an exported file: its results are compared with those of the package's rules."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bagcert.aggregation import VALUE_LIMIT, WEIGHT_LIMIT
from bagcert.errors import UnsoundError
from bagcert.exporting.image_range import out_of_range, require_refused
from bagcert.exporting.module import CertifiedModule
from bagcert.nets.attention_pooling import FIRST_WEIGHT, UNITS, AttentionReadout
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

Run = Callable[[np.ndarray], Sequence[np.ndarray]]
"""Images, or `z`, float32 to label, certified, margin, scores (and `z` where it is an output)."""

MOST_MOVED = 1e-2  # share of scores that may differ by one: summation order matters at a rounding boundary
RANDOM_MAPS = 48


@dataclass(frozen=True)
class Check:
    """Result of the comparison.

    Attributes:
        maps: number of synthetic score maps (ties, counting, range limits, noise); all results agree with the rules.
        images: number of images run through the whole file; all results agree with the rules on the file's scores.
        scores_moved: share of scores that differ by one from torch's.
        same_verdicts: number of images whose label, certificate and margin equal those of torch.
        certified: number of certified images among them.
    """

    maps: int
    images: int
    scores_moved: float
    same_verdicts: int
    certified: int


def check_rule(run: Run, module: CertifiedModule, scorer: RegionScorer, threat: PatchThreatModel) -> int:
    """Checks the head and the rule of the file on synthetic scores.

    Returns:
        The number of maps.

    Raises:
        UnsoundError: a result differs from the package's rule.
    """
    z = made_up(module, scorer)
    found = run(z.numpy())
    scores = scorer.integers(z)
    _compare(found, scores, z, module, scorer, threat, "made-up scores")
    if not np.array_equal(found[3], scores.numpy()):
        raise UnsoundError("the exported head gives other scores than the model's; the file would be wrong")
    return len(z)


def check_images(
    run: Run, images: Tensor, module: CertifiedModule, scorer: RegionScorer, threat: PatchThreatModel, quantized: bool
) -> Check:
    """Checks the whole file on images, batched and one by one, and on images with invalid values.

    Args:
        run: the file with `z` among its outputs.
        images: float [images, channels, height, width] in [0, 1].
        quantized: the scores are expected to differ from torch's; only the rule is checked.

    Raises:
        UnsoundError: a result differs from the package's rule on the file's scores, the scores differ from torch's, or
            an image with values outside [0, 1] is certified.
    """
    found = run(images.numpy())
    z = torch.from_numpy(np.array(found[4]))
    _compare(found, torch.from_numpy(np.array(found[3])), z, module, scorer, threat, "images")
    for number in range(min(2, len(images))):
        alone = run(images[number : number + 1].numpy())
        own = torch.from_numpy(np.array(alone[4]))
        _compare(alone, torch.from_numpy(np.array(alone[3])), own, module, scorer, threat, "an image alone")
    _, certified, margin, *_ = run(out_of_range(images).numpy())
    require_refused(certified, margin)
    expected = scorer.integers(scorer.forward_batch(images)).cpu().numpy().astype(np.int64)
    distance = np.abs(_levels(found[3].astype(np.int64), scorer) - _levels(expected, scorer))
    moved = float((distance > 0).mean())
    if not quantized and (distance.max() > 1 or moved > MOST_MOVED):
        raise UnsoundError(
            f"the exported network gives other scores than torch: {moved:.2%} differ, by up to {distance.max()}; by "
            f"rounding alone it would be at most {MOST_MOVED:.0%}, by 1"
        )
    truth = _expected(torch.from_numpy(expected), None, module, scorer, threat)
    same = np.ones(len(images), dtype=bool)
    for here, there in zip(found[:3], truth, strict=True):
        same &= here == there
    return Check(0, len(images), moved, int(same.sum()), int(np.sum(found[1])))


def made_up(module: CertifiedModule, scorer: RegionScorer) -> Tensor:
    """Creates real-valued scores to test a rule: ties, counting, range limits, NaN and infinity, noise."""
    random = torch.Generator().manual_seed(0)
    if scorer.readout is not None:
        return _made_up_evidence(scorer.readout, random)
    classes, (rows, cols) = len(scorer.class_names), scorer.grid().map_size
    shape = (classes, rows, cols)
    # Of all classes, of the first two, of the last two; a class leads everywhere but in one region.
    flat, first, last = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    first[:2], last[-2:] = module.high, module.high
    counted = []
    for leader in (0, classes - 1):
        one = torch.full(shape, float(module.low))
        one[leader] = module.high
        one[leader, -1, -1] = module.high - 1
        counted.append(one)
    odd = torch.randint(-2, 3, shape, generator=random).float()
    odd[:, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])[torch.arange(classes) % 4]
    maps = [flat, first, last, *counted, odd]
    for number in range(RANDOM_MAPS):
        reach = (1, 3, 40, module.high)[number % 4]  # small numbers often tie
        one = torch.randint(-reach, reach + 1, shape, generator=random).float()
        favored = int(torch.randint(0, classes, (), generator=random))
        one[favored] += reach * (number % 3) / 2
        if number % 5 == 0:  # two identical classes
            one[(favored + 1) % classes] = one[favored]
        maps.append(one)
    return torch.stack(maps) / (1.0 if module.binary else module.scale)


def _made_up_evidence(readout: AttentionReadout, random: torch.Generator) -> Tensor:
    """Creates real-valued scores to test attention pooling: equal regions, a few dominant regions, range limits."""
    channels, size = readout.channels, tuple(readout.position.shape[1:])
    values, shift = readout.values, readout.position.detach() + math.log(FIRST_WEIGHT)
    flat, odd = torch.zeros(channels, *size), torch.zeros(channels, *size)
    odd[:, 0, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30])[torch.arange(channels) % 4]
    maps = [flat, odd, torch.full_like(flat, torch.inf), torch.full_like(flat, -torch.inf)]
    for number in range(RANDOM_MAPS):
        reach = (2, 20, 150, VALUE_LIMIT)[number % 4]
        most = (1, 2, 16, WEIGHT_LIMIT)[number // 4 % 4]  # small sums of weights often give half-integer quotients
        common = torch.randint(-reach, reach + 1, (values, 1, 1), generator=random)
        content = common + torch.randint(-reach, reach + 1, (values, *size), generator=random)
        weights = torch.randint(1, most + 1, (readout.heads, *size), generator=random)
        for _ in range(number % 3):
            row, col = (int(torch.randint(0, side, (), generator=random)) for side in size)
            content[:, row, col] = torch.randint(-VALUE_LIMIT, VALUE_LIMIT + 1, (values,), generator=random)
            weights[:, row, col] = WEIGHT_LIMIT
        maps.append(torch.cat([content / UNITS, weights.float().log() - shift]))
    return torch.stack(maps)


def _levels(scores: np.ndarray, scorer: RegionScorer) -> np.ndarray:
    """Returns the integers that rounding changes by at most 1: scores, or with a readout, values and weights."""
    if scorer.readout is None:
        return scores
    weights = scores[:, scorer.readout.values :]
    products = scores[:, : scorer.readout.values]
    values = products // weights.repeat(scorer.readout.values // scorer.readout.heads, 1)
    return np.concatenate([values, weights], 1)


def _compare(
    found: Sequence[np.ndarray],
    scores: Tensor,
    z: Tensor,
    module: CertifiedModule,
    scorer: RegionScorer,
    threat: PatchThreatModel,
    what: str,
) -> None:
    truth = _expected(scores, z, module, scorer, threat)
    for name, here, there in zip(("label", "certified", "margin"), found, truth, strict=False):
        if not np.array_equal(here, there):
            number = int(np.flatnonzero(np.asarray(here) != there)[0])
            raise UnsoundError(
                f"the exported {module.rule.name} rule is not the package's: on {what} its {name} is {here[number]} "
                f"where {there[number]} is right"
            )


def _expected(
    scores: Tensor, z: Tensor | None, module: CertifiedModule, scorer: RegionScorer, threat: PatchThreatModel
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Computes label, certified and margin with the package's rule; `z` is used for the tolerance, if there is one."""
    rule = get_rule(module.rule.name)
    found = rule.certify(scorer.form.score_map(scores.long(), scorer.grid()), threat)
    margin = found.margin
    if module.tolerance > 0 and z is not None:
        # The guard of `bagcert.rules.guard`, on the worst map that the module computes.
        worst = ScoreMap(module.worst(z, found.prediction.float()).long(), module.low, module.high, scorer.grid())
        second = rule.certify(worst, threat)
        margin = torch.where(second.prediction == found.prediction, second.margin, margin.clamp(max=-1))
    return found.prediction.numpy(), (margin >= 0).numpy(), margin.numpy()
