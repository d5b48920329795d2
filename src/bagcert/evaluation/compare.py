"""Comparison of two evaluations of the same images: paired tests, and the images that changed.

Two runs on the same images are not independent samples; only images on which they disagree matter. Sources: McNemar,
Psychometrika 1947 (the exact form is the binomial test on the discordant pairs); Efron & Tibshirani 1993, chapter 13
(percentile bootstrap over images).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from bagcert.errors import UsageError, sanitize
from bagcert.records import SCHEMA_VERSION, ImageRecord, Record, document

RESAMPLES = 10_000


@dataclass(frozen=True)
class PairedTest:
    """One accuracy of two runs on the same images. Accuracies are fractions of the images in both.

    Attributes:
        measure: "clean" or "certified" accuracy.
        interval95: confidence interval of the difference, from a percentile bootstrap over images.
        only_first, only_second: number of images that only one run classifies correctly (and certifies).
        p_value: p-value of McNemar's exact two-sided test of no difference.
    """

    measure: str
    first: float
    second: float
    difference: float
    interval95: list[float]
    only_first: int
    only_second: int
    p_value: float


@dataclass(frozen=True)
class Comparison:
    """Two runs, one rule against one threat each.

    Attributes:
        changed: for each image on which the runs differ, a dictionary with `index`, `label`, and pairs `prediction` and
            `certified` of both runs.
    """

    rules: tuple[str, str]
    threat: str
    images: int
    tests: list[PairedTest]
    changed: list[dict[str, Any]]
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, the schema version first."""
        return document(self)


def compare(
    first: Sequence[ImageRecord],
    second: Sequence[ImageRecord],
    *,
    rules: tuple[str | None, str | None] = (None, None),
    threat: str | None = None,
    seed: int = 0,
) -> Comparison:
    """Compares one row of one evaluation with one row of another, over the images in both.

    Args:
        first, second: records from `read_image_records`.
        rules: rule of each run; optional if a run has only one for the threat.
        threat: threat as in the records; optional if the runs have only one in common.

    Raises:
        UsageError: the runs have no image in common, disagree on a label, or the choice of rows is ambiguous.
    """
    threat = _threat(first, second, threat)
    columns = [_column(run, rule, threat, name) for run, rule, name in zip((first, second), rules, _NAMES, strict=True)]
    others = {record.index: record for record in second}
    pairs = [(record, others[record.index]) for record in first if record.index in others]
    if not pairs:
        raise UsageError("the two runs have no image in common")
    for one, other in pairs:
        if one.label != other.label:
            raise UsageError(
                f"image {one.index} has the label {one.label} in one run and {other.label} in the other: these are not "
                "the same images"
            )
        names = one.source, other.source  # the data folder of one run may be a parent of the other's
        if all(names) and not (names[0].endswith(names[1]) or names[1].endswith(names[0])):
            raise UsageError(
                f"image {one.index} is {sanitize(names[0])} in one run and {sanitize(names[1])} in the other: these "
                "are not the same images"
            )
    labels = [one.label for one, _ in pairs]
    verdicts = [(one.results[columns[0]], other.results[columns[1]]) for one, other in pairs]
    clean = np.array([[v.prediction == y for v in pair] for y, pair in zip(labels, verdicts, strict=True)])
    proved = clean & np.array([[v.certified for v in pair] for pair in verdicts])
    return Comparison(
        rules=(verdicts[0][0].rule, verdicts[0][1].rule),
        threat=threat,
        images=len(pairs),
        tests=[_test("clean", clean, seed), _test("certified", proved, seed)],
        changed=[
            _change(one, pair)
            for (one, _), pair in zip(pairs, verdicts, strict=True)
            if _says(pair[0]) != _says(pair[1])
        ],
    )


_NAMES = ("first", "second")


def _threat(first: Sequence[ImageRecord], second: Sequence[ImageRecord], threat: str | None) -> str:
    threats = [list(dict.fromkeys(row.threat for row in run[0].results)) for run in (first, second)]
    if threat is None:
        common = [each for each in threats[0] if each in threats[1]]
        if len(common) != 1:
            raise UsageError(
                f"the first run has the patches {', '.join(threats[0])}, the second {', '.join(threats[1])}; name the "
                "one to compare with --patch"
            )
        return common[0]
    for name, known in zip(_NAMES, threats, strict=True):
        if threat not in known:
            raise UsageError(f"the {name} run has no patch {threat}; it has {', '.join(known)}")
    return threat


def _column(run: Sequence[ImageRecord], rule: str | None, threat: str, name: str) -> int:
    known = [row.rule for row in run[0].results if row.threat == threat]
    if rule is None and len(set(known)) > 1:
        raise UsageError(f"the {name} run has the rules {', '.join(known)}; name the one to compare with --rule")
    wanted = known[0] if rule is None else rule
    if wanted not in known:
        raise UsageError(f"the {name} run has no rule {wanted} against {threat}; it has {', '.join(known)}")
    return next(i for i, row in enumerate(run[0].results) if (row.rule, row.threat) == (wanted, threat))


def _test(measure: str, good: np.ndarray, seed: int) -> PairedTest:
    """Tests the successes of both runs, boolean [images, 2]."""
    count = len(good)
    only_first, only_second = (int((good[:, i] & ~good[:, 1 - i]).sum()) for i in (0, 1))
    discordant = only_first + only_second
    # Resampling images is a multinomial draw of the counts of each kind.
    kinds = np.array([only_first, only_second, count - discordant]) / count
    draws = np.random.default_rng(seed).multinomial(count, kinds, RESAMPLES)
    low, high = np.percentile((draws[:, 1] - draws[:, 0]) / count, [2.5, 97.5])
    return PairedTest(
        measure=measure,
        first=float(good[:, 0].mean()),
        second=float(good[:, 1].mean()),
        difference=(only_second - only_first) / count,
        interval95=[float(low), float(high)],
        only_first=only_first,
        only_second=only_second,
        p_value=mcnemar_p_value(only_first, only_second),
    )


def mcnemar_p_value(only_first: int, only_second: int) -> float:
    """Computes the p-value of McNemar's exact two-sided test: a binomial test with p = 1/2 on the discordant pairs.

    >>> mcnemar_p_value(0, 5), mcnemar_p_value(3, 3)
    (0.0625, 1.0)
    """
    count = only_first + only_second
    ways = tail = 1  # C(count, k), and its sum from 0 to k
    for k in range(min(only_first, only_second)):
        ways = ways * (count - k) // (k + 1)
        tail += ways
    return min(1.0, 2 * tail / 2**count)


def _says(verdict: Record) -> tuple[int, bool]:
    return verdict.prediction, verdict.certified


def _change(record: ImageRecord, pair: tuple[Record, Record]) -> dict[str, Any]:
    return {
        "index": record.index,
        "label": record.label,
        "prediction": [verdict.prediction for verdict in pair],
        "certified": [verdict.certified for verdict in pair],
    }
