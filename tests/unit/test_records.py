"""Records: plain rows in the documented form, and Wilson's interval."""

import json

import numpy as np
import pytest
import torch

from bagcert.certificate import Certificate
from bagcert.records import SCHEMA_VERSION, ImageRecord, Record, Row, RunInfo, wilson_interval
from bagcert.threat import PatchThreatModel

RUN_KEYS = [
    "schema_version", "model", "weights_sha256", "data", "split", "images", "limit", "device", "backend", "dtype",
    "threads", "versions", "seconds", "results",
]  # fmt: skip
ROW_KEYS = [
    "rule", "patch", "threat", "clean_accuracy", "certified_accuracy", "certified_share", "interval95", "seconds",
]  # fmt: skip
RECORD_KEYS = ["rule", "patch", "threat", "prediction", "certified", "margin", "worst_placement", "locality"]


@pytest.mark.parametrize(("successes", "trials"), [(1, 7), (60, 100), (4567, 10_000), (1, 2), (9_999, 10_000)])
def test_the_interval_solves_the_equation_it_comes_from(successes: int, trials: int) -> None:
    """The bounds are the shares p from which the observed one is z standard deviations away."""
    z, share = 1.959963984540054, successes / trials
    roots = np.roots([1 + z * z / trials, -(2 * share + z * z / trials), share * share])
    assert wilson_interval(successes, trials) == pytest.approx(sorted(roots.real), rel=1e-9)


@pytest.mark.parametrize("trials", [1, 5, 1000])
def test_the_interval_at_none_and_all(trials: int) -> None:
    z = 1.959963984540054
    low, high = wilson_interval(0, trials)
    assert low == pytest.approx(0, abs=1e-15)
    assert high == pytest.approx(z * z / (trials + z * z))
    assert wilson_interval(trials, trials) == pytest.approx([1 - high, 1 - low])
    assert 0 <= low < high < 1


def test_the_interval_narrows_with_more_images() -> None:
    spans = [high - low for low, high in (wilson_interval(n // 2, n) for n in (10, 100, 1000))]
    assert spans == sorted(spans, reverse=True)


def _run(**changes: object) -> RunInfo:
    row = Row(
        rule="vote",
        patch=[2, 8],
        threat="2x8",
        clean_accuracy=0.9,
        certified_accuracy=0.5,
        certified_share=0.55,
        interval95={"clean_accuracy": [0.8, 0.95], "certified_accuracy": [0.4, 0.6]},
        seconds=0.1,
    )
    values = {
        "model": "m",
        "weights_sha256": "0" * 64,
        "data": "digits",
        "split": "test",
        "images": 10,
        "limit": None,
        "device": "cpu",
        "backend": "torch",
        "dtype": "float32",
        "threads": 1,
        "versions": {"python": "3.11"},
        "seconds": {"load": 1.0, "forward": 2.0, "total": 3.0},
        "results": [row],
    }
    return RunInfo(**{**values, **changes})


def test_a_run_has_the_documented_keys_in_their_order() -> None:
    run = _run().to_dict()
    assert list(run)[: len(RUN_KEYS)] == RUN_KEYS
    assert run["schema_version"] == SCHEMA_VERSION
    assert list(run["seconds"]) == ["load", "forward", "total"]
    assert list(run["results"][0]) == ROW_KEYS
    assert list(run["results"][0]["interval95"]) == ["clean_accuracy", "certified_accuracy"]
    assert json.loads(json.dumps(run, allow_nan=False)) == run


def _certificate(notation: str, worst: torch.Tensor) -> Certificate:
    return Certificate(
        prediction=torch.tensor([2, 0]),
        certified=torch.tensor([True, False]),
        margin=torch.tensor([5, -3]),
        worst_placement=worst,
        rule="vote",
        threat=PatchThreatModel.parse(notation, (8, 8)),
    )


def test_record_of_each_image() -> None:
    worst = torch.tensor([[[0, 1, 2, 8]], [[6, 0, 2, 8]]])
    first, second = Record.each(_certificate("2x8", worst))
    assert first == Record("vote", [2, 8], "2x8", 2, True, 5, [0, 1, 2, 8])
    assert second == Record("vote", [2, 8], "2x8", 0, False, -3, [6, 0, 2, 8])
    line = json.loads(ImageRecord(7, 1, [first, second]).to_json())
    assert list(line) == ["index", "label", "results"]
    assert [list(result) for result in line["results"]] == [RECORD_KEYS, RECORD_KEYS]
    assert line["results"][0]["certified"] is True


@pytest.mark.parametrize("notation", ["2+1x8", "2*2", "area:3"])
def test_several_shapes_or_patches_have_no_single_size(notation: str) -> None:
    records = Record.each(_certificate(notation, torch.zeros(2, 2, 4, dtype=torch.int64)))
    assert [(record.patch, record.threat) for record in records] == [(None, notation)] * 2
    assert records[0].worst_placement == [[0, 0, 0, 0], [0, 0, 0, 0]]


def test_a_line_of_records_is_one_line() -> None:
    text = ImageRecord(0, 0, [Record("vote", None, "a\nb", 0, False, 0, [])]).to_json()
    assert "\n" not in text


@pytest.mark.parametrize("trials", [1, 7, 150, 10_000])
def test_the_interval_holds_the_share_of_none_and_all(trials):
    assert wilson_interval(0, trials)[0] == 0
    assert wilson_interval(trials, trials)[1] == 1
