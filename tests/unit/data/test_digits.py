"""The embedded digits: complete, split once and for all."""

import hashlib

import numpy as np
import pytest

from bagcert.data.digits import FILE, load_digits
from bagcert.errors import UsageError
from tests import refused


def test_both_parts_together_are_the_digits() -> None:
    train, test = load_digits("train"), load_digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert train.class_names == tuple("0123456789")
    with np.load(FILE) as file:
        values, labels = file["images"], file["labels"]
    assert (values.shape, values.dtype, labels.dtype, values.min(), values.max()) == ((1797, 8, 8), "u1", "u1", 0, 16)
    for part in (train, test):
        np.testing.assert_array_equal(part.labels, labels[part.rows])
        np.testing.assert_array_equal(part.array()[..., 1], np.rint(values[part.rows] * (255 / 16)))
        assert part.array().shape[1:] == (8, 8, 3)
    assert not set(train.rows) & set(test.rows)
    assert np.bincount(test.labels).min() >= 34


@pytest.mark.parametrize(
    ("split", "pixels", "labels"),
    [
        (
            "train",
            "356faa9cd6489d35bdfd2701aaeb6bd9667090b3f3f2be0cb38e2a7d22eeab2c",
            "7f12aed3e99b9a1b840e4cb19c3637e66f6496cadc1af25e62bc606ceda53aeb",
        ),
        (
            "test",
            "aa0c4bc76f92debcbdcda95a5c8be0ef1ed1b494e46504385bfb78688f3fbf8f",
            "8441602f1b83e5dbb5e8f954b31beb16297ffa19a664e2883d5acb05244dfe6f",
        ),
    ],
)
def test_pixels_and_labels_are_those_of_scikit_learn(split: str, pixels: str, labels: str) -> None:
    """SHA-256 of what this function returned when it read scikit-learn's copy."""
    digits = load_digits(split)
    assert digits.array().dtype == np.uint8
    assert hashlib.sha256(digits.array().tobytes()).hexdigest() == pixels
    assert hashlib.sha256(digits.labels.astype("<i8").tobytes()).hexdigest() == labels


def test_source_and_licence_are_beside_the_file() -> None:
    text = FILE.with_name("digits.LICENSE.txt").read_text(encoding="utf-8")
    assert all(word in text for word in ("E. Alpaydin", "C. Kaynak", "CC BY 4.0"))


def test_the_split_is_fixed_by_the_seed() -> None:
    digest = hashlib.sha256(load_digits("test").rows.astype("<i8").tobytes()).hexdigest()
    assert digest.startswith("4799f9744ac7d101019dcf61aaab8dde")
    assert list(load_digits("test", seed=1).rows) != list(load_digits("test").rows)


def test_other_splits_are_refused() -> None:
    refused(UsageError, "no split 'validation'; it has train and test", load_digits, "validation")
