"""`bagcert train`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagcert.cli.console import progress, say, say_all, tell
from bagcert.cli.options import Device
from bagcert.errors import BagcertError, UsageError
from bagcert.training.launcher import is_main_process

if TYPE_CHECKING:
    from bagcert.training.loop import Progress


def train(
    what: Annotated[
        str | None,
        typer.Argument(
            metavar="RECIPE_OR_IMAGES",
            help="A shipped recipe (see bagcert info), a TOML file, or a folder of class folders (uses the recipe "
            "photos). With --resume: a run folder.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="Data set name, path or URL. Default: the data set of the recipe.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder. Default: runs/NAME.")] = None,
    epochs: Annotated[
        int | None,
        typer.Option(
            min=1, help="Number of epochs. Default: the recipe's. With --resume: a new total, if the recipe allows it."
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="Train for as many epochs as fit in this many minutes, estimated from the first steps. Default: train "
            "for --epochs.",
        ),
    ] = None,
    size: Annotated[
        str | None, typer.Option(help="Resize images to this size in px: 32, or 32x48. Default: the recipe's.")
    ] = None,
    patch: Annotated[
        str | None,
        typer.Option(
            metavar="PATCH",
            help="Patch size to train against, in px of the resized image (5) or in percent of its area (2%). "
            "Default: the recipe's.",
        ),
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="prefix|FILE",
            help="Keep groups of related images on one side of the split. prefix: images whose names agree up to the "
            "last _ or - form a group. FILE: lines CLASS/IMAGE,GROUP. Default: no groups.",
        ),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Class names, as lines FOLDER: NAME. Default: classes.txt in the data folder, if it exists.",
        ),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, such as train.epochs=3. Repeatable."),
    ] = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the whole recipe and exit.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume training from the checkpoint in the run folder.")
    ] = False,
    init: Annotated[
        str | None, typer.Option(metavar="MODEL", help="Start from the weights of this model. Default: random weights.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Train on the first N images only. Default: all.")] = None,
    device: Device = "auto",
) -> None:
    """Train a model on your images or from a recipe. Ctrl-C saves a checkpoint; --resume RUN continues from it.

    Validates on the folder val next to train if there is one, else on a held-out split of the training images. See
    docs/training.md and docs/recipes.md. For several devices or machines, use torchrun or accelerate launch with
    -m bagcert train; see docs/many_devices.md.
    """
    from bagcert.training.choose import choose_recipe

    if epochs is not None and minutes is not None:
        raise UsageError("--epochs and --minutes cannot be combined")
    given = {"train.epochs": epochs, "defense.patch": patch, "data.groups": groups, "data.class_names": class_names}
    overrides = [f"{key}={json.dumps(value, ensure_ascii=False)}" for key, value in given.items() if value is not None]
    recipe, folder = choose_recipe(what, out, [*overrides, *(set_ or ())], size, resume)
    if print_recipe:
        if is_main_process():
            say_all(recipe.to_toml())
        return
    from bagcert.defenses.bagcert import model_folder
    from bagcert.nets.saved_model import read_config
    from bagcert.training.distributed import leave
    from bagcert.training.loop import train as run

    initial = None if init is None else model_folder(init)
    with progress(f"training {recipe.name}") as report:
        lines = _Lines()

        def show(at: "Progress") -> None:
            lines.add(at)
            if at.epoch_ends:
                tell(lines.line(at))
            report(at.step, at.steps, lines.note(at))

        def message(sentence: str) -> None:
            if is_main_process():
                tell(sentence)

        try:
            run(
                recipe,
                folder,
                data or recipe.data.name,
                resume,
                initial,
                limit,
                device,
                show,
                minutes=minutes,
                on_message=message,
            )
        except BagcertError:  # all processes raise it together
            leave()
            raise
        leave()
    if is_main_process():
        images = data or recipe.data.name
        if read_config(folder).provenance["split"] == "all":
            say(f"The model is in {folder}. {images} has no test split, and the model was trained on most of it.")
            say(f"To evaluate: bagcert evaluate {folder} --data OTHER_IMAGES")
        else:
            say(f"The model is in {folder}. To evaluate: bagcert evaluate {folder} --data {images}")


class _Lines:
    """Formats the progress of a run: last loss, last validation and remaining time."""

    def __init__(self) -> None:
        self.loss = self.accuracy = ""
        self.start: tuple[int, float] | None = None

    def add(self, at: "Progress") -> None:
        """Updates the state after a step."""
        self.start = self.start or (at.step, at.seconds)
        if at.loss == at.loss:
            self.loss = f"loss {at.loss:.3f}"
        if at.validation is not None:
            clean, certified = at.validation["clean_accuracy"], at.validation["certified_accuracy"]
            self.accuracy = f"clean {clean:.1%}, certified {certified:.1%}"

    def line(self, at: "Progress") -> str:
        """Returns the line that is printed at the end of an epoch."""
        accuracy = self.accuracy if at.validation is not None else ""
        return f"epoch {at.epoch}/{at.epochs}: " + ", ".join(filter(None, [self.loss, accuracy, self._left(at)]))

    def note(self, at: "Progress") -> str:
        """Returns the note next to the progress bar."""
        return ", ".join(filter(None, [f"epoch {at.epoch}/{at.epochs}", self.loss, self.accuracy]))

    def _left(self, at: "Progress") -> str:
        assert self.start is not None
        steps, seconds = at.step - self.start[0], at.seconds - self.start[1]
        if not steps or at.step == at.steps:
            return ""
        left = (at.steps - at.step) * seconds / steps
        return f"{left:.0f} s left" if left < 90 else f"{left / 60:.0f} min left"
