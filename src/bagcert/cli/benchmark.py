"""`bagcert benchmark`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagcert.cli.console import print_json, print_table, progress, say, say_notes
from bagcert.cli.options import DATA_HELP, LIMIT_HELP, Device, Json
from bagcert.errors import UsageError
from bagcert.records import in_unit

if TYPE_CHECKING:
    from bagcert.evaluation.benchmark import BenchmarkRow


def benchmark(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for results, records, plots and trained networks.")],
    data: Annotated[str | None, typer.Option(help=DATA_HELP)] = None,
    defenses: Annotated[
        str, typer.Option(metavar="NAMES", help="Comma-separated defenses, or all. `bagcert info` lists them.")
    ] = "all",
    patch: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATCH",
            help="Patch size in pixels, as in evaluate. Repeat for several. Default: 2 and 5; 1 and 2 with --quick.",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, metavar="N", help=LIMIT_HELP)] = None,
    train_limit: Annotated[
        int | None, typer.Option(min=1, metavar="N", help="Train on at most N images, chosen as by --limit.")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of every training. Default: depends on the image size.")
    ] = None,
    multiply_adds: Annotated[
        int | None,
        typer.Option(min=1, help="MACs of one forward pass of every network. Default: depends on the image size."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed.")] = 0,
    quick: Annotated[
        bool, typer.Option("--quick", help="Smoke test on digits with 1 and 2 px patches (a few minutes).")
    ] = False,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Compare certified defenses: train each one with the same budget and evaluate all of them.

    Trains the missing networks, evaluates every defense against every patch, writes one JSON file for each, prints a
    table and draws plots. Networks and results that DIR already holds are reused, so rerunning the command resumes an
    interrupted run.
    """
    from bagcert.evaluation.benchmark import benchmark as run
    from bagcert.report.benchmark_plots import draw

    if quick and data not in (None, "digits"):
        raise UsageError(f"--quick uses digits and cannot be combined with --data {data}")
    if data is None and not quick:
        raise UsageError("a benchmark needs --data or --quick")
    names = [] if defenses == "all" else [name.strip() for name in defenses.split(",")]
    patches = patch or (["1", "2"] if quick else ["2", "5"])
    with progress("benchmark") as report:
        rows = run(
            data or "digits",
            out,
            patches,
            names,
            limit or (150 if quick else None),
            train_limit,
            epochs or (8 if quick else None),
            multiply_adds,
            seed,
            device,
            lambda what, done, total: report(done, total, what),
        )
    plots = draw(rows, out)
    if json:
        print_json([row.to_dict() for row in rows])
        return
    _print(rows)
    say(f"Results and networks are in {out}; plots: {', '.join(path.name for path in plots)}")


def _print(rows: "list[BenchmarkRow]") -> None:
    right = ("clean", "certified", "images", "passes", "images/s predict", "certify", "MiB", "training s")
    for patch in dict.fromkeys(row.patch for row in rows):
        some = [row for row in rows if row.patch == patch]
        say(f"{some[0].data} ({some[0].split}), patch {in_unit(patch)}, {some[0].device}, {some[0].threads} threads")
        say_notes(dict.fromkeys(note for row in some for note in row.notes or ()))
        cells = [
            (
                row.defense,
                row.guarantee,
                f"{row.clean_accuracy:.1%}",
                f"{row.certified_accuracy:.1%}",
                f"{row.images:,}",
                f"{row.forward_passes['predict']:,} / {row.forward_passes['certify']:,}",
                f"{row.images_per_second['predict']:,.0f}",
                f"{row.images_per_second['certify']:,.0f}",
                f"{row.peak_memory_mib:,}",
                f"{row.training_seconds:,.0f}",
            )
            for row in sorted(some, key=lambda row: -row.certified_accuracy)
        ]
        print_table(cells, ("defense", "guarantee"), right, first_whole=True)
