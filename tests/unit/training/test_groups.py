"""Splits that keep groups together."""

import numpy as np
import pytest

from bagcert.errors import UsageError
from bagcert.training.groups import groups_of, split_by_group
from tests import refused, tiny


@pytest.mark.parametrize("seed", range(20))
def test_split_by_group_holds_out_whole_groups_of_every_class(seed: int) -> None:
    random = np.random.default_rng(seed)
    groups = random.integers(0, 40, 400)
    labels = groups % 4
    held = split_by_group(labels, groups, 0.2, seed)
    for group in range(40):
        assert len(set(held[groups == group].tolist())) <= 1
    for label in range(4):
        share = held[labels == label].mean()
        assert 0.1 < share < 0.3
    assert np.array_equal(held, split_by_group(labels, groups, 0.2, seed))
    assert not np.array_equal(held, split_by_group(labels, groups, 0.2, seed + 1))


def test_split_by_group_leaves_every_class() -> None:
    # Group 0 has all images of class 1 and more of class 0; group 1 and 2 are of class 0.
    groups = np.array([0, 0, 0, 1, 1, 1, 2, 2, 2])
    labels = np.array([0, 0, 1, 0, 0, 0, 0, 0, 0])
    for seed in range(20):
        try:
            held = split_by_group(labels, groups, 0.4, seed)
        except UsageError:
            continue
        assert set(labels[~held].tolist()) == {0, 1}


def test_split_by_group_refuses_one_group_per_class() -> None:
    labels = np.repeat([0, 1], 10)
    refused(UsageError, "at least two groups", split_by_group, labels, labels, 0.1, 0)


def test_groups_of_images_without_names_are_refused() -> None:
    refused(UsageError, "class folders", groups_of, tiny.image_set(), "prefix")
