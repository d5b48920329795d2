"""The card of a published model: figures are those of results.json, and no name in it can be more than a name."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from bagcert.defenses.bagcert import shipped_models
from bagcert.errors import UnreadableError
from bagcert.evaluation.results_files import RESULTS
from bagcert.hub.card import CITATION, code, measured_results, model_card
from bagcert.nets.saved_model import read_config, weights_sha256
from tests import refused

ROOT = Path(__file__).resolve().parents[3]
DIGITS = shipped_models()["digits"]
CONFIG = read_config(DIGITS)
SHA256 = weights_sha256(DIGITS)

HOSTILE = [
    "<script>alert(1)</script>",
    "[here](https://example.org)",
    "a | b | **c**",
    "`` ` ```",
    "`",
    "![x](y)\n\n# Certified: 100 %",
    "cat\u202egod",
    "---\nlicense: none\n---",
    "\ud800",
    "$x^2$ https://example.org &amp;",
]


def _outside_code(card: str) -> str:
    """What a reader's program would take for markup: the card without its code blocks and code spans."""
    text = re.sub(r"^```.*?^```$", "", card, flags=re.S | re.M)
    return re.sub(r"(?<!`)(`+)(?!`)(.+?)(?<!`)\1(?!`)", "", text)


def _results(folder: Path, **changes: object) -> Path:
    values = json.loads((DIGITS / RESULTS).read_text())
    (folder / RESULTS).write_text(json.dumps({**values, **changes}))
    return folder


def test_every_figure_of_the_results_is_in_the_card() -> None:
    card = model_card(CONFIG, SHA256, measured_results(DIGITS, SHA256), "someone/digits")
    run = json.loads((DIGITS / RESULTS).read_text())
    for row in run["results"]:
        low, high = row["interval95"]["certified_accuracy"]
        line = (
            f"| `{row['threat']}` | `{row['rule']}` | {row['clean_accuracy']:.1%} | **{row['certified_accuracy']:.1%}**"
            f" | {low:.1%} to {high:.1%} |"
        )
        assert line in card.splitlines()
    assert f"Measured on {run['images']:,} images of `{run['data']}`, split `test`" in card
    for fact in (CONFIG.provenance["device"], str(CONFIG.provenance["training_seconds"]), SHA256):
        assert f"`{fact}`" in card
    assert 'bagcert.load("someone/digits")' in card
    for heading in ("Measured", "Threat model", "What no certificate covers", "Training", "Use", "Cite"):
        assert f"\n## {heading}\n" in card
    assert "no content of that patch, anywhere, changes the answer:" in card
    assert "without an alert" not in card


def test_a_detection_rule_promises_less() -> None:
    card = model_card(CONFIG.model_copy(update={"rule": "detection"}), SHA256, None, "someone/digits")
    assert "changes the answer without an alert" in card


def test_a_model_without_results_says_so(tmp_path: Path) -> None:
    assert measured_results(tmp_path, SHA256) is None
    card = model_card(CONFIG, SHA256, None, "someone/digits")
    assert "**This model has not been evaluated" in card
    assert "%" not in card.replace("95 %", "")
    empty = measured_results(_results(tmp_path, results=[]), SHA256)
    assert "**This model has not been evaluated" in model_card(CONFIG, SHA256, empty, "someone/digits")


def test_a_limit_and_unreadable_images_are_told(tmp_path: Path) -> None:
    run = measured_results(_results(tmp_path, limit=360, unreadable=3), SHA256)
    assert "360 images (the first 360 only) of" in model_card(CONFIG, SHA256, run, "someone/digits")
    assert "3 could not be read" in model_card(CONFIG, SHA256, run, "someone/digits")


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_is_more_than_a_name(name: str) -> None:
    results = measured_results(DIGITS, SHA256)
    assert results is not None
    results = replace(results, data=name, device=name, results=[replace(results.results[0], threat=name, rule=name)])
    provenance = {"data": name, "device": name, "versions": {name: name}}
    changes = {"name": name, "class_names": [name] * 60, "patch": name, "provenance": provenance}
    config = CONFIG.model_construct(**{**CONFIG.model_dump(), **changes})
    plain = model_card(CONFIG, SHA256, measured_results(DIGITS, SHA256), "someone/digits")
    card = model_card(config, SHA256, results, "someone/digits")
    outside = _outside_code(card)
    for part in ("<script", "](", "https://example.org", "alert", "license", "**c**", "100 %", "$x^2$", "&amp;"):
        assert part not in outside
    assert "\u202e" not in card
    assert card.encode()
    rows = [line for line in outside.splitlines() if line.startswith("|") and "%" in line]
    assert [re.sub(r"\\\|", "", row).count("|") for row in rows[1:]] == [6] * len(rows[1:])
    headings = [line for line in card.splitlines() if line.startswith("## ")]
    assert headings == [line for line in plain.splitlines() if line.startswith("## ")]
    assert yaml.safe_load(card.split("\n---\n")[0]) == yaml.safe_load(plain.split("\n---\n")[0])
    assert "and 10 more" in card


def test_code_spans() -> None:
    assert code("") == code(" ") == "(empty)"
    assert code("x" * 500) == f"`{'x' * 200} ...`"
    assert code("a|b") == "`a|b`"
    assert code("a|b", in_table=True) == r"`a\|b`"


ROW = json.loads((DIGITS / RESULTS).read_text())["results"][0]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weights_sha256": "0" * 64}, "other weights"),
        ({"schema_version": 9}, "schema version 9, expected 1"),
        ({"results": 5}, "not the JSON of an evaluation"),
        ({"images": "many"}, "not the JSON of an evaluation"),
        ({"results": [{**ROW, "certified_accuracy": 1.5}]}, "outside 0 to 1"),
        ({"results": [{**ROW, "clean_accuracy": float("nan")}]}, "outside 0 to 1"),
        ({"results": [{**ROW, "interval95": {}}]}, "no 95 % intervals"),
        (
            {"results": [{**ROW, "interval95": {"clean_accuracy": [0, 1], "certified_accuracy": [0, 2]}}]},
            "outside 0 to 1",
        ),
    ],
)
def test_results_refused(changes: dict, reason: str, tmp_path: Path) -> None:
    refused(UnreadableError, reason, measured_results, _results(tmp_path, **changes), SHA256)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 5000, "null"])
def test_results_that_are_no_json_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / RESULTS).write_text(text)
    refused(UnreadableError, "not the JSON of an evaluation", measured_results, tmp_path, SHA256)


def test_the_citation_is_that_of_the_repository() -> None:
    cff = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    for work in (cff, *cff["references"]):
        assert f"{{{work['title']}}}" in CITATION
        for author in work["authors"]:
            name = author.get("name") or f"{author['family-names']}, {author['given-names']}"
            assert name in CITATION
        assert str(work.get("year", cff["version"])) in CITATION
        assert work.get("collection-title", "") in CITATION
    assert CITATION.count("@") == 1 + len(cff["references"])
