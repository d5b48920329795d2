"""Compares double masking and detection on attention pooling with plain Python integers, and attacks what they certify.

python -m tests.properties.pooling --cases 1000 --json
"""

from dataclasses import replace

import numpy as np
import torch

from bagcert.aggregation import PRODUCT_LIMIT, VALUE_LIMIT, WEIGHT_LIMIT, AttentionPooling
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from tests import oracle
from tests.properties.cases import build, from_generator
from tests.properties.command import run

SCALES = ((3, 20), (31, 200), (WEIGHT_LIMIT, VALUE_LIMIT))


class PoolingCase:
    """A tiny grid and threat from `cases`, with random evidence and a random readout."""

    def __init__(self, rng):
        case = build(from_generator(rng))
        self.threat, self.masks, self.reaches = case.threat, case.masks, case.reaches
        rows, cols = case.score_map.grid.map_size
        self.heads, each = int(rng.integers(1, 3)), int(rng.integers(1, 4))
        hidden, classes, depth = int(rng.integers(1, 5)), int(rng.integers(2, 5)), self.heads * each
        self.most_weight, self.most_value = SCALES[rng.integers(len(SCALES))]
        self.weights, self.values = self.content(rng, (rows, cols), depth)
        matrices = {
            "first": rng.integers(-200, 201, (hidden, depth)),
            "first_bias": rng.integers(-3000, 3001, hidden),
            "second": rng.integers(-200, 201, (classes, hidden)),
            "skip": rng.integers(-40, 41, (classes, depth)),
            "bias": rng.integers(-20, 21, classes),
        }
        self.matrices = {name: matrix.tolist() for name, matrix in matrices.items()}
        readout = AttentionPooling(*(torch.as_tensor(m) for m in matrices.values()), self.heads)
        scores = torch.as_tensor(evidence(self.weights, self.values))[None]
        self.score_map = ScoreMap(scores, -PRODUCT_LIMIT, PRODUCT_LIMIT, case.score_map.grid, readout=readout)

    def content(self, rng, size, depth):
        """Random weights and values, also at their limits."""
        weights = rng.integers(1, self.most_weight + 1, (self.heads, *size))
        values = rng.integers(-self.most_value, self.most_value + 1, (depth, *size))
        if rng.random() < 0.3:
            weights = rng.choice([1, WEIGHT_LIMIT], weights.shape)
            values = rng.choice([-VALUE_LIMIT, VALUE_LIMIT], values.shape)
        return weights, values

    def score(self, mask):
        return oracle.readout_scores(self.values, self.weights, self.matrices, mask)

    def attacked(self, rng, count):
        """The map with random content in one reach each."""
        maps = []
        for _ in range(count):
            reach = self.reaches[rng.integers(len(self.reaches))]
            weights, values = self.content(rng, reach.shape, len(self.values))
            maps.append(evidence(np.where(reach, weights, self.weights), np.where(reach, values, self.values)))
        return replace(self.score_map, scores=torch.as_tensor(np.stack(maps)))


def evidence(weights, values):
    """The map of products and weights."""
    return np.concatenate([np.repeat(weights, len(values) // len(weights), 0) * values, weights])


def count(cases: int, seed: int = 0, attacks: int = 30) -> dict[str, int]:
    """Runs `cases` cases; attacks each certificate `attacks` times."""
    rng = np.random.default_rng(seed)
    totals = {"cases": 0, "certified": 0, "disagreements": 0, "attacked_maps": 0, "broken_certificates": 0}
    while totals["cases"] < cases:
        case = PoolingCase(rng)
        if len(case.masks) > 60:
            continue
        totals["cases"] += 1
        shape = case.masks[0].shape
        pairs = [a | b for n, a in enumerate(case.masks) for b in case.masks[n:]]
        plain = oracle.any_masked_prediction(case.score, np.zeros(shape, dtype=bool))
        label = oracle.any_double_masking_prediction(case.score, case.masks, shape)
        expected = {
            "double-masking": (label, oracle.any_margin(case.score, pairs, label)),
            "detection": (plain, oracle.any_margin(case.score, case.masks, plain)),
        }
        for rule, (answer, margin) in expected.items():
            found = RULES[rule].certify(case.score_map, case.threat)
            agree = int(found.prediction) == int(RULES[rule].predict(case.score_map, case.threat)) == answer
            agree &= bool(found.certified) == (margin >= 0)
            exact = margin >= 0 or rule == "detection"
            agree &= int(found.margin) == margin if exact else margin <= int(found.margin) < 0
            totals["disagreements"] += not agree
            if found.certified:
                totals["certified"] += 1
                totals["attacked_maps"] += attacks
                maps = case.attacked(rng, attacks)
                changed = RULES[rule].predict(maps, case.threat) != answer
                if rule == "detection":
                    changed &= RULES[rule].certify(maps, case.threat).certified
                totals["broken_certificates"] += bool(changed.any())
    return totals


if __name__ == "__main__":
    run(count, "pooling", __doc__, cases=1000)
