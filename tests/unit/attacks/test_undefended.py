"""A plain classifier behind the interface of a defense."""

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.defenses.undefended import Undefended
from bagcert.errors import UsageError
from tests import refused, tiny

IMAGES = tiny.pixels(np.arange(5) % 3, tint=150)


def defense(names=tiny.COLORS):
    return Undefended(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), names, (8, 8))


def test_ties():
    assert defense().predict(IMAGES).tolist() == [0, 1, 2, 0, 1]
    assert defense().predict(np.full((1, 8, 8, 3), 7, dtype=np.uint8)).tolist() == [0]
    floats = torch.from_numpy(IMAGES).permute(0, 3, 1, 2) / 255
    assert defense().predict(floats, patch=3, rule="none").tolist() == [0, 1, 2, 0, 1]


def test_it_is_in_eval_mode():
    model = nn.Sequential(nn.Dropout(0.9), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    found = Undefended(model, tiny.COLORS, (8, 8))
    model.train()
    assert found.predict(IMAGES).tolist() == [0, 1, 2, 0, 1]


def test_it_certifies_nothing():
    allowed = np.zeros((8, 8), dtype=bool)
    allowed[2:6, 3:] = True
    found = defense().certify(IMAGES, 3, placements=allowed)
    assert found.prediction.tolist() == [0, 1, 2, 0, 1]
    assert not found.certified.any()
    assert found.margin.tolist() == [-1] * 5
    assert found.worst_placement.tolist() == [[[2, 3, 3, 3]]] * 5
    assert found.rule == "none"


def test_mistakes_are_named():
    refused(UsageError, "has no rule 'vote'", defense().predict, IMAGES, rule="vote")
    with pytest.raises(UsageError, match=r"must give \[batch, 2\] logits for its class names, got \[5, 3\]"):
        defense(("red", "green")).predict(IMAGES)
    refused(UsageError, "at least two class names, got 1", defense, ("red",))
