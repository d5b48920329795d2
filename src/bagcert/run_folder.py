"""A training run on disk: its recipe, its metrics, and a checkpoint that is whole at every moment."""

import io
import json
import pickle
from pathlib import Path

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from bagcert.errors import UnreadableError, UsageError
from bagcert.files import write_atomically
from bagcert.nets.region_scorer import RegionScorer
from bagcert.recipe import Recipe

CHECKPOINT, METRICS, RECIPE = "checkpoint.pt", "metrics.jsonl", "recipe.toml"


class RunFolder:
    """What a run needs to go on where it stopped.

    Attributes:
        step: optimizer steps done.
        steps: of the whole run, which follow from the recipe and the number of images.
        seconds: training time so far, over all resumptions.
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
    ) -> None:
        self.folder = folder
        self.recipe = recipe
        self.scorer = scorer
        self.average = average
        self.optimizer = optimizer
        self.schedule = schedule
        self.step = 0
        self.steps = steps
        self.seconds = 0.0
        self._metrics: list[str] = []

    @property
    def shipping(self) -> RegionScorer:
        """The weights that would ship now: the average, or the last ones where the recipe keeps none."""
        chosen: nn.Module = self.average.module if self.recipe.train.ema else self.scorer
        assert isinstance(chosen, RegionScorer)
        return chosen.eval()

    def open(self, resume: bool) -> None:
        """Starts a new run, or loads the checkpoint of one with the same recipe.

        Raises:
            UsageError: the folder holds an unfinished or another run, or there is nothing to resume.
            UnreadableError: the checkpoint is damaged.
        """
        path = self.folder / CHECKPOINT
        if not resume:
            if path.exists():
                raise UsageError(f"{self.folder} holds an unfinished run; go on with --resume or choose another --out")
            write_atomically(self.folder / RECIPE, self.recipe.to_toml().encode())
            write_atomically(self.folder / METRICS, b"")
            return
        if not path.exists():
            raise UsageError(f"{self.folder} holds no unfinished run to resume")
        written = (self.folder / RECIPE).read_text() if (self.folder / RECIPE).exists() else ""
        if written != self.recipe.to_toml():
            raise UsageError(f"the run in {self.folder} was started with another recipe; see its {RECIPE}")
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            if state.get("steps", self.steps) != self.steps:
                raise UsageError(
                    f"the run in {self.folder} was started with other data or another limit: it has "
                    f"{state['steps']} steps, this would have {self.steps}"
                )
            self.scorer.load_state_dict(state["model"])
            self.average.load_state_dict(state["average"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.schedule.load_state_dict(state["schedule"])
            self.step, self.seconds, self._metrics = state["step"], state["seconds"], state["metrics"]
        except UsageError:
            raise
        except (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError, pickle.UnpicklingError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if isinstance(error, pickle.UnpicklingError):  # whose text advises to run what is in the file
                reason = "it holds more, or other things, than tensors and numbers"
            raise UnreadableError(f"the checkpoint {path} is damaged: {reason}") from None
        write_atomically(self.folder / METRICS, "".join(self._metrics).encode())

    def log(self, **values: int | float) -> None:
        """Adds a line to the metrics."""
        self._metrics.append(json.dumps({"step": self.step, "seconds": round(self.seconds, 1), **values}) + "\n")
        write_atomically(self.folder / METRICS, "".join(self._metrics).encode())

    def save(self) -> None:
        """Replaces the checkpoint, whole or not at all."""
        buffer = io.BytesIO()
        state = {
            "model": self.scorer.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "step": self.step,
            "steps": self.steps,
            "seconds": self.seconds,
            "metrics": self._metrics,
        }
        torch.save(state, buffer)
        write_atomically(self.folder / CHECKPOINT, buffer.getvalue())

    def close(self) -> None:
        """The run is finished: the checkpoint has done its work."""
        (self.folder / CHECKPOINT).unlink(missing_ok=True)
