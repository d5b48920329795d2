"""`bagcert train` on folders of images: without a recipe, for a given time, stopped and resumed."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagcert.nets.saved_model import read_model
from bagcert.training import pace
from bagcert.training.recipe import load_recipe
from tests import tiny
from tests.command import Result, check_mistake, run

SMALL = ("--size", "16", "--patch", "1", "--set", "model.width=16", "--set", "model.depth=1", "--device", "cpu")


def _fill(folder: Path, count: int, size: tuple[int, int] = (18, 17), seed: int = 0) -> None:
    """Class folders of images in groups of four frames: 3_0, 3_1, 3_2, 3_3, 4_0, ..."""
    for label, name in enumerate(tiny.COLORS):
        (folder / name).mkdir(parents=True)
        for i, pixels in enumerate(tiny.pixels(np.full(count, label), size, tint=150, seed=seed + label)):
            Image.fromarray(pixels).save(folder / name / f"{i // 4}_{i % 4}.png")


@pytest.fixture
def images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `my signs` with the parts train and test, in the working folder."""
    monkeypatch.chdir(tmp_path)
    _fill(tmp_path / "my signs" / "train", 20)
    _fill(tmp_path / "my signs" / "test", 4, seed=9)
    return Path("my signs")


def _train(*arguments: object) -> Result:
    result = run("train", *arguments)
    assert result.code == 0, result
    return result


def _epochs(result: Result) -> list[str]:
    return [line.split(":")[0] for line in result.err.splitlines() if line.startswith("epoch ")]


def test_train_folder_without_recipe(images: Path) -> None:
    result = _train(images, *SMALL, "--epochs", "2", "--set", "train.batch_size=16")
    assert "runs/my-signs" in result.out
    assert "54 images of 3 classes, 6 held out" in result.err
    assert _epochs(result) == ["epoch 1/2", "epoch 2/2"]
    line = next(line for line in result.err.splitlines() if line.startswith("epoch 1/2"))
    assert re.fullmatch(r"epoch 1/2: loss \d+\.\d+, clean [\d.]+%, certified [\d.]+%, \d+ s left", line)
    scorer, config = read_model(Path("runs/my-signs"))
    assert (config.name, config.head, config.patch) == ("my-signs", "attention-pooling", "1")
    assert scorer.image_size == (16, 16)
    evaluated = run("evaluate", "runs/my-signs", "--data", images, "--device", "cpu", "--json")
    assert json.loads(evaluated.out)["images"] == 12


@pytest.mark.parametrize(("size", "architecture"), [("32", "pyramid-rf5s3"), ("48x64", "pyramid-rf8s4")])
def test_train_recipe_of_a_folder_follows_the_size(images: Path, size: str, architecture: str, tmp_path: Path) -> None:
    result = _train(images, "--size", size, "--print-recipe")
    (tmp_path / "r.toml").write_text(result.out)
    recipe = load_recipe(str(tmp_path / "r.toml"))
    assert recipe.model.architecture == architecture
    assert recipe.data.name == "my signs"


def test_train_folder_without_parts(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    _fill(tmp_path / "flat", 20)
    result = _train("flat", *SMALL, "--epochs", "1")
    assert "--data OTHER_IMAGES" in result.out
    assert "--data flat" not in result.out


def test_train_holds_out_val(images: Path) -> None:
    _fill(images / "val", 8, seed=5)
    result = _train(images, *SMALL, "--epochs", "1")
    assert "60 images of 3 classes, 24 held out (split val)" in result.err
    assert read_model(Path("runs/my-signs"))[1].provenance["validation"] == "split val"


def test_train_keeps_groups_together(images: Path) -> None:
    result = _train(images, *SMALL, "--epochs", "1", "--groups", "prefix")
    assert "48 images of 3 classes, 12 held out (0.1 of the train images by group" in result.err
    lines = [
        f"{path.parent.name}/{path.name},{int(path.name[0]) // 2}-{path.parent.name}\n"
        for path in sorted((images / "train").rglob("*.png"))
    ]
    Path("groups.csv").write_text("".join(lines))
    few = ("--set", "data.validation=0.2")
    result = _train(images, *SMALL, "--epochs", "1", "--groups", "groups.csv", *few, "--out", "other")
    assert "48 images of 3 classes, 12 held out" in result.err
    Path("groups.csv").write_text("".join(lines[:-1]))
    options = (images, *SMALL, "--groups")
    assert "no line for the image" in run("train", *options, "groups.csv", "--out", "third").err
    few = ("--set", "data.validation=0.01")
    assert "needs at least two groups" in run("train", *options, "prefix", "--out", "x", *few).err


def test_train_class_names(images: Path) -> None:
    Path("names").write_text("red: stop sign\ngreen\tgo\n\n")
    _train(images, *SMALL, "--epochs", "1", "--class-names", "names")
    assert read_model(Path("runs/my-signs"))[1].class_names == ["blue", "go", "stop sign"]
    evaluate = ("evaluate", "runs/my-signs", "--data", images, "--device", "cpu", "--json")
    by_folder = json.loads(run(*evaluate).out)["results"]
    (images / "classes.txt").write_text("red: stop sign\ngreen: go\n")
    by_name = json.loads(run(*evaluate).out)["results"]
    assert by_name[0]["clean_accuracy"] == by_folder[0]["clean_accuracy"]
    _train(images, *SMALL, "--epochs", "1", "--out", "again")
    assert read_model(Path("again"))[1].class_names == ["blue", "go", "stop sign"]
    for text, words in {"pink: x\n": "line 1 of names", "red: a\ngreen: a\n": "two classes", "red\n": "line 1"}.items():
        Path("names").write_text(text)
        check_mistake(run("train", images, *SMALL, "--class-names", "names", "--out", "x"), 2, words)


def test_train_minutes(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pace, "MEASURED_SECONDS", 0.0)
    monkeypatch.setattr(pace.Pace, "epochs", lambda self, seconds: 3 if 0 < seconds < 6 else 1)
    result = _train(images, *SMALL, "--minutes", "0.1")
    assert "training for 3 epochs to fit into 0.1 minutes" in result.err
    assert load_recipe("runs/my-signs/recipe.toml").train.epochs == 3
    _train(images, *SMALL, "--epochs", "3", "--out", "same")
    weights = [(Path(run_) / "model.safetensors").read_bytes() for run_ in ("runs/my-signs", "same")]
    assert weights[0] == weights[1], "the measurement leaves no trace"


def test_train_resumes_by_run_folder_and_extends(images: Path) -> None:
    held = ("--set", "optimizer.decay=0.5", "--set", "optimizer.warmup_steps=1")
    _train(images, *SMALL, *held, "--epochs", "2")
    check_mistake(run("train", "runs/my-signs"), 2, "is a run folder", "--resume")
    check_mistake(run("train", "--resume", "runs/my-signs"), 2, "no unfinished run")
    by_folder, by_images = ("--resume", "runs/my-signs"), (images, "--resume")
    by_out = ("--out", "runs/my-signs", "--resume")
    for epochs, resume in {4: by_folder, 6: by_images, 8: by_out}.items():
        result = _train(*resume, "--epochs", epochs, "--device", "cpu")
        assert _epochs(result)[-1] == f"epoch {epochs}/{epochs}"
        assert load_recipe("runs/my-signs/recipe.toml").train.epochs == epochs
    _train(images, *SMALL, *held, "--epochs", "8", "--out", "same")
    weights = [(Path(run_) / "model.safetensors").read_bytes() for run_ in ("runs/my-signs", "same")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--size", "16", "--patch", "14"), ["could ever be certified", "squares of up to"]),
        (("--epochs", "2", "--minutes", "1"), ["--epochs and --minutes cannot be combined"]),
        (("--size", "large"), ["a size is a side in px"]),
    ],
)
def test_train_refuses_before_the_first_step(images: Path, options: tuple, words: list[str]) -> None:
    result = run("train", images, "--device", "cpu", *options)
    assert result.code == 2
    error = result.err.splitlines()[-1]
    assert all(word in error for word in words)
    assert not Path("runs").exists()


def test_train_refuses_one_class_and_nothing(images: Path) -> None:
    (images / "train" / "red").rename("only")
    Path("one").mkdir()
    Path("only").rename("one/only")
    check_mistake(run("train", "one", "--device", "cpu"), 5, "one class", "'only'", "at least two")
    check_mistake(run("train"), 2, "needs a recipe, or a folder of images")
    check_mistake(run("train", "nowhere"), 2, "no recipe, file or folder 'nowhere'")
