"""Reads the maps of certificate records: region scores, or the evidence of attention pooling with its readout.

This module is part of the independent checker; see `bagcert.proofs.verify`. All results are exact: quotients are
rounded with integer arithmetic, and matrix products have integer sums below 2^53, which float64 represents exactly.
"""

from dataclasses import dataclass
from hashlib import sha256
from math import prod
from typing import Any

import numpy as np

from bagcert.proofs.claim import MOST_SCORES, MOST_SIDE, integer, need, unpack

MOST_READOUT = 2**22
"""Limit for the number of integers in a readout."""
MOST_WEIGHT, MOST_VALUE, MOST_POOLED, HIDDEN_UNIT = 255, 511, 127, 128
"""Constants of attention pooling: ranges of weights, values, and pooled and hidden values; divisor of hidden sums."""


@dataclass(frozen=True)
class Scores:
    """A score map whose class scores are sums over regions.

    Attributes:
        s: scores [classes, m, n].
        low, high: u_0 and u_1, the range of the scores, which an attacker cannot leave.
        slack: bound on the change of each score when it is recomputed; None if locality is exact.
    """

    s: np.ndarray
    low: int
    high: int
    slack: np.ndarray | None

    @property
    def map_size(self) -> list[int]:
        """Number of rows m and columns n of the map."""
        return list(self.s.shape[1:])

    @property
    def work(self) -> int:
        """Number of multiplications for the class scores of one set of kept regions."""
        return self.s.size

    def class_scores(self, kept: np.ndarray) -> np.ndarray:
        """Class sums [sets, classes] over the regions of each set; `kept` is [sets, regions] with 0 and 1."""
        return kept @ self.s.reshape(len(self.s), -1).T


@dataclass(frozen=True)
class Readout:
    """The integer readout of attention pooling and its number of attention heads."""

    heads: int
    first: np.ndarray
    first_bias: np.ndarray
    second: np.ndarray
    skip: np.ndarray
    bias: np.ndarray

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.bias)

    def class_scores(self, U: np.ndarray, A: np.ndarray) -> np.ndarray:
        """Class scores `z` [sets, classes] from the sums U of products and A of weights over the kept regions.

        q = clip(round(U / A), -127, 127), t = clip(round((first q + first_bias) / 128), 0, 127),
        z = second t + skip q + bias, where `round` rounds halves to even. All arithmetic is in integers.
        """
        weight = A.repeat(U.shape[1] // A.shape[1], axis=1)
        q = rounded_quotient(U, np.maximum(weight, 1)).clip(-MOST_POOLED, MOST_POOLED)
        t = rounded_quotient(product(q, self.first.T) + self.first_bias, HIDDEN_UNIT).clip(0, MOST_POOLED)
        return product(t, self.second.T) + product(q, self.skip.T) + self.bias


@dataclass(frozen=True)
class Evidence:
    """The evidence map of attention pooling: products `u` [values, m, n], weights `e` [heads, m, n], and a readout."""

    u: np.ndarray
    e: np.ndarray
    readout: Readout

    @property
    def map_size(self) -> list[int]:
        """Number of rows m and columns n of the map."""
        return list(self.u.shape[1:])

    @property
    def work(self) -> int:
        """Number of multiplications for the class scores of one set of kept regions, plus the cost of rounding."""
        values, classes, hidden = len(self.u), self.readout.classes, len(self.readout.first)
        matrices = hidden * values + classes * (hidden + values)
        return self.u.size + self.e.size + matrices + 2**8 * (2 * values + hidden + classes)

    def class_scores(self, kept: np.ndarray) -> np.ndarray:
        """Class scores [sets, classes] of the readout for each set; `kept` is [sets, regions] with 0 and 1."""
        U = product(kept, self.u.reshape(len(self.u), -1).T)
        A = product(kept, self.e.reshape(len(self.e), -1).T)
        return self.readout.class_scores(U, A)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Matrix product of integers as int64; sums must stay below 2^53."""
    return (a.astype(float) @ b.astype(float)).astype(np.int64)


def rounded_quotient(a: np.ndarray, b: np.ndarray | int) -> np.ndarray:
    """Compute `round(a / b)` of integers with b > 0, rounding halves to even."""
    quotient, rest = np.divmod(a, b)
    above = (2 * rest > b) | ((2 * rest == b) & (quotient % 2 == 1))
    return quotient + above


def read_scores(record: dict[str, Any]) -> Scores:
    """Read the score map of a record.

    Raises:
        FaultError: the map is invalid or too large.
    """
    scores = record["scores"]
    shape = [integer(length, 1, MOST_SIDE, "a side of the score map") for length in scores["shape"]]
    need(len(shape) == 3 and shape[0] > 1 and prod(shape) <= MOST_SCORES, f"scores of shape {shape}")
    low, high = (integer(scores[end], -(2**15), 2**15 - 1, f"the {end} score") for end in ("low", "high"))
    s = unpack(scores["data"], shape, "<i2").astype(float)
    need(low < high and low <= s.min() and s.max() <= high, f"scores leave [{low}, {high}]")
    slack = None if scores["slack"] is None else unpack(scores["slack"], shape, "<i2")
    need(record["locality"] == ("exact" if slack is None else "measured"), "slack means measured locality")
    need(slack is None or slack.min() >= 0, "slack must be at least 0")
    return Scores(s, low, high, slack)


def read_readout(readout: dict[str, Any]) -> Readout:
    """Read a parsed readout, checking its hash and that no sum can reach 2^23.

    Raises:
        FaultError: the readout is invalid or too large.
    """
    version = readout["readout_version"]
    need(version == 1 and type(version) is int, f"the readout version is {version}, this checks 1")
    classes = integer(readout["classes"], 2, MOST_SIDE, "the number of classes")
    values = integer(readout["values"], 1, MOST_SIDE, "the number of values")
    hidden = integer(readout["hidden"], 1, MOST_SIDE, "the number of hidden units")
    heads = integer(readout["heads"], 1, values, "the number of attention heads")
    need(values % heads == 0, f"{values} values are not a multiple of {heads} attention heads")
    shapes = {
        "first": [hidden, values],
        "first_bias": [hidden],
        "second": [classes, hidden],
        "skip": [classes, values],
        "bias": [classes],
    }
    need(sum(map(prod, shapes.values())) <= MOST_READOUT, "the readout is too large to check", "limit")
    matrices = {name: unpack(readout[name], shape, "<i4").astype(np.int64) for name, shape in shapes.items()}
    found = Readout(heads, **matrices)
    for weights, bias in (
        (found.first, found.first_bias),
        (np.concatenate([found.second, found.skip], axis=1), found.bias),
    ):
        largest = int((np.abs(weights).sum(1) * MOST_POOLED + np.abs(bias)).max())
        need(largest < 2**23, f"sums of the readout can reach {largest:,}, but must stay below {2**23:,}")
    said, hashed = readout["sha256"], readout_sha256(found)
    need(said == hashed, f"the hash of the readout is {hashed}, not {str(said)[:64]}")
    return found


def readout_sha256(readout: Readout) -> str:
    """SHA-256 of the integers of a readout as little-endian int32.

    The order is: number of values, heads, hidden units and classes, then first, first_bias, second, skip and bias, each
    row by row.
    """
    hidden, values = readout.first.shape
    content = [np.array([values, readout.heads, hidden, readout.classes])]
    content += [readout.first, readout.first_bias, readout.second, readout.skip, readout.bias]
    return sha256(b"".join(part.astype("<i4").tobytes() for part in content)).hexdigest()


def read_evidence(record: dict[str, Any], readout: dict[str, Any] | None) -> Evidence:
    """Read the evidence map of a record and the readout that it refers to.

    Raises:
        FaultError: the map or the readout is invalid or too large, or the record refers to another readout.
    """
    evidence = record["evidence"]
    stated = evidence["readout_sha256"]
    need(isinstance(stated, str), "the record must state the hash of its readout")
    need(readout is not None, f"the record uses the readout {stated[:64]!r}, but no readout is given before it")
    assert readout is not None
    found = read_readout(readout)
    need(
        stated == readout["sha256"],
        f"the record uses the readout {stated[:64]!r}, the one before it is {readout['sha256']!r}",
    )
    shape = [integer(length, 1, MOST_SIDE, "a side of the evidence") for length in evidence["shape"]]
    need(len(shape) == 4 and sum(shape[:2]) * prod(shape[2:]) <= MOST_SCORES, f"evidence of shape {shape}")
    values, heads, *map_size = shape
    expected = [found.first.shape[1], found.heads]
    need(shape[:2] == expected, f"the readout has {expected} values and heads, the evidence has {shape[:2]}")
    need(record["locality"] == "exact", "attention pooling requires exact locality")
    e = unpack(evidence["weights"], [heads, *map_size], "u1").astype(np.int64)
    need(e.min() >= 1, f"attention weights must lie in [1, {MOST_WEIGHT}], found {e.min()}")
    u = unpack(evidence["products"], [values, *map_size], "<i4").astype(np.int64)
    each = e.repeat(values // heads, axis=0)
    need((u % each == 0).all(), "a product must be its weight times an integer")
    largest = int(np.abs(u // each).max())
    need(largest <= MOST_VALUE, f"values must lie in [-{MOST_VALUE}, {MOST_VALUE}], found {largest} up to its sign")
    return Evidence(u, e, found)
