"""`bagcert demo`."""

from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.console import check_output, print_json, print_results, progress, say
from bagcert.cli.options import Json

PATCHES = ("1", "2")


def demo(
    json: Json = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the trained model in this folder.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.html",
            help="Report file. Default: bagcert-demo.html, or report.html in the --out folder; none with --json.",
        ),
    ] = None,
) -> None:
    """Train a region scorer on the embedded digits and certify the test digits. Under a minute on two cores.

    Writes a report with figures and with images that show the votes of their regions.
    """
    import tempfile

    from bagcert.defenses.bagcert import load
    from bagcert.evaluation.evaluate import evaluate, log_path, write_evaluation
    from bagcert.report.html import write_report
    from bagcert.report.summary import read_inputs
    from bagcert.training.loop import train
    from bagcert.training.recipe import load_recipe

    page = report if report or json else out / "report.html" if out else Path("bagcert-demo.html")
    if page is not None:
        check_output(page, ".html")
    with tempfile.TemporaryDirectory(prefix="bagcert-demo-") as scratch:
        folder = out or Path(scratch)
        with progress("training") as show:
            recipe = load_recipe("digits")
            train(recipe, folder, device="cpu", on_progress=lambda at: show(at.step, at.steps))
        results = Path(scratch) / "results" / "demo.json"
        with progress("certifying") as show:
            evaluation = evaluate(
                load(folder, "cpu"), "digits", patches=PATCHES, on_progress=show, log=log_path(results), gallery=True
            )
        write_evaluation(evaluation, results)
        if page is not None:
            with progress("writing"):
                write_report(read_inputs([results, folder]), page, "bagcert on digits")
    if json:
        print_json(evaluation.info.to_dict())
        return
    print_results(evaluation.info)
    say("clean: share of images classified correctly. certified: share of images classified correctly for which no")
    say("patch of that size, anywhere in the image, can change the prediction. Next: bagcert certify PHOTO.jpg")
    say(f"The report is in {page}")
    if out is not None:
        say(f"The model is in {out}: bagcert evaluate {out} --data digits --patch 1x3")
