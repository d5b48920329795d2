"""Attention pooling in basic tensor operations: the evidence map, and double masking with a readout.

The integers equal those of `bagcert.nets.attention_pooling`, and the verdicts equal those of
`bagcert.rules.attention_masking`. Every pair of masks is tried once for every image.
"""

import math
import random

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from bagcert.aggregation import POOLED_LIMIT, VALUE_LIMIT, WEIGHT_LIMIT, AttentionPooling, pooling_dtype
from bagcert.errors import UsageError
from bagcert.exporting.rules import EXACT, MOST_MIB, Answer, RuleModule, TwoRounds, lowest_largest, masks
from bagcert.grid import RegionGrid
from bagcert.nets.attention_pooling import FIRST_WEIGHT, UNITS, AttentionReadout, finite, weight_steps
from bagcert.rules import get_rule
from bagcert.threat import PatchThreatModel

QUOTIENTS = 1024
"""Number of test divisions that a runtime must round correctly before it certifies anything."""


class EvidenceMap(nn.Module):
    """`AttentionReadout.integers` in float32: converts real-valued scores to products and attention weights."""

    shift: Tensor
    steps: Tensor

    def __init__(self, readout: AttentionReadout) -> None:
        super().__init__()
        self.values, self.heads = readout.values, readout.heads
        self.register_buffer("shift", (readout.position + math.log(FIRST_WEIGHT)).detach().clone())
        self.register_buffer("steps", torch.tensor(weight_steps(), dtype=torch.float32))

    def forward(self, z: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch channels rows cols"]:
        """Returns the evidence map. A weight is one plus the number of thresholds that its logarithm reaches."""
        z = finite(z)
        values = (z[:, : self.values] * UNITS).clamp(-float(VALUE_LIMIT), float(VALUE_LIMIT)).round()
        logits = z[:, self.values :] + self.shift
        weights = (logits[..., None] >= self.steps).float().sum(-1) + 1
        products = weights.unsqueeze(2) * values.unflatten(1, (self.heads, -1))
        return torch.cat([products.flatten(1, 2), weights], 1)


class AttentionMaskingModule(RuleModule):
    """Double masking with a readout for every pair of masks (docs/method.md, "Attention pooling").

    Args:
        inside: the regions of each mask.
        readout: the integer readout.
    """

    name = "double-masking"
    outside: Tensor
    first: Tensor
    second: Tensor
    pairs: Tensor
    keeps: Tensor
    rows: Tensor
    quotients: Tensor

    def __init__(self, inside: Bool[np.ndarray, "masks regions"], readout: AttentionPooling) -> None:
        super().__init__(readout.classes)
        count, regions = inside.shape
        self.readout, self.dtype = readout, pooling_dtype(regions)
        self.rounds = TwoRounds(inside, readout.classes)
        # Each mask with itself, then all pairs of two masks; and the index of each ordered pair among them.
        first, second = np.triu_indices(count, 1)
        first, second = (np.concatenate([np.arange(count), part]) for part in (first, second))
        pairs = np.empty((count, count), dtype=np.int64)
        pairs[first, second] = pairs[second, first] = np.arange(len(first))
        self.masks = count
        self.register_buffer("outside", torch.from_numpy(~inside).to(self.dtype))
        self.register_buffer("first", torch.from_numpy(first))
        self.register_buffer("second", torch.from_numpy(second))
        self.register_buffer("pairs", torch.from_numpy(pairs.flatten()))
        self.register_buffer("keeps", torch.from_numpy((~inside[first] & ~inside[second]).any(1)))
        rows, quotients = known_quotients(readout)
        self.register_buffer("rows", rows.to(self.dtype))
        self.register_buffer("quotients", quotients.to(self.dtype))
        readout.scores(torch.ones(1, readout.channels, dtype=self.dtype))  # converts its weights once

    def forward(self, evidence: Float[Tensor, "batch channels regions"]) -> Answer:
        """Returns label and margin; the margin is over single masks, and over all pairs if all single masks agree."""
        evidence = evidence.to(self.dtype)
        kept = self.outside[self.first] * self.outside[self.second]
        scores = self.readout.scores(kept @ evidence.mT)  # [batch, pairs, classes]
        if self.rounds.labeled:
            labels = lowest_largest(scores.mT)
            pairs = labels.index_select(1, self.pairs).unflatten(1, (self.masks, self.masks))
            label = self.rounds(labels[:, : self.masks], pairs)
        else:
            label = lowest_largest(self.readout.scores(evidence.sum(2)))
        lead = self.own(scores.mT, label) - scores.mT - (self.index < label[:, None]).float()[..., None]
        lead = torch.where((self.index == label[:, None])[..., None], float(EXACT), lead).amin(1)
        lead = torch.where(self.keeps, lead, float(EXACT))  # a pair that leaves no region has no label
        single = lead[:, : self.masks].amin(1)
        return label, self.rounds.limit(torch.where(single >= 0, lead.amin(1), single))

    def computes(self, one: Float[Tensor, "batch 1 1"]) -> Bool[Tensor, " batch"]:
        """Returns whether this runtime rounds known quotients correctly."""
        return torch.eq(self.readout.pooled(self.rows * one), self.quotients).flatten(1).float().amin(1) > 0


def attention_rule(
    rule: str, grid: RegionGrid, threat: PatchThreatModel, readout: AttentionPooling
) -> AttentionMaskingModule:
    """Creates the rule for a threat and a readout.

    Raises:
        UsageError: a rule that cannot be exported, or too many masks.
    """
    if rule != AttentionMaskingModule.name:
        reason = "" if get_rule(rule).pools else ", since it needs class scores that are sums over regions"
        raise UsageError(
            f"the rule {rule} cannot be exported for a model that pools regions by attention{reason}; "
            f"{AttentionMaskingModule.name} can"
        )
    regions = grid.map_size[0] * grid.map_size[1]
    widest = max(readout.channels, len(readout.first), readout.classes, regions)
    size = pooling_dtype(regions).itemsize // 4
    inside = masks(grid, threat, widest * size // 2)
    mib = 4 * size * widest * len(inside) * (len(inside) + 1) / 2**21
    steps = 4 * readout.heads * regions * WEIGHT_LIMIT / 2**20
    if max(mib, steps) > MOST_MIB:
        raise UsageError(
            f"double masking with {len(inside):,} masks, {regions:,} regions, {readout.values} values and "
            f"{readout.heads} attention heads takes {max(mib, steps):,.0f} MiB per image in the graph, more than the "
            f"limit of {MOST_MIB} MiB"
        )
    return AttentionMaskingModule(inside, readout)


def known_quotients(
    readout: AttentionPooling,
) -> tuple[Int[Tensor, "rows channels"], Int[Tensor, "rows values"]]:
    """Returns sums of values and weights with quotients at or next to half-integers, and the rounded quotients."""
    draw, each = random.Random(0), readout.values // readout.heads
    rows, quotients = [], []
    for _ in range(-(-QUOTIENTS // readout.values)):
        weights = [draw.randint(2, 128 * WEIGHT_LIMIT) for _ in range(readout.heads)]
        sums = []
        for weight in weights:
            for _ in range(each):
                half = draw.randint(-POOLED_LIMIT, POOLED_LIMIT - 1)
                doubled = (2 * half + 1) * weight + (draw.choice((-1, 1)) if weight % 2 else draw.choice((-2, 0, 2)))
                sums.append(doubled // 2)
        rows.append([*sums, *weights])
        quotients.append([rounded_quotient(total, weights[k // each]) for k, total in enumerate(sums)])
    return torch.tensor(rows), torch.tensor(quotients)


def rounded_quotient(total: int, weight: int) -> int:
    """Rounds total / weight to the nearest integer, half to even.

    >>> [rounded_quotient(total, 2) for total in (-3, -1, 1, 3, 5)]
    [-2, 0, 0, 2, 2]
    """
    floor, rest = divmod(total, weight)
    return floor + (2 * rest > weight or (2 * rest == weight and floor % 2 == 1))
