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
            help="A shipped recipe (see bagcert info) or a TOML file; or a folder of class folders, and the recipe is "
            "photos; or, with --resume, a run folder.",
        ),
    ] = None,
    data: Annotated[str | None, typer.Option(help="A data set name, path or URL, instead of the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder. Default: runs/NAME.")] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Passes over the images. With --resume: a new total, where possible.")
    ] = None,
    minutes: Annotated[
        float | None, typer.Option(min=0, help="As many epochs as fit, by the time of the first steps.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Images are resized to it, in px: 32, or 32x48.")] = None,
    patch: Annotated[
        str | None, typer.Option(metavar="PATCH", help="What training aims at, in px of the resized image: 5, 2%.")
    ] = None,
    groups: Annotated[
        str | None,
        typer.Option(
            metavar="prefix|FILE",
            help="Keep related images on one side of the split: those whose names agree up to the last _ or -, or by "
            "a file with lines CLASS/IMAGE,GROUP.",
        ),
    ] = None,
    class_names: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Lines FOLDER: NAME. Default: classes.txt in the folder, where it is there."),
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a recipe key, such as train.epochs=3. Repeatable."),
    ] = None,
    print_recipe: Annotated[bool, typer.Option("--print-recipe", help="Print the whole recipe and exit.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the checkpoint in the run folder.")] = False,
    init: Annotated[str | None, typer.Option(metavar="MODEL", help="Start from the weights of this model.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Train on the first N images only.")] = None,
    device: Device = "auto",
) -> None:
    """Train a model on your images, or by a recipe. Ctrl-C saves; --resume RUN goes on, also after a crash.

    A folder val beside train is held out, else a part of the training images. See docs/training.md and docs/recipes.md.
    On several devices or machines: torchrun or accelerate launch, then -m bagcert train, see docs/many_devices.md.
    """
    from bagcert.training.choose import choose_recipe

    if epochs is not None and minutes is not None:
        raise UsageError("--epochs and --minutes both say how long to train; give one of them")
    given = {
        "train.epochs": epochs,
        "defense.patch": patch,
        "data.groups": groups,
        "data.class_names": class_names,
    }
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
            say(f"The model is in {folder}. {images} has no part test, and the model has seen most of it:")
            say(f"bagcert evaluate {folder} --data OTHER_IMAGES")
        else:
            say(f"The model is in {folder}: bagcert evaluate {folder} --data {images}")


class _Lines:
    """What is shown of a run: the last loss and validation, and the time left."""

    def __init__(self) -> None:
        self.loss = self.accuracy = ""
        self.start: tuple[int, float] | None = None

    def add(self, at: "Progress") -> None:
        """Takes over what is new after a step."""
        self.start = self.start or (at.step, at.seconds)
        if at.loss == at.loss:
            self.loss = f"loss {at.loss:.3f}"
        if at.validation is not None:
            clean, certified = at.validation["clean_accuracy"], at.validation["certified_accuracy"]
            self.accuracy = f"clean {clean:.1%}, certified {certified:.1%}"

    def line(self, at: "Progress") -> str:
        """Of an epoch that ends."""
        accuracy = self.accuracy if at.validation is not None else ""
        return f"epoch {at.epoch}/{at.epochs}: " + ", ".join(filter(None, [self.loss, accuracy, self._left(at)]))

    def note(self, at: "Progress") -> str:
        """Beside the progress bar."""
        return ", ".join(filter(None, [f"epoch {at.epoch}/{at.epochs}", self.loss, self.accuracy]))

    def _left(self, at: "Progress") -> str:
        assert self.start is not None
        steps, seconds = at.step - self.start[0], at.seconds - self.start[1]
        if not steps or at.step == at.steps:
            return ""
        left = (at.steps - at.step) * seconds / steps
        return f"{left:.0f} s left" if left < 90 else f"{left / 60:.0f} min left"
