"""`bagcert train`."""

from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.console import progress, say, say_all, tell
from bagcert.cli.options import Device
from bagcert.errors import BagcertError
from bagcert.training.launcher import is_main_process


def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe (see bagcert info), or a TOML file.")],
    data: Annotated[str | None, typer.Option(help="A data set name, path or URL, instead of the recipe's.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run folder. Default: runs/RECIPE.")] = None,
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
    """Train a model by a recipe. Ctrl-C saves; --resume goes on, also after a crash.

    On several devices or machines: torchrun or accelerate launch, then -m bagcert train, see docs/many_devices.md.
    """
    from bagcert.training.recipe import load_recipe

    chosen = load_recipe(recipe, set_ or ())
    if print_recipe:
        if is_main_process():
            say_all(chosen.to_toml())
        return
    from bagcert.defenses.bagcert import model_folder
    from bagcert.training.distributed import leave
    from bagcert.training.loop import Progress
    from bagcert.training.loop import train as run

    folder = out or Path("runs") / chosen.name
    initial = None if init is None else model_folder(init)
    with progress(f"training {chosen.name}") as report:

        def show(at: Progress) -> None:
            note = ""
            if at.validation is not None:
                clean, certified = at.validation["clean_accuracy"], at.validation["certified_accuracy"]
                note = f"clean {clean:.1%}, certified {certified:.1%}"
                tell(f"epoch {at.epoch}/{chosen.train.epochs}: loss {at.loss:.3f}, {note}")
            report(at.step, at.steps, note)

        try:
            run(chosen, folder, data, resume, initial, limit, device, show)
        except BagcertError:  # all processes raise it together
            leave()
            raise
        leave()
    if is_main_process():
        say(f"The model is in {folder}: bagcert evaluate {folder} --data {data or chosen.data.name}")
