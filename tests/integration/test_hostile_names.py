"""Names that would move the cursor or color the terminal, in all that a stranger can hand over, to every command."""

import json
import os
import shutil
import subprocess
import sys
import warnings
from dataclasses import asdict, fields
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import pytest
from PIL import Image

from bagcert.attacks.evaluate import AttackInfo, AttackRow
from bagcert.defenses.bagcert import shipped_models
from bagcert.evaluation.benchmark import BenchmarkRow
from bagcert.locality.report import LocalityReport, Probe
from bagcert.proofs.lines import from_line, seal, to_line
from bagcert.records import ImageRecord, Record
from tests import tiny
from tests.command import Result, run
from tests.contracts.test_printing import MOVES

NAME = "\x1b[2J\x1b]0;title\x07 \u202e[red]yes"  # as a file may be called
TEXT = NAME + "[/x]\n\x9b1m\r"  # as a text may be


def check(result: Result, *codes: int) -> Result:
    """Ended in a sentence or a table, and nothing in it moves the cursor."""
    assert result.code in (codes or (0,)), result
    assert not MOVES.search(result.out + result.err), result
    return result


def hostile(kind: type, /, **values: Any) -> Any:
    """An instance whose texts are all hostile."""
    simple = {str: TEXT, int: 1, float: 0.5, bool: True}
    hints = get_type_hints(kind)
    chosen = {each.name: simple[hints[each.name]] for each in fields(kind) if hints[each.name] in simple and each.init}
    return kind(**{**chosen, **values})


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos") / NAME
    folder.mkdir()
    for label in range(2):
        pixels = tiny.pixels(np.array([label]), tint=150)[0]
        Image.fromarray(pixels).save(folder / f"{NAME}{label}.png")
    (folder / f"{NAME}bad.png").write_bytes(b"no image")
    return folder


def test_certify(photos: Path, tmp_path: Path) -> None:
    record, picture = tmp_path / f"{NAME}.jsonl", tmp_path / f"{NAME}.png"
    certify = ("certify", photos, "--model", "digits", "--patch", "2")
    found = check(run(*certify, "--record", record), 5)
    assert "[red]yes0.png" in found.out.replace("│", "").replace(" ", "").replace("\n", "")
    assert "Warning: " in found.err
    check(run(*certify, "--record", record, "--resume"), 5)
    check(run(*certify, "--record", record), 2)
    check(run(*certify, "--json"), 5)
    check(run("certify", photos / f"{NAME}0.png", "--model", "digits", "--explain", picture))
    check(run("verify", record))
    check(run("verify", record, "--model", "digits"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("certify", TEXT),
        ("certify", "x.png", "--patch", TEXT),
        ("certify", "x.png", "--rule", TEXT),
        ("certify", "x.png", "--model", TEXT),
        ("certify", "x.png", "--placements", TEXT),
        ("certify", "--data", NAME, "--out", NAME, "--model", "digits"),
        ("evaluate", TEXT, "--data", "digits"),
        ("evaluate", "digits", "--data", TEXT),
        ("evaluate", "digits", "--data", "digits", "--out", TEXT),
        ("attack", "digits", "--data", TEXT),
        ("attack", "digits", "--data", "digits", "--attack", TEXT),
        ("benchmark", "--data", TEXT, "--out", "o"),
        ("benchmark", "--quick", "--defenses", TEXT, "--out", "o"),
        ("compare", TEXT, TEXT),
        ("verify", TEXT),
        ("export", TEXT, "--out", "x.onnx"),
        ("export", "digits", "--out", TEXT),
        ("doctor", TEXT),
        ("doctor", "digits", "--onnx", TEXT),
        ("info", TEXT),
        ("page", TEXT),
        ("push", "digits", TEXT),
        ("report", TEXT),
        ("train", TEXT),
        ("train", "digits", "--set", TEXT),
        ("train", "digits", "--set", f'name="{NAME}"'),
        (TEXT,),
        ("info", f"--{TEXT}"),
    ],
    ids=lambda arguments: " ".join(str(word) for word in arguments if word not in (TEXT, NAME))[:40],
)
def test_mistakes_quoted(arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = check(run(*arguments), 1, 2, 5)
    assert "Traceback" not in found.err
    assert [line.split(":")[0] for line in found.err.splitlines()] in (["Error"], ["Warning", "Error"])


def test_evaluate_and_attack(tmp_path: Path) -> None:
    for digit in range(10):
        (tmp_path / NAME / str(digit)).mkdir(parents=True)
        pixels = np.full((8, 8, 3), 20 * digit, np.uint8)
        Image.fromarray(pixels).save(tmp_path / NAME / str(digit) / f"{NAME}.png")
    (tmp_path / NAME / "3" / f"{NAME}bad.png").write_bytes(b"no image")
    out = tmp_path / f"{NAME}.json"
    check(run("evaluate", "digits", "--data", tmp_path / NAME, "--patch", "2", "--out", out), 5)
    few = ("--limit", 3, "--attack", "random", "--attacked-placements", "1")
    check(run("attack", "digits", "--data", tmp_path / NAME, "--patch", "2", *few))
    check(run("report", out, "--out", tmp_path / f"{NAME}.html"))


def test_certify_many(photos: Path, tmp_path: Path) -> None:
    shutil.copyfile(photos / f"{NAME}0.png", tmp_path / "a.png")
    many = ("certify", "--data", tmp_path / "a.png", "--out", tmp_path / NAME, "--model", "digits")
    check(run(*many))
    check(run(*many, "--patch", "1"), 2)


def test_compare_reads_no_markup_in_a_rule(tmp_path: Path) -> None:
    def write(path: Path, certified: bool) -> Path:
        result = Record(TEXT, [2, 2], TEXT, 0, certified, 1, [0, 0, 2, 2])
        path.write_text("".join(ImageRecord(index, 0, [result]).to_json() + "\n" for index in range(3)))
        return path

    first, second = (write(tmp_path / f"{n}.records.jsonl", bool(n)) for n in range(2))
    found = check(run("compare", first, second))
    assert "[red]yes[/x]" in found.out
    check(run("compare", first, second, "--rule", TEXT + "x"), 2)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The digits model, as a stranger may hand it on."""
    folder = tmp_path / f"model{NAME}"
    shutil.copytree(shipped_models()["digits"], folder)
    config = json.loads((folder / "config.json").read_text())
    config["provenance"] = {TEXT: {TEXT: [TEXT]}}
    (folder / "config.json").write_text(json.dumps(config))
    results = json.loads((folder / "results.json").read_text())
    results |= {"data": TEXT, "split": TEXT, "model": TEXT}
    for row in results["results"]:
        row |= {"rule": TEXT, "threat": TEXT}
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def test_info_and_push(model: Path, tmp_path: Path) -> None:
    found = check(run("info", model))
    assert "[red]yes[/x]" in found.out
    check(run("info", model, "--json"))
    check(run("push", model, "me/model", "--dry-run", tmp_path / f"out{NAME}"))


@pytest.mark.parametrize("change", [{"results": 3}, {"results": [{"rule": 1}]}, {"images": TEXT}, {"data": []}])
def test_results_of_another_form_are_one_sentence(change: dict[str, Any], model: Path) -> None:
    results = json.loads((model / "results.json").read_text())
    (model / "results.json").write_text(json.dumps({**results, **change}))
    found = check(run("info", model), 5)
    assert "results.json is not the JSON of an evaluation" in found.err
    for name in ("clean_accuracy", "threat"):
        broken = json.loads(json.dumps(results))
        broken["results"][0][name] = {TEXT: TEXT}
        (model / "results.json").write_text(json.dumps(broken))
        check(run("info", model), 5)


def test_verify(photos: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    assert run("certify", photos / f"{NAME}0.png", "--model", "digits", "--record", path).code == 0
    record = from_line(path.read_bytes())
    for changes in (
        {"source": TEXT},
        {"rule": TEXT},
        {"threat": {**record["threat"], "notation": TEXT}},
        {"model": {**record["model"], "name": TEXT, "weights_sha256": TEXT}},
        {"environment": {**record["environment"], "dtype": TEXT}},
        {"network": {**record["network"], "fit": TEXT}},
        {"image": {**record["image"], "pixels_sha256": TEXT}},
    ):
        path.write_bytes(to_line(seal({**record, **changes})))
        check(run("verify", path), 0, 4, 5)
        check(run("verify", path, "--model", "digits", "--images", tmp_path), 4, 5)


def test_tables_of_long_commands(capsys: pytest.CaptureFixture[str]) -> None:
    """Their figures take minutes to measure, so they are made up."""
    speeds, passes = {"predict": 1.0, "certify": 2.0}, {"predict": 1, "certify": 2}
    facts = {"limit": 1, "subset_seed": 1, "interval95": {}, "versions": {}}
    row = hostile(BenchmarkRow, **facts, forward_passes=passes, images_per_second=speeds)
    assert asdict(row)["defense"] == TEXT
    import_module("bagcert.cli.benchmark")._print([row])
    probe = hostile(Probe, kind="leak")
    report = hostile(
        LocalityReport, footprint="equal", probes=(probe,), image_size=(8, 8), patches=((2, 2),), activation_bound=None
    )
    cost = {"guard": TEXT, "tolerance_z": 0.1, "certified_accuracy": 0.5, "certified_accuracy_lost": 0.1}
    import_module("bagcert.cli.doctor")._print(report, [{**cost, "threat": TEXT, "rule": TEXT, "images": 3}])
    attack = hostile(AttackRow, patch=None)
    seconds = {"total": 1.0}
    info = hostile(AttackInfo, limit=None, versions={}, seconds=seconds, attack={"attacks": [TEXT]}, results=[attack])
    import_module("bagcert.cli.attack")._print(info)
    about = {"model": TEXT, "rule": TEXT, "patch": TEXT, "quantization": TEXT}
    compared = SimpleNamespace(maps=1, images=1, same_verdicts=1, scores_moved=0.1)
    accuracy = {name: {"clean_accuracy": 1.0, "certified_accuracy": 0.5} for name in ("float32", "int8")}
    accuracy |= {"images": 1, "calibration_images": 1}
    found = SimpleNamespace(check=compared, metadata=about, files=[TEXT], locality=TEXT, leak_z=0.1, accuracy=accuracy)
    import_module("bagcert.cli.export")._print(found, (8, 8))
    out, err = capsys.readouterr()
    assert out.count("[red]yes[/x]") >= 10
    assert not MOVES.search(out + err)


def test_a_warning_of_a_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(name: str) -> None:
        warnings.warn(TEXT, UserWarning, stacklevel=1)
        raise SystemExit(0)

    monkeypatch.setattr("bagcert.hub.info.describe", describe)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        found = check(run("info", "digits"))
    assert found.err.startswith("Warning: UserWarning: ")
    assert found.err.count("\n") == 1


def test_a_terminal_gets_colors_of_ours_alone(photos: Path) -> None:
    """In a process of its own that is told to color: no sequence comes from a name."""
    command = [sys.executable, "-m", "bagcert", "certify", str(photos / f"{NAME}0.png"), "--model", "digits"]
    colored = {**os.environ, "FORCE_COLOR": "1", "NO_COLOR": ""}
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120, env=colored)
    assert "\x1b[3" in done.stdout
    assert "\x1b[2J" not in done.stdout
    assert "\x07" not in done.stdout
