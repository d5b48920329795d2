"""Checkpoints: only one that has the form of the run's own is taken, and nothing in it is run."""

import io
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bagcert.errors import UnreadableError, UsageError
from bagcert.training import checkpoint as run_folder
from bagcert.training.loop import train
from tests import refused, tiny


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of step 4."""
    return tiny.stopped_run(tmp_path_factory.mktemp("run"), 5) / "checkpoint.pt"


@pytest.fixture
def folder(checkpoint: Path, tmp_path: Path) -> Path:
    """A folder with the recipe of that run."""
    (tmp_path / "recipe.toml").write_bytes((checkpoint.parent / "recipe.toml").read_bytes())
    return tmp_path


def _resume(folder: Path, **changes: object) -> None:
    train(tiny.recipe(**changes), folder, tiny.image_set(), resume=True, device="cpu")


def _first(state: dict) -> dict:
    return state["optimizer"]["state"][0]


CHANGES: dict[str, tuple[Callable[[dict], object], str]] = {
    "a list": (lambda state: [1], "not the state of a run"),
    "a number": (lambda state: 7, "not the state of a run"),
    "no metrics": (lambda state: state.pop("metrics") and None, "not the state of a run"),
    "a step before the first": (lambda state: state.update(step=-1), "out of range"),
    "a step after the last": (lambda state: state.update(step=13), "out of range"),
    "a step in words": (lambda state: state.update(step="five"), "step is not what"),
    "endless seconds": (lambda state: state.update(seconds=float("inf")), "out of range"),
    "half a step": (lambda state: state.update(step=4.5), "step is not what"),
    "a negative count": (lambda state: state["average"].update(n_averaged=torch.tensor(-10)), "n_averaged is not what"),
    "seconds that are none": (lambda state: state.update(seconds=float("nan")), "out of range"),
    "metrics of numbers": (lambda state: state.update(metrics=[1]), "metrics"),
    "a moment of another shape": (lambda state: _first(state).update(exp_avg=torch.zeros(3)), "exp_avg"),
    "a moment that is none": (lambda state: _first(state).update(exp_avg="x"), "exp_avg"),
    "a moment of no memory": (lambda state: _first(state).update(exp_avg=torch.zeros(1).expand(1 << 45)), "exp_avg"),
    "a moment of no parameter": (
        lambda state: state["optimizer"]["state"].update({999: _first(state)}),
        "optimizer.state is not",
    ),
    "a moment missing": (lambda state: _first(state).__delitem__("exp_avg"), "optimizer.state.0 is not"),
    "a parameter without moments": (lambda state: state["optimizer"]["state"].__delitem__(0), "optimizer.state is not"),
    "a moment too many": (lambda state: _first(state).update(more=torch.zeros(1)), "optimizer.state.0 is not"),
    "a negative step of a moment": (lambda state: _first(state).update(step=torch.tensor(-1.0)), "before the first"),
    "an option more": (lambda state: state["optimizer"]["param_groups"][0].update(evil=1), "param_groups.0"),
    "a rate in words": (lambda state: state["optimizer"]["param_groups"][0].update(lr="x"), "param_groups.0.lr"),
    "a method replaced": (lambda state: state["schedule"].update(step=5), "schedule"),
    "a weight of another dtype": (
        lambda state: state["model"].update({name: value.double() for name, value in state["model"].items()}),
        "model.",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_checkpoint_in_another_form_refused(what: str, checkpoint: Path, folder: Path) -> None:
    change, reason = CHANGES[what]
    state = torch.load(checkpoint, weights_only=True)
    replaced = change(state)
    torch.save(state if replaced is None else replaced, folder / "checkpoint.pt")
    before = (folder / "checkpoint.pt").read_bytes()
    said = refused(UnreadableError, "is damaged: ", _resume, folder)
    assert reason in said
    assert (folder / "checkpoint.pt").read_bytes() == before


def test_checkpoint_of_a_composed_optimizer_refused(tmp_path: Path) -> None:
    path = tiny.stopped_run(tmp_path, 5, optimizer__name="muon") / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["optimizer"]["muon"]["state"][0]["momentum_buffer"] = torch.zeros(2)
    torch.save(state, path)
    refused(UnreadableError, "momentum_buffer is not what this run has", _resume, tmp_path, optimizer__name="muon")


def test_compressed_archive_refused(checkpoint: Path, folder: Path) -> None:
    with (
        zipfile.ZipFile(checkpoint) as source,
        zipfile.ZipFile(folder / "checkpoint.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for part in source.infolist():
            target.writestr(part.filename, source.read(part))
        target.writestr("archive/data/bomb", bytes(1 << 20))
    refused(UnreadableError, "its parts are larger than the file", _resume, folder)


def test_code_in_a_checkpoint_not_run(checkpoint: Path, folder: Path) -> None:
    trap = tiny.Trap(folder / "sprung")
    archive, legacy = io.BytesIO(), io.BytesIO()
    torch.save({**torch.load(checkpoint, weights_only=True), "metrics": trap}, archive)
    torch.save(trap, legacy, _use_new_zipfile_serialization=False)
    for content in (archive.getvalue(), legacy.getvalue(), pickle.dumps(trap)):
        (folder / "checkpoint.pt").write_bytes(content)
        refused(UnreadableError, "is damaged", _resume, folder)
    assert not (folder / "sprung").exists()


def test_pipes_and_large_files_refused(checkpoint: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(folder / "checkpoint.pt")
    refused(UnreadableError, "not a regular file", _resume, folder)
    (folder / "checkpoint.pt").unlink()
    (folder / "checkpoint.pt").write_bytes(checkpoint.read_bytes())
    monkeypatch.setattr(run_folder, "MAX_CHECKPOINT_BYTES", 1000)
    refused(UnreadableError, "more than the limit of 1,000", _resume, folder)
    (folder / "recipe.toml").unlink()
    os.mkfifo(folder / "recipe.toml")
    refused(UsageError, "another recipe", _resume, folder)


def test_leftovers_of_a_killed_process_removed(checkpoint: Path, folder: Path) -> None:
    (folder / "checkpoint.pt").write_bytes(checkpoint.read_bytes())
    (folder / ".checkpoint.pt.abcd1234").write_bytes(b"half of one")
    _resume(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"recipe.toml", "metrics.jsonl", "model.safetensors", "config.json"}
