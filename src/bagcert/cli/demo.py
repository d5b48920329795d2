"""`bagcert demo`."""

from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.console import print_json, print_results, progress, stdout
from bagcert.cli.options import Json

PATCHES = ("1", "2")


def demo(
    json: Json = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the trained model in this folder.")] = None,
) -> None:
    """Train a region scorer on scikit-learn's digits, and certify the held-out digits. Under a minute on two cores."""
    import tempfile

    from bagcert.defenses.bagcert import load
    from bagcert.evaluate import evaluate
    from bagcert.recipe import load_recipe
    from bagcert.train import train

    with tempfile.TemporaryDirectory(prefix="bagcert-demo-") as scratch:
        folder = out or Path(scratch)
        with progress("training") as report:
            recipe = load_recipe("digits")
            train(recipe, folder, device="cpu", on_progress=lambda at: report(at.step, at.steps))
        evaluation = evaluate(load(folder, "cpu"), "digits", PATCHES)
    if json:
        print_json(evaluation.info.to_dict())
        return
    print_results(evaluation.info)
    stdout().print(
        "clean: share answered rightly. certified: share answered rightly and proved to stay so whatever is put\n"
        "under one patch of that size, anywhere. Next: bagcert certify PHOTO.jpg"
    )
    if out is not None:
        stdout().print(f"The model is in {out}: bagcert evaluate {out} --data digits --patch 1x3")
