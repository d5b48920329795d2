"""The embedded digits: complete, split once and for all."""

import hashlib

import numpy as np
import pytest
from sklearn.datasets import load_digits as sklearn_digits

from bagcert.data.digits import load_digits
from bagcert.errors import UsageError


def test_both_parts_together_are_the_digits() -> None:
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    digits = sklearn_digits()
    for part in (train, test):
        np.testing.assert_array_equal(part.labels, digits.target[part.rows])
        np.testing.assert_array_equal(part.array()[..., 1], np.rint(digits.images[part.rows] * 255 / 16))
        assert part.array().shape[1:] == (8, 8, 3)
    assert not set(train.rows) & set(test.rows)
    assert np.bincount(test.labels).min() >= 34


def test_the_split_is_fixed_by_the_seed() -> None:
    digest = hashlib.sha256(load_digits("test").rows.astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("4799f9744ac7d101019dcf61aaab8dde")
    assert list(load_digits("test", seed=1).rows) != list(load_digits("test").rows)


def test_other_splits_are_refused() -> None:
    with pytest.raises(UsageError, match="no split 'validation'; it has train and test"):
        load_digits("validation")
