"""Paired comparison of two runs, by hand and against enumerations."""

import json
from fractions import Fraction
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest

from bagcert.errors import UnreadableError, UsageError
from bagcert.evaluation.compare import compare, mcnemar_p_value
from bagcert.evaluation.results_files import read_image_records
from bagcert.records import ImageRecord, Record
from tests import refused
from tests.command import check_mistake, run


def record(index: int, label: int, *verdicts: tuple[str, str, int, bool]) -> ImageRecord:
    """Verdicts as (rule, threat, prediction, certified)."""
    rows = [Record(rule, [5, 5], threat, told, sure, 0, [0, 0, 5, 5]) for rule, threat, told, sure in verdicts]
    return ImageRecord(index, label, rows)


def one_rule(*verdicts: tuple[int, bool], rule: str = "vote") -> list[ImageRecord]:
    """All labels are 0."""
    return [record(i, 0, (rule, "5", *verdict)) for i, verdict in enumerate(verdicts)]


def write(path: Path, records: list[ImageRecord]) -> Path:
    path.write_text("".join(each.to_json() + "\n" for each in records))
    return path


def test_counts_by_hand():
    first = one_rule((0, True), (0, True), (0, False), (1, False), (1, True))
    second = one_rule((0, True), (1, True), (0, True), (0, True), (2, True), rule="double-masking")
    found = compare(first, second)
    clean, certified = found.tests
    assert (found.images, found.rules, found.threat) == (5, ("vote", "double-masking"), "5")
    assert (clean.first, clean.second, clean.only_first, clean.only_second) == (0.6, 0.6, 1, 1)
    assert (certified.first, certified.second, certified.only_first, certified.only_second) == (0.4, 0.6, 1, 2)
    assert certified.difference == pytest.approx(0.2)
    assert [change["index"] for change in found.changed] == [1, 2, 3, 4]
    assert found.changed[3] == {"index": 4, "label": 0, "prediction": [1, 2], "certified": [True, True]}


@pytest.mark.parametrize(("only_first", "only_second"), [(0, 0), (0, 1), (3, 3), (1, 6), (9, 2)])
def test_mcnemar_is_the_binomial_test(only_first: int, only_second: int):
    """The probability, under fair coins, of a split at least as unlikely as the one seen."""
    first = one_rule(*[(0, True)] * only_first, *[(1, False)] * only_second, (0, True))
    second = one_rule(*[(1, False)] * only_first, *[(0, True)] * only_second, (0, True))
    n = only_first + only_second
    weight = comb(n, only_first)
    expected = Fraction(sum(comb(n, k) for k in range(n + 1) if comb(n, k) <= weight), 2**n)
    assert compare(first, second).tests[0].p_value == pytest.approx(float(expected))


@pytest.mark.parametrize(
    ("only_first", "only_second", "expected"),
    [
        (0, 1, 1.0),
        (1, 4, 0.375),
        (10, 30, 0.0022214337732293643),
        (25, 15, 0.1538599441628321),
        (100, 900, 1.3403435580012363e-161),
        (550, 450, 0.0017305360849763027),
        (4900, 5100, 0.04658552770494645),
        (30000, 0, 0.0),
    ],
)
def test_mcnemar_known_values(only_first: int, only_second: int, expected: float):
    """Values of scipy.stats.binomtest; the last is too small for a float."""
    assert mcnemar_p_value(only_first, only_second) == pytest.approx(expected, rel=1e-9, abs=0)


def test_the_interval_is_that_of_all_resamples():
    """Five images resampled in all 5^5 ways, against the drawn ones."""
    first = one_rule((0, True), (0, True), (0, True), (1, False), (0, True))
    second = one_rule((0, True), (0, False), (0, True), (0, True), (0, False))
    gain = np.array([0, -1, 0, 1, -1])
    means = [gain[list(draw)].mean() for draw in product(range(5), repeat=5)]
    low, high = np.percentile(means, [2.5, 97.5])
    assert compare(first, second).tests[1].interval95 == pytest.approx([low, high], abs=0.2 + 1e-9)
    alike = compare(first, first).tests[1]
    assert (alike.interval95, alike.p_value, alike.difference) == ([0, 0], 1, 0)


def test_only_the_images_in_both_count():
    first, second = one_rule((0, True), (0, True), (1, True)), one_rule((1, True), (0, True))
    found = compare(first, second[1:])
    assert (found.images, found.changed) == (1, [])
    refused(UsageError, "no image in common", compare, first[:1], second[1:])


def test_other_labels_and_rows_refused():
    with pytest.raises(UsageError, match="image 0 has the label 0 in one run and 1 in the other"):
        compare(one_rule((0, True)), [record(0, 1, ("vote", "5", 0, True))])
    both = [record(0, 0, ("vote", "5", 0, False), ("double-masking", "5", 0, True), ("vote", "2", 0, True))]
    for options, message in (
        ({}, "name the one to compare with --patch"),
        ({"threat": "5"}, "the first run has the rules vote, double-masking"),
        ({"threat": "5", "rules": ("vote", "detection")}, "the second run has no rule detection against 5"),
        ({"threat": "7"}, "no patch 7; it has 5, 2"),
    ):
        refused(UsageError, message, compare, both, both, **options)
    found = compare(both, both, rules=("vote", "double-masking"), threat="5")
    assert [(test.first, test.second) for test in found.tests] == [(1, 1), (0, 1)]


def test_the_command(tmp_path: Path):
    first = write(tmp_path / "a.records.jsonl", one_rule((0, True), (0, False), (1, True)))
    second = write(tmp_path / "b.records.jsonl", one_rule((0, True), (0, True), (0, True)))
    result = run("compare", first, second)
    assert (result.code, result.err) == (0, "")
    assert "3 images in both runs" in result.out
    assert "image 1 (label 0): 0 -> 0 certified" in result.out
    document = json.loads(run("compare", first, second, "--json").out)
    assert document["tests"][1]["only_second"] == 2
    assert "image 2" not in run("compare", first, second, "--show", 1).out
    check_mistake(run("compare", first, second, *["--rule", "vote"] * 3), 2, "--rule can be given at most twice")
    check_mistake(run("compare", first, tmp_path / "c.jsonl"), 5, "c.jsonl cannot be read")


@pytest.mark.parametrize(
    "damage", ["", "{}\n", "[1]\n", "nonsense", "[" * 100_000, '{"index":0,"label":0,"results":[]}\n']
)
def test_damaged_records_are_one_sentence(tmp_path: Path, damage: str):
    path = tmp_path / "a.records.jsonl"
    path.write_text(damage)
    refused(UnreadableError, r"a\.records\.jsonl", read_image_records, path)


def test_records_that_do_not_belong_together(tmp_path: Path):
    two = one_rule((0, True), (0, True))
    refused(UnreadableError, "do not follow one another", read_image_records, write(tmp_path / "a", two[::-1]))
    with pytest.raises(UnreadableError, match="same questions"):
        read_image_records(write(tmp_path / "b", [two[0], record(1, 0, ("vote", "2", 0, True))]))
    assert read_image_records(write(tmp_path / "c", two)) == two
