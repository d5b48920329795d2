"""Two processes over gloo train what one does, stop together, and take over from each other."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bagcert.data.image_set import ImageSet
from bagcert.errors import BagcertError
from bagcert.training.loop import train
from bagcert.training.recipe import Recipe, load_recipe
from tests import many, tiny

ROOT = Path(__file__).resolve().parents[2]


def launched(*arguments: str) -> subprocess.Popen:
    """Two processes that meet on this machine, at a port that is free."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    return subprocess.Popen(
        [*torchrun, "--nproc-per-node", "2", "-m", *arguments],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'src'}{os.pathsep}{ROOT}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alone(recipe: Recipe, folder: Path, images: ImageSet | None = None, **options: object) -> Path:
    return train(recipe, folder, images or many.unbalanced(), device="cpu", **options)  # type: ignore[arg-type]


def difference(one: Path, two: Path) -> float:
    """The largest between the shipped weights and batch statistics of two runs."""
    first, second = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert first.keys() == second.keys()
    assert any("running_var" in name for name in first) or "bounds" in str(two)  # whose network has no batch norm
    return max((first[name].double() - second[name].double()).abs().max().item() for name in first)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made, see `tests/many.py`."""
    folder = tmp_path_factory.mktemp("together")
    with pytest.raises(BagcertError, match="interrupted at step 5 "):
        alone(tiny.recipe(), folder / "begun by one", on_progress=many.stop_after(4))
    process = launched("tests.many", str(folder))
    output = process.communicate(timeout=280)
    assert process.returncode == 0, output[1]
    return folder


@pytest.mark.parametrize("name", many.WHOLE)
def test_two_processes_train_what_one_does(name: str, together: Path, tmp_path: Path) -> None:
    one = alone(tiny.recipe(**many.WHOLE[name]), tmp_path / "one")
    # Muon computes in bfloat16, in which what is rounded otherwise moves by more.
    assert difference(one, together / name) < (1e-2 if name == "muon" else 2e-5)
    metrics = [json.loads((run / "metrics.jsonl").read_text().splitlines()[-1]) for run in (one, together / name)]
    assert metrics[0]["loss"] == pytest.approx(metrics[1]["loss"], rel=1e-2 if name == "muon" else 1e-4)
    config = json.loads((together / name / "config.json").read_text())
    assert config["provenance"]["processes"] == 2


def test_another_order_moves_weights_far_more(tmp_path: Path) -> None:
    one, other = (alone(tiny.recipe(train__seed=seed), tmp_path / str(seed)) for seed in (0, 1))
    assert difference(one, other) > 0.1


@pytest.mark.parametrize("name", many.STOPPED)
def test_what_two_processes_left_one_finishes(name: str, together: Path, tmp_path: Path) -> None:
    told = [json.loads((together / f"told-{index}.json").read_text()) for index in (0, 1)]
    assert told[0] == told[1]
    assert f"interrupted at step {many.STOPPED_AFTER + 1} of" in told[0][name]
    recipe = tiny.recipe(**many.STOPPED[name])
    folder = alone(recipe, together / f"stopped {name}", resume=True)
    assert difference(folder, alone(recipe, tmp_path / "whole")) < 2e-5


def test_what_one_process_left_two_finish(together: Path, tmp_path: Path) -> None:
    assert difference(together / "begun by one", alone(tiny.recipe(), tmp_path / "whole")) < 2e-5


def test_what_cannot_be_is_told_to_all(together: Path) -> None:
    told = [json.loads((together / f"told-{index}.json").read_text()) for index in (0, 1)]
    assert told[0] == told[1]
    assert "unfinished run" in told[0]["again"]
    assert "train.accumulate=5 on 2 processes" in told[0]["parts"]


RECIPE = """
name = "small"
data = { streaming = true, workers = 0, shuffle = 60 }
model = { architecture = "resnet-rf3", width = 8, depth = 1 }
defense = { rule = "vote", patch = "1" }
augment = { crop = 1, flip = false }
train = { epochs = 40, batch_size = 12, ema = 0.9, precision = "fp32", checkpoint_every = 3, validate_every = 40 }
"""


def test_the_launcher_stops_all_and_one_sentence_says_so(tmp_path: Path) -> None:
    recipe, out = tmp_path / "small.toml", tmp_path / "run"
    recipe.write_text(RECIPE)
    process = launched(
        "bagcert", "train", str(recipe), "--data", "digits", "--limit", "60", "--out", str(out), "--device", "cpu"
    )
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=200)[1]
    assert process.returncode != 0
    provenance = json.loads((out / "config.json").read_text())["provenance"]
    assert provenance["steps"] < provenance["steps_planned"], "it was stopped before its end"
    assert errors.count("Error: interrupted at step") == 1
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert f"interrupted at step {state['step']} of {state['steps']}" in errors
    shorter = load_recipe(str(recipe))
    assert all(value.isfinite().all() for value in state["model"].values())
    assert state["steps"] == 4 * shorter.train.epochs
