"""`bagcert attack`: what it prints and writes, the alarm's exit code, and sentences for mistakes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bagcert.rules import RULES, Rule, vote
from tests.command import check_mistake, run

QUICK = ("digits", "--data", "digits", "--limit", 4, "--steps", 3, "--restarts", 1, "--attacked-placements", 2)
QUICK = (*QUICK, "--device", "cpu")


def test_json_out_records_and_images(tmp_path: Path) -> None:
    out, records, save = tmp_path / "a.json", tmp_path / "a.jsonl", tmp_path / "images"
    rules = ("--rule", "vote", "--rule", "double-masking")
    result = run("attack", *QUICK, *rules, "--json", "--out", out, "--records", records, "--save", save)
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    assert json.loads(out.read_text()) == document
    assert list(document) == [
        "schema_version", "model", "weights_sha256", "data", "split", "images", "limit", "device", "dtype", "threads",
        "versions", "seconds", "seed", "attack", "results", "notes", "pixels",
    ]  # fmt: skip
    assert (document["model"], document["data"], document["split"]) == ("digits", "digits", "test")
    assert (document["images"], document["device"], document["dtype"]) == (4, "cpu", "float32")
    assert document["attack"] == {
        "attacks": ["random", "gradient", "score-map", "transfer"],
        "steps": 3,
        "restarts": 1,
        "placements": 2,
        "batch_size": 64,
    }
    # The model's own rule comes first, in whatever order they were asked for.
    assert [row["rule"] for row in document["results"]] == ["double-masking", "vote"]
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3]
    for column, row in enumerate(document["results"]):
        assert list(row) == [
            "rule", "patch", "threat", "clean_accuracy", "attacked_accuracy", "certified_accuracy", "attempts",
            "certified_attempts", "broken_certificates",
        ]  # fmt: skip
        assert (row["patch"], row["threat"], row["broken_certificates"]) == ([2, 2], "2", 0)
        assert row["certified_accuracy"] <= row["attacked_accuracy"] <= row["clean_accuracy"]
        assert row["attempts"] == sum(line["results"][column]["attempts"] for line in lines) > 0
    broken = [
        f"{line['index']:06d}-{found['rule']}-2.png" for line in lines for found in line["results"] if found["broken"]
    ]
    assert sorted(broken) == sorted(path.name for path in save.glob("*"))


def test_a_table_for_people() -> None:
    result = run("attack", *QUICK, "--attack", "random", "--patch", "1")
    assert (result.code, result.err) == (0, "")
    assert "digits on digits (test, 4 images)" in result.out
    for word in ("attacked", "certified", "attempts", "broken certificates", "double-masking", "random;"):
        assert word in result.out


@pytest.fixture
def lying_vote(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vote rule certifies everything."""

    def certifies_everything(score_map, threat):
        found = vote.vote(score_map, threat)
        object.__setattr__(found, "certified", torch.ones_like(found.certified))
        return found

    fake = Rule("vote", certifies_everything, lambda scores, threat: scores.predict(), "recovery", "a lie")
    monkeypatch.setitem(RULES, "vote", fake)


def test_broken_certificate_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lying_vote: None) -> None:
    monkeypatch.chdir(tmp_path)
    result = run("attack", *QUICK, "--rule", "vote", "--patch", "4", "--attack", "gradient", "--json")
    assert result.code == 4
    (row,) = json.loads(result.out)["results"]
    assert row["broken_certificates"] > 0
    assert "certificates are broken" in result.err
    assert "bagcert-broken-1" in result.err
    saved = sorted((tmp_path / "bagcert-broken-1").iterdir())
    assert len(saved) == 3 * row["broken_certificates"]
    assert {path.suffix for path in saved} == {".json", ".png"}


def test_evaluate_brackets_the_robust_accuracy(tmp_path: Path) -> None:
    """`evaluate --attack` gives each row the figures of `attack` with default settings, and keeps its own."""
    asked = ("digits", "--data", "digits", "--limit", 3, "--device", "cpu", "--patch", "1", "--patch", "2", "--json")
    plain = json.loads(run("evaluate", *asked).out)
    out = tmp_path / "both.json"
    result = run("evaluate", *asked, "--attack", "--out", out)
    assert (result.code, result.err) == (0, "")
    document = json.loads(result.out)
    assert json.loads(out.read_text()) == document
    attacked = json.loads(run("attack", *asked).out)
    assert document["attack"] == {**attacked["attack"], "seed": 0}
    assert "attack" not in plain
    for row, without, figures in zip(document["results"], plain["results"], attacked["results"], strict=True):
        assert {**without, "seconds": 0} == {name: {**row, "seconds": 0}[name] for name in without}
        assert {**figures, **row} == {**row, **figures}  # they agree on every figure both have
        assert row["certified_accuracy"] <= row["attacked_accuracy"] <= row["clean_accuracy"]
        assert row["certified_attempts"] > 0


def test_evaluate_broken_certificate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lying_vote: None) -> None:
    monkeypatch.chdir(tmp_path)
    asked = ("digits", "--data", "digits", "--limit", 2, "--device", "cpu", "--rule", "vote", "--patch", "4")
    result = run("evaluate", *asked, "--attack")
    assert result.code == 4
    assert "attacked" in result.out
    assert "certificates are broken" in result.err
    assert list((tmp_path / "bagcert-broken-1").iterdir())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--attack", "gradint"), ("unknown attack 'gradint'", "did you mean gradient?")),
        (("--attacked-placements", "few"), ("--attacked-placements", "at least 1, or all", "'few'")),
        (("--attacked-placements", "0"), ("--attacked-placements", "'0'")),
        (("--rule", "votes"), ("unknown rule 'votes'",)),
        (("--patch", "9"), ("9x9 px does not fit into an image of 8x8 px",)),
        (("--out", "figures.txt"), ("must be a .json file", "figures.txt")),
        (("--records", "records.json"), ("must be a .jsonl file", "records.json")),
        (("--steps", "0"), ("--steps",)),
    ],
)
def test_mistakes_are_one_sentence(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    check_mistake(run("attack", *QUICK[:3], *arguments), 2, *words)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    for name in "0123456789":
        (tmp_path / "test" / name).mkdir(parents=True)
        Image.fromarray(np.zeros((9, 8, 3), dtype=np.uint8)).save(tmp_path / "test" / name / "a.png")
    result = run("attack", "digits", "--data", tmp_path, "--device", "cpu")
    check_mistake(result, 2, "9x8 px", "the network's 8x8 px", "a.png")


def test_a_folder_was_expected(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_mistake(run("attack", *QUICK, "--save", tmp_path / "file"), 2, "--save needs a folder", "file")
