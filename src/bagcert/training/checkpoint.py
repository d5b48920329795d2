"""The files of a training run: recipe, metrics, and a checkpoint that is written atomically."""

import io
import json
import math
import os
import pickle
import tomllib
import zipfile
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from bagcert.errors import BagcertError, UnreadableError, UsageError, sanitize
from bagcert.io.files import open_regular, read_regular, remove_leftovers, write_atomically
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.saved_model import CONFIG, WEIGHTS
from bagcert.training.recipe import MAX_RECIPE_BYTES, Recipe, parse_recipe

CHECKPOINT, HELD, METRICS, RECIPE = "checkpoint.pt", "checkpoint-held.pt", "metrics.jsonl", "recipe.toml"
MAX_CHECKPOINT_BYTES = 1 << 33
"""Four times the largest weights a model folder may have: weights, their average, and two moments of the optimizer."""


class RunFolder:
    """The state of a run that is saved in its checkpoint.

    Attributes:
        decay_start: the step at which the learning rate of the schedule hold starts to fall; None for other schedules.
            The checkpoint of that step is kept, so that a run can be resumed with more epochs.
        init: name of the model whose weights the run started from; None for random weights.
        seconds: training time so far, including earlier sessions of a resumed run.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        scorer: RegionScorer,
        average: AveragedModel,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        steps: int,
        decay_start: int | None = None,
        init: str | None = None,
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.scorer = scorer
        self.average = average
        self.optimizer = optimizer
        self.schedule = schedule
        self.step = 0
        self.steps = steps
        self.decay_start = decay_start
        self.init = init
        self.seconds = 0.0
        self._metrics: list[str] = []

    @property
    def shipping(self) -> RegionScorer:
        """Returns the weights to write to the model: the EMA weights, or the current ones if the recipe has no EMA."""
        chosen: nn.Module = self.average.module if self.recipe.train.ema else self.scorer
        assert isinstance(chosen, RegionScorer)
        return chosen.eval()

    def open(self, resume: bool) -> None:
        """Starts a new run, or loads the checkpoint of a run with the same recipe."""
        path = self.folder / CHECKPOINT
        for name in (CHECKPOINT, HELD, METRICS, RECIPE, WEIGHTS, CONFIG):
            remove_leftovers(self.folder / name)
        check_run_folder(self.folder, self.recipe, resume)
        if not resume:
            write_atomically(self.folder / RECIPE, self.recipe.to_toml().encode())
            write_atomically(self.folder / METRICS, b"")
            return
        extended = self._extends()
        if extended and not path.exists():  # finished: what it went on with before the learning rate fell
            path = self.folder / HELD
        if not path.exists():
            raise UsageError(f"{self.folder} holds no unfinished run to resume")
        try:
            state = _read_checkpoint(path)
            if extended:
                state = self._extended(state)
            self._restore(state)
            if extended:  # from here on it is a run of that many epochs, wherever it stops
                self.save()
                write_atomically(self.folder / RECIPE, self.recipe.to_toml().encode())
        except UsageError:
            raise
        except Exception as error:  # a damaged file can fail in any way
            reason = getattr(error, "strerror", None) or (str(error) or type(error).__name__).splitlines()[0]
            if isinstance(error, pickle.UnpicklingError):  # whose text advises to run what is in the file
                reason = "it holds objects other than tensors and numbers"
            raise UnreadableError(f"the checkpoint {path} is damaged: {sanitize(reason)}") from None
        write_atomically(self.folder / METRICS, "".join(self._metrics).encode())

    def _extends(self) -> bool:
        """Returns whether the run was started with a different number of epochs or a different `optimizer.decay`.

        Recipes are compared by value: keys that did not exist when the run was started have their default, and the
        path to the data may differ.
        """
        written = written_recipe(self.folder)
        own = self.recipe
        if written is not None:
            own = own.changed(
                train={"epochs": written.train.epochs},
                optimizer={"decay": written.optimizer.decay},
                data={"name": written.data.name},
            )
        if written != own:
            raise UsageError(f"the run in {self.folder} was started with another recipe; see its {RECIPE}")
        if _changeable(written) == _changeable(self.recipe):
            return False
        if self.decay_start is None or self.recipe.optimizer.warmup_steps is None:
            raise UsageError(
                f"the run in {self.folder} was started with another number of epochs or another optimizer.decay; only "
                "runs with optimizer.schedule=hold and optimizer.warmup_steps can be resumed with others"
            )
        return True

    def _extended(self, state: Any) -> Any:
        """Returns the state before the learning rate fell, for a run with a different number of epochs or decay."""
        if not self._held(state) and (self.folder / HELD).exists():
            state = _read_checkpoint(self.folder / HELD)
        if not self._held(state):
            raise UsageError(
                f"the learning rate of the run in {self.folder} falls already; its epochs and decay cannot be changed"
            )
        written = written_recipe(self.folder)
        epochs = 0 if written is None else written.train.epochs
        extended_before = state["steps"] == self.steps  # and stopped before its recipe was written
        if state["steps"] * self.recipe.train.epochs != self.steps * epochs and not extended_before:
            raise UsageError(f"the run in {self.folder} was started with other data or another limit")
        return {**state, "steps": self.steps, "held_until": self.decay_start}

    def _held(self, state: Any) -> bool:
        assert self.decay_start is not None
        held_until = state.get("held_until") if isinstance(state, dict) else None
        return isinstance(held_until, int) and state["step"] <= min(held_until, self.decay_start)

    def _restore(self, state: Any) -> None:
        """Loads a checkpoint after checking that its structure matches this run."""
        own = self._state()
        if not isinstance(state, dict) or not own.keys() - {"init"} <= state.keys():  # older ones lack init
            raise ValueError("it is not the state of a run")
        if state["steps"] != self.steps:
            raise UsageError(
                f"the run in {self.folder} was started with other data or another limit: it has "
                f"{sanitize(state['steps'])} steps, this would have {self.steps}"
            )
        for name in ("model", "average", "schedule", "step", "seconds"):
            _check_form(state[name], own[name], name)
        _check_optimizer(state["optimizer"], self.optimizer)
        metrics = state["metrics"]
        if not isinstance(metrics, list) or not all(isinstance(line, str) for line in metrics):
            raise ValueError("metrics is not a list of lines")
        if not isinstance(state.get("init"), str | None):
            raise ValueError("init is not a name")
        if not 0 <= state["step"] <= self.steps or not 0 <= state["seconds"] < math.inf:
            raise ValueError("step or seconds is out of range")
        self.scorer.load_state_dict(state["model"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.step, self.seconds, self._metrics = state["step"], state["seconds"], metrics
        self.init = state.get("init")

    def log(self, **values: int | float) -> None:
        """Appends a line to the metrics."""
        self._metrics.append(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **values}) + "\n")
        write_atomically(self.folder / METRICS, "".join(self._metrics).encode())

    def save(self) -> None:
        """Replaces the checkpoint atomically."""
        content = self.content()
        write_atomically(self.folder / CHECKPOINT, content)
        if self.step == self.decay_start:
            write_atomically(self.folder / HELD, content)

    def content(self) -> bytes:
        """Returns the content of the checkpoint, which `take` loads."""
        buffer = io.BytesIO()
        torch.save(self._state(), buffer)
        return buffer.getvalue()

    def take(self, content: bytes) -> None:
        """Loads the state of another process of the same run."""
        self._restore(torch.load(io.BytesIO(content), map_location="cpu", weights_only=True))

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.scorer.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "steps": self.steps,
            "held_until": self.decay_start,
            "init": self.init,
            "seconds": self.seconds,
            "metrics": self._metrics,
        }

    def close(self) -> None:
        """Removes the checkpoint of a finished run."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)


def check_run_folder(folder: Path, recipe: Recipe, resume: bool) -> None:
    """Checks a run folder before images are read; raises the errors of `RunFolder.open` early."""
    if folder.exists() and not folder.is_dir():
        raise BagcertError(f"{folder} cannot be written: it is not a folder")
    unfinished = (folder / CHECKPOINT).exists()
    if resume and not unfinished:
        written = written_recipe(folder) if (folder / HELD).exists() else None
        if written is None or _changeable(written) == _changeable(recipe):
            raise UsageError(f"{folder} holds no unfinished run to resume")
    if not resume and unfinished:
        raise UsageError(f"{folder} holds an unfinished run; go on with --resume or choose another --out")


def _changeable(recipe: Recipe) -> tuple[int, float]:
    """Returns the values that may change when a run with a held learning rate is resumed."""
    return recipe.train.epochs, recipe.optimizer.decay


def written_recipe(folder: Path) -> Recipe | None:
    """Reads the recipe of a run folder; None if there is no valid one."""
    try:
        return parse_recipe(tomllib.loads(read_regular(folder / RECIPE, MAX_RECIPE_BYTES).decode()))
    except (OSError, ValueError, RecursionError):  # errors of recipes are ValueErrors as well
        return None


def _read_checkpoint(path: Path) -> Any:
    """Reads tensors, numbers, text, lists and dicts from a checkpoint, without executing code in it."""
    with open_regular(path, MAX_CHECKPOINT_BYTES) as file:
        size = os.fstat(file.fileno()).st_size
        parts = zipfile.ZipFile(file).infolist()
        # torch compresses nothing: a part larger than it is in the file would be a bomb.
        if sum(part.file_size for part in parts) > size:
            raise ValueError("its parts are larger than the file")
        file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True)


def _check_form(found: Any, own: Any, where: str) -> None:
    """Checks that keys, lengths, shapes, dtypes and types match the state of this run."""
    if isinstance(own, Tensor):
        same = isinstance(found, Tensor)
        same = same and (found.shape, found.dtype, found.layout) == (own.shape, own.dtype, own.layout)
        same = same and (own.is_floating_point() or bool((found >= 0).all()))  # counters
    elif isinstance(own, dict):
        same = isinstance(found, dict) and found.keys() == own.keys()
    elif isinstance(own, list | tuple):
        same = isinstance(found, list | tuple) and len(found) == len(own)
    elif isinstance(own, float):
        same = type(found) in (int, float)
    else:
        same = type(found) is type(own)
    if not same:
        raise ValueError(f"{where} is not what this run has there")
    for key in own if isinstance(own, dict) else range(len(own)) if isinstance(own, list | tuple) else ():
        _check_form(found[key], own[key], f"{where}.{key}")


def _check_optimizer(found: Any, optimizer: torch.optim.Optimizer) -> None:
    """Checks that the optimizer's settings and the state of each parameter have the structure of this run."""
    own = optimizer.state_dict()
    if "param_groups" not in own:  # an optimizer made of several, named as in its state
        _check_form(dict.fromkeys(found), dict.fromkeys(own), "optimizer")
        for name in own:
            _check_optimizer(found[name], getattr(optimizer, name))
        return
    _check_form(dict.fromkeys(found), dict.fromkeys(own), "optimizer")
    _check_form(found["param_groups"], own["param_groups"], "optimizer.param_groups")
    if found["state"] != {}:  # as it is before the first step
        _check_form(found["state"], _state_after_a_step(optimizer), "optimizer.state")
        if any(not kept.get("step", 0) >= 0 for kept in found["state"].values()):
            raise ValueError("optimizer.state has a step before the first")


def _state_after_a_step(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Any]]:
    """Returns the state of an optimizer after a step, computed on a copy."""
    trial = deepcopy(optimizer)
    for group in trial.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    type(trial).step(trial)  # a schedule has put a step of the original's in the copy's place
    return trial.state_dict()["state"]
