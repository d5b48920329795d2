"""`bagcert report`."""

from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.console import check_output, progress, say


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="JSON files of bagcert evaluate --out, and run or model folders."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="Where to write the page.")] = Path(
        "report.html"
    ),
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the figures here, as PNG and PDF for a paper.")
    ] = None,
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="The title of the page.")] = None,
) -> None:
    """Write results as one HTML page that needs nothing else: figures, margins, and images with their region votes.

    Records and pictures are found beside the JSON files.
    """
    from bagcert.report.html import write_report
    from bagcert.report.plots import write_plots
    from bagcert.report.summary import read_inputs

    check_output(out, ".html")
    with progress("writing"):
        inputs = read_inputs(paths)
        drawn = write_plots(inputs, plots) if plots is not None else []
        write_report(inputs, out, title)
    say(f"The report is in {out}")
    if drawn:
        say(f"{len(drawn)} figures are in {plots}")
