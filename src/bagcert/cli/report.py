"""`bagcert report`."""

from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.console import check_output, progress, say


def report(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="PATH...", help="JSON files from bagcert evaluate --out, and run or model folders."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.html", help="Output file.")] = Path("report.html"),
    plots: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write the figures as PNG and PDF to this folder.")
    ] = None,
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Title of the page. Default: a general title.")
    ] = None,
) -> None:
    """Write results as one self-contained HTML page: figures, margins, and images with their region votes.

    Records and images are read from the files next to the JSON files.
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
