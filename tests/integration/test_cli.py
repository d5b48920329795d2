"""The command line: what it prints, where, and how it exits."""

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import typer.main
from PIL import Image

import bagcert
import bagcert.bulk.files
from bagcert import cli
from bagcert.training.recipe import load_recipe
from tests import tiny
from tests.command import Result, check_mistake, run

COMMANDS = ("demo", "train", "evaluate", "report", "compare", "benchmark", "certify", "attack", "verify", "export")
COMMANDS += ("page", "push", "doctor", "info")

RECIPE = """
name = "tiny"
model = { architecture = "resnet-rf3", width = 8, depth = 1 }
defense = { rule = "vote", patch = "2" }
augment = { crop = 1 }
train = { epochs = 2, batch_size = 8, ema = 0.5, precision = "fp32" }
"""


def start(*arguments: object, stdout: int = subprocess.PIPE, **environment: str) -> Result:
    """`python -m bagcert` with these arguments, in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-m", "bagcert", *map(str, arguments)],
        env={**os.environ, **environment},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=120,
        check=False,
    )
    return Result(found.returncode, found.stdout or "", found.stderr)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of photos, a recipe, and a model trained by it."""
    folder = tmp_path_factory.mktemp("cli")
    for split, count in (("train", 20), ("test", 4)):
        for label, name in enumerate(tiny.COLORS):
            (folder / "data" / split / name).mkdir(parents=True)
            for i, pixels in enumerate(tiny.pixels(np.full(count, label), tint=150, seed=label)):
                Image.fromarray(pixels).save(folder / "data" / split / name / f"{i:02}.png")
    (folder / "tiny.toml").write_text(RECIPE)
    arguments = ("train", folder / "tiny.toml", "--data", folder / "data", "--out", folder / "model", "--device", "cpu")
    trained = run(*arguments)
    assert trained.code == 0, trained
    assert trained.out == (
        f"The model is in {folder / 'model'}. "
        f"To evaluate: bagcert evaluate {folder / 'model'} --data {folder / 'data'}\n"
    )
    epochs = [line.split(":")[0] for line in trained.err.splitlines() if line.startswith("epoch ")]
    assert epochs == ["epoch 1/2", "epoch 2/2"]
    return folder


@pytest.fixture
def photo(home: Path) -> Path:
    return home / "data" / "test" / "red" / "00.png"


# Help


@pytest.mark.parametrize("width", ["40", "80", "200"])
@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_every_option(command: str, width: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setenv("TERMINAL_WIDTH", width)
    result = run(command, "--help")
    assert (result.code, result.err) == (0, "")
    known = typer.main.get_command(cli.app).commands[command]  # type: ignore[attr-defined]
    for parameter in known.params:
        for option in parameter.opts if parameter.param_type_name == "option" else ():
            assert option in result.out
    assert known.help.split()[0] in result.out


@pytest.mark.parametrize("arguments", [(), ("--help",)])
def test_help_lists_the_commands_and_the_exit_codes(arguments: tuple[str, ...]) -> None:
    result = run(*arguments)
    assert (result.code, result.err) == (0, "")
    for command in COMMANDS:
        assert command in result.out
    assert "Exit codes: 0 success, 1 error, 2 usage error, 3" in result.out


def test_the_version_is_printed() -> None:
    assert run("--version") == Result(0, f"bagcert {bagcert.__version__}\n", "")


def test_nothing_heavy_is_imported_before_a_command_runs() -> None:
    heavy = ["torch", "numpy", "datasets", "accelerate", "pyarrow", "PIL", "pydantic", "huggingface_hub"]
    code = f"import bagcert.cli, sys; print([name for name in {heavy} if name in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


# Mistakes


@pytest.mark.parametrize(
    "arguments",
    [
        ("evaluat",),
        ("--nothing",),
        ("evaluate",),
        ("evaluate", "model"),
        ("evaluate", "model", "--data", "digits", "--nothing"),
        ("evaluate", "model", "--data", "digits", "--limit", "0"),
        ("evaluate", "model", "--data", "digits", "--limit", "many"),
        ("evaluate", "model", "--data", "digits", "--repeat", "0"),
        ("evaluate", "model", "--data", "digits", "--fail-under-certified", "40"),
        ("evaluate", "model", "--data"),
        ("certify",),
        ("train",),
        ("info", "a", "b"),
    ],
    ids=" ".join,
)
def test_a_mistyped_command_line_is_one_sentence(arguments: tuple[str, ...]) -> None:
    check_mistake(run(*arguments), 2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--patch", "five"), ["'five'", "5, 2x8"]),
        (("--patch", "0"), ["at least 1x1 px, got 0x0"]),
        (("--patch", "9"), ["9x9 px does not fit into an image of 8x8 px"]),
        (("--patch", "2", "--patch", "2x"), ["'2x'"]),
        (("--rule", "votes"), ["'votes'", "did you mean vote"]),
        (("--fit", "stretch"), ["'stretch'", "squash or center-crop"]),
        (("--device", "gpu"), ["'gpu'"]),
        (("--device", "cuda:99"), ["'cuda:99'"]),
        (("--dtype", "float16"), ["'float16'", "bfloat16"]),
    ],
)
def test_evaluate_and_certify_refused(options: tuple[str, ...], words: list[str], home: Path, photo: Path) -> None:
    check_mistake(run("evaluate", home / "model", "--data", home / "data", *options), 2, *words)
    check_mistake(run("certify", photo, "--model", home / "model", *options), 2, *words)


def test_evaluate_data_refused(home: Path, tmp_path: Path) -> None:
    evaluate = ("evaluate", home / "model", "--data")
    check_mistake(run(*evaluate, "digit"), 2, "did you mean digits")
    check_mistake(run(*evaluate, tmp_path / "missing"), 2, "missing")
    check_mistake(run(*evaluate, home / "data", "--split", "validation"), 2, "'validation'", "train")
    check_mistake(run(*evaluate, tmp_path), 5, "no class folders")
    (tmp_path / "pink").mkdir()
    (tmp_path / "pink" / "a.png").write_bytes((home / "data" / "test" / "red" / "00.png").read_bytes())
    check_mistake(run(*evaluate, tmp_path), 2, "'pink'", "does not know")
    (tmp_path / "pink").rename(tmp_path / "red")
    (tmp_path / "red" / "a.png").write_bytes(b"no image")
    check_mistake(run(*evaluate, tmp_path), 5, "a.png", "no image of")


def test_evaluate_leaves_bad_files_out(home: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "red").mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / "red" / name).write_bytes(photo.read_bytes())
    (tmp_path / "red" / "b.png").write_bytes(photo.read_bytes()[:60])
    result = run("evaluate", home / "model", "--data", tmp_path, "--json")
    assert result.code == 5
    assert (json.loads(result.out)["images"], json.loads(result.out)["unreadable"]) == (2, 1)
    warning, error = result.err.splitlines()
    assert warning.startswith("Warning: ")
    assert str(tmp_path / "red" / "b.png") in warning
    assert error.startswith("Error: 1 ")


@pytest.mark.parametrize("command", [("evaluate", "--data", "digits"), ("certify", "x.png", "--model"), ("info",)])
def test_an_unknown_model_is_told(command: tuple[str, ...]) -> None:
    check_mistake(run(*command, "defalt"), 2, "'defalt'", "did you mean default")


def test_a_damaged_model_is_told(home: Path, tmp_path: Path) -> None:
    check_mistake(run("info", tmp_path), 5, "config.json")
    (tmp_path / "config.json").write_bytes((home / "model" / "config.json").read_bytes())
    check_mistake(run("info", tmp_path), 5, "model.safetensors")
    weights = (home / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[:-100])
    check_mistake(run("evaluate", tmp_path, "--data", "digits"), 5, "model.safetensors")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("digit",), 2, ["'digit'", "did you mean digits"]),
        (("missing.toml",), 5, ["missing.toml"]),
        (("digits", "--set", "train.epoch=3"), 2, ["did you mean train.epochs"]),
        (("digits", "--set", "train.epochs=0"), 2, ["train.epochs"]),
        (("digits", "--set", "train.epochs"), 2, ["section.key=value"]),
        (("digits", "--device", "gpu", "--out", "run"), 2, ["'gpu'"]),
        (("digits", "--init", "defalt", "--out", "run"), 2, ["'defalt'"]),
        (("digits", "--data", "digit", "--out", "run"), 2, ["did you mean digits"]),
        (("digits", "--resume", "--out", "run"), 2, ["no unfinished run"]),
        (("digits", "--set", "defense.patch=five", "--out", "run"), 2, ["'five'"]),
        (("digits", "--limit", "1", "--out", "run"), 2, ["1 images"]),
    ],
)
def test_train_refused(
    arguments: tuple[str, ...], code: int, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    check_mistake(run("train", *arguments), code, *words)
    assert not list(tmp_path.iterdir())


def test_recipe_refused(home: Path, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("name: r")
    check_mistake(run("train", tmp_path / "r.toml"), 5, "not valid TOML")
    (tmp_path / "file").write_text("")
    train = ("train", home / "tiny.toml", "--data", home / "data", "--out")
    check_mistake(run(*train, tmp_path / "file"), 1, "cannot be written")


# Output


def test_outputs_refused(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bagcert.evaluation.evaluate.evaluate", None)  # whoever calls it fails
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.json").mkdir()
    evaluate = ("evaluate", home / "model", "--data", home / "data", "--out")
    check_mistake(run(*evaluate, tmp_path / "file" / "r.json"), 1, "cannot be written")
    check_mistake(run(*evaluate, tmp_path), 2, "is a folder")
    check_mistake(run(*evaluate, tmp_path / "folder.json"), 2, "is a folder")
    check_mistake(run(*evaluate, tmp_path / "r.txt"), 2, "must be a .json file")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder.json"]


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*arguments: object) -> None:
        raise error

    return fail


def test_full_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full = failing(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "some/file"))
    monkeypatch.setattr(bagcert.bulk.files, "image_files", full)
    check_mistake(run("certify", "x.png"), 1, "some/file: No space left on device")
    monkeypatch.setattr("os.fsync", full)
    out = tmp_path / "r.json"
    check_mistake(run("evaluate", home / "model", "--data", home / "data", "--out", out), 1, "No space left")
    trained = run("train", home / "tiny.toml", "--data", home / "data", "--out", tmp_path)
    assert (trained.code, trained.out) == (1, "")
    assert re.fullmatch("Error: .*No space left on device", trained.err.splitlines()[-1])
    assert [path.name for path in tmp_path.iterdir()] == ["r.records.jsonl.partial"]  # for --resume


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_stdout_that_is_full_is_one_sentence() -> None:
    with open("/dev/full", "w") as full:
        check_mistake(start("--version", stdout=full.fileno()), 1, "No space left on device")


def test_a_reader_that_goes_away_is_no_error_to_speak_of() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    result = start("--help", stdout=writing)
    os.close(writing)
    assert (result.code, result.err) == (1, "")


def test_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bagcert.bulk.files, "image_files", failing(KeyboardInterrupt()))
    result = run("certify", "x.png")
    assert (result.code, result.out) == (1, "")
    assert result.err.strip() == "Error: interrupted"


def test_mistake_in_the_program_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bagcert.bulk.files, "image_files", failing(ZeroDivisionError()))
    monkeypatch.setattr(sys, "argv", ["bagcert", "certify", "x.png"])
    with pytest.raises(ZeroDivisionError):
        cli.main()


# train, evaluate, certify, info


def test_train_prints_the_recipe_it_would_use(home: Path, tmp_path: Path) -> None:
    result = run("train", home / "tiny.toml", "--set", "train.epochs=7", "--set", "defense.patch=2x3", "--print-recipe")
    assert (result.code, result.err) == (0, "")
    (tmp_path / "printed.toml").write_text(result.out)
    expected = load_recipe(str(home / "tiny.toml"), ["train.epochs=7", "defense.patch=2x3"])
    assert load_recipe(str(tmp_path / "printed.toml")) == expected


def test_train_init(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = ("--init", home / "model", "--set", "train.epochs=1", "--limit", "50", "--device", "cpu")
    result = run("train", home / "tiny.toml", "--data", home / "data", *options)
    assert result.code == 0, result
    assert result.out.startswith("The model is in runs/tiny. ")
    assert (tmp_path / "runs" / "tiny" / "model.safetensors").exists()


def _evaluate(home: Path, *options: object) -> Result:
    return run("evaluate", home / "model", "--data", home / "data", "--device", "cpu", *options)


def test_evaluate_prints_json_alone_on_stdout(home: Path, tmp_path: Path) -> None:
    patches = ("--patch", "1", "--patch", "2x3", "--rule", "vote", "--rule", "double-masking")
    result = _evaluate(home, "--json", "--out", tmp_path / "r.json", *patches)
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert (found["model"], found["images"], found["split"], found["limit"]) == ("tiny", 12, "test", None)
    rows = [(row["patch"], row["rule"]) for row in found["results"]]
    assert rows == [([1, 1], "vote"), ([1, 1], "double-masking"), ([2, 3], "vote"), ([2, 3], "double-masking")]
    assert json.loads((tmp_path / "r.json").read_text()) == found
    assert len((tmp_path / "r.records.jsonl").read_text().splitlines()) == 12


def test_evaluate_prints_a_table(home: Path) -> None:
    result = _evaluate(home, "--limit", "5", "--batch-size", "2", "--repeat", "2", "--dtype", "bfloat16")
    assert (result.code, result.err) == (0, "")
    for word in ("tiny on", "5 images", "patch", "vote", "clean", "certified", "forward pass", "bfloat16"):
        assert word in result.out
    assert max(len(line) for line in result.out.splitlines() if not line.startswith("note: ")) <= 120


def test_a_bar_that_is_not_met_exits_with_3(home: Path) -> None:
    met = _evaluate(home, "--patch", "1", "--fail-under-certified", "0")
    assert (met.code, met.err) == (0, "")
    missed = _evaluate(home, "--patch", "1", "--patch", "8", "--fail-under-certified", "0.9", "--json")
    assert missed.code == 3
    assert len(json.loads(missed.out)["results"]) == 2
    assert len(missed.err.splitlines()) == 1
    assert "below the threshold of 0.9" in missed.err


@pytest.fixture
def mixed(home: Path, photo: Path, tmp_path: Path) -> Path:
    """A folder of two photos and a truncated one, with a name that looks like markup."""
    folder = tmp_path / "[bold]photos"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.png").write_bytes(photo.read_bytes())
    (folder / "b.png").write_bytes(photo.read_bytes()[:60])
    Image.new("L", (30, 20), 90).save(folder / "deep" / "c[:x:].jpg")
    return folder


def test_certify_leaves_bad_files_out(home: Path, mixed: Path) -> None:
    result = run("certify", mixed, mixed / "missing.png", "--model", home / "model", "--patch", "2", "--json")
    assert result.code == 5
    found = json.loads(result.out)
    assert found["images"] == 2
    sources = [verdict["source"] for verdict in found["results"]]
    assert sources == [str(mixed / "a.png"), str(mixed / "deep" / "c[:x:].jpg")]
    assert [verdict["size_px"] for verdict in found["results"]] == [[8, 8], [20, 30]]
    for verdict in found["results"]:
        assert verdict["class_name"] == sorted(tiny.COLORS)[verdict["prediction"]]
        assert verdict["largest_certifiable_px"] >= 0
        assert verdict["results"][0]["patch"] == [2, 2]
    assert [error["source"] for error in found["errors"]] == [str(mixed / "b.png"), str(mixed / "missing.png")]
    lines = result.err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Warning", "Warning", "Error"]
    assert str(mixed / "b.png") in lines[0]
    assert lines[2] == "Error: 2 of 4 inputs could not be certified"


def test_certify_prints_a_table(home: Path, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(mixed.parent)
    result = run("certify", mixed.name, "--model", home / "model", "--patch", "1", "--patch", "2x3")
    assert result.code == 5
    for word in ("[bold]photos/a.png", "8x8", "2x3", "c[:x:].jpg"):
        assert word in result.out


def test_certify_without_a_readable_image(home: Path, tmp_path: Path) -> None:
    certify = ("certify", "--model", home / "model")
    check_mistake(run(*certify, tmp_path), 5, "holds no images")
    result = run(*certify, tmp_path / "missing.png")
    assert (result.code, result.out) == (5, "")
    assert result.err.splitlines()[-1] == "Error: 1 of 1 inputs could not be certified"


def test_info_describes_a_model(home: Path) -> None:
    result = run("info", home / "model", "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    expected = {
        "name": "tiny",
        "architecture": "resnet-rf3",
        "image_size_px": [8, 8],
        "receptive_field_px": [3, 3],
        "stride_px": 1,
        "region_grid": [8, 8],
        "classes": 3,
        "class_names": sorted(tiny.COLORS),
        "rule": "vote",
        "patch": "2",
        "results": [],
    }
    assert {key: found[key] for key in expected} == expected
    width = 8
    parameters = 3 * 9 * width + 2 * width + 2 * (width * width + 2 * width) + width * 3 + 3
    assert found["parameters"] == parameters
    assert found["multiply_adds"] == 64 * (3 * 9 * width + 2 * width * width + width * 3)
    assert found["recipe"]["train"]["epochs"] == 2
    assert found["provenance"]["training_images"] == 54
    text = run("info", home / "model")
    assert (text.code, text.err) == (0, "")
    assert "resnet-rf3" in text.out


def test_info_shows_what_was_measured(home: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((home / "model" / name).read_bytes())
    assert _evaluate(home, "--out", tmp_path / "results.json").code == 0
    (row,) = json.loads(run("info", tmp_path, "--json").out)["results"]
    assert (row["images"], row["split"], row["threat"]) == (12, "test", "2")
    assert "measured" in run("info", tmp_path).out
    (tmp_path / "results.json").write_text("[]")
    check_mistake(run("info", tmp_path), 5, "results.json")


def test_info_lists_what_is_there() -> None:
    found = json.loads(run("info", "--json").out)
    assert {"digits", "cifar10-cpu"} <= set(found["recipes"])
    assert "resnet-rf8s2" in found["architectures"]
    assert "patchcleanser" in found["defenses"]
    assert "double-masking" in found["rules"]
    text = run("info")
    assert (text.code, text.err) == (0, "")
    for kind in ("models", "recipes", "architectures", "defenses", "rules"):
        assert all(name in text.out for name in found[kind])


# In a process of its own


def test_no_color(home: Path, tmp_path: Path) -> None:
    colored = start("train", "digit", FORCE_COLOR="1", NO_COLOR="")
    assert colored.code == 2
    assert "\x1b[1;31m" in colored.err
    plain = start("train", "digit", FORCE_COLOR="1", NO_COLOR="1")
    assert plain.code == 2
    assert "[31m" not in plain.err
    assert "Traceback" not in plain.err
    result = start("info", home / "model", "--json", FORCE_COLOR="1", NO_COLOR="")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out)["name"] == "tiny"
