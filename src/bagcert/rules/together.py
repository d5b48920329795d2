"""Batched certification of score maps that belong to images of different sizes.

A rule depends on the patch only through the windows on the score map. Photos of hundreds of different sizes have only a
few dozen distinct window sets because all of them are resized to one network input. Maps with the same windows are
certified in a single call. Only the pixel coordinates of the worst placements differ, and each belongs to one window.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from bagcert.certificate import Certificate
from bagcert.grid import WindowBlock
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel


def certify_together(
    rule: str, score_maps: Sequence[ScoreMap], threats: Sequence[PatchThreatModel]
) -> list[Certificate]:
    """Certify several score maps. The results equal those of applying the rule to each map separately.

    Args:
        rule: a name in `RULES`.
        score_maps: score maps of one network, each with the grid of its images.
        threats: one threat model per map, for the image size of the map.

    Returns:
        One certificate per score map, in order.

    Raises:
        UsageError: unknown rule, or an error raised by the rule.
    """
    certify = get_rule(rule).certify
    groups: dict[tuple, list[int]] = {}
    for number, (score_map, threat) in enumerate(zip(score_maps, threats, strict=True)):
        groups.setdefault(_key(score_map, threat), []).append(number)
    found: dict[int, Certificate] = {}
    for members in groups.values():
        first = members[0]
        certificate = certify(joined([score_maps[number] for number in members]), threats[first])
        blocks = score_maps[first].grid.windows(threats[first])
        start = 0
        for number in members:
            part = _part(certificate, slice(start, start + len(score_maps[number])), threats[number])
            start += len(score_maps[number])
            own = score_maps[number].grid.windows(threats[number])
            found[number] = part if own is blocks else _moved(part, blocks, own)
    return [found[number] for number in range(len(score_maps))]


def _key(score_map: ScoreMap, threat: PatchThreatModel) -> tuple:
    """Grouping key: maps with equal keys can be certified together and differ only in the pixels of placements."""
    windows = [
        (block.rows.shape, block.rows.tobytes(), block.cols.shape, block.cols.tobytes(), block.keep.tobytes())
        for block in score_map.grid.windows(threat)
    ]
    kind = (score_map.low, score_map.high, score_map.slack is None, id(score_map.readout))
    return (score_map.grid.map_size, threat.patches, kind, *windows)


def joined(score_maps: Sequence[ScoreMap]) -> ScoreMap:
    """Concatenate score maps of one network into one batch, on the grid of the first map."""
    first = score_maps[0]
    if len(score_maps) == 1:
        return first
    slack = None if first.slack is None else torch.cat([each.slack for each in score_maps if each.slack is not None])
    return replace(first, scores=torch.cat([each.scores for each in score_maps]), slack=slack)


def _part(certificate: Certificate, images: slice, threat: PatchThreatModel) -> Certificate:
    return replace(
        certificate,
        prediction=certificate.prediction[images],
        certified=certificate.certified[images],
        margin=certificate.margin[images],
        worst_placement=certificate.worst_placement[images],
        threat=threat,
    )


def _moved(certificate: Certificate, blocks: Sequence[WindowBlock], own: Sequence[WindowBlock]) -> Certificate:
    """Replace the placement of each window in `blocks` by the placement of the same window in `own`."""
    window_at = {tuple(place): number for number, place in enumerate(_places(blocks).tolist())}
    worst = certificate.worst_placement
    numbers = [window_at[tuple(place)] for place in worst.reshape(-1, 4).tolist()]
    return replace(certificate, worst_placement=torch.from_numpy(_places(own)[numbers]).reshape(worst.shape).to(worst))


def _places(blocks: Sequence[WindowBlock]) -> np.ndarray:
    """The placement of every window without the gaps, int [windows, 4]."""
    return np.concatenate([block.places[block.keep] for block in blocks])
