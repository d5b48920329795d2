"""`bagcert evaluate`."""

from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.console import fail, print_json, print_results, progress, warn
from bagcert.cli.options import Device, Dtype, FailUnder, Fit, Json, Patches, Placements, Rules


def evaluate(
    model: Annotated[str, typer.Argument(help="A shipped model, a model folder, or a hub id (owner/name).")],
    data: Annotated[
        str,
        typer.Option(
            help="digits, cifar10 (from the hub), or a path: class folders, Parquet files, CIFAR-10's pickles."
        ),
    ],
    split: Annotated[str, typer.Option(help="Which part of the data.")] = "test",
    patch: Patches = None,
    rule: Rules = None,
    placements: Placements = None,
    fit: Fit = "squash",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N images, in data-set order.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images per forward pass.")] = 250,
    device: Device = "auto",
    dtype: Dtype = "float32",
    repeat: Annotated[int, typer.Option(min=1, help="Passes over the data; reported seconds are medians.")] = 1,
    json: Json = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE.json", help="Write the JSON here, and one record per image to FILE.records.jsonl."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on after the last whole batch of an interrupted run with this --out.")
    ] = False,
    fail_under_certified: FailUnder = None,
) -> None:
    """Clean and certified accuracy of a model on a data set, for every rule and patch from one forward pass."""
    import time

    started = time.perf_counter()
    from bagcert.defenses.bagcert import load
    from bagcert.errors import BagcertError, UsageError
    from bagcert.evaluate import evaluate as run
    from bagcert.evaluate import log_path, write_evaluation

    if out is not None:
        check_output(out)
    elif resume:
        raise UsageError("--resume goes on with the run of an --out FILE.json, and none was given")
    log = None if out is None else log_path(out)
    loaded = load(model, device, dtype)
    model_seconds = time.perf_counter() - started
    try:
        with progress("evaluating") as report:
            evaluation = run(
                loaded,
                data,
                patch or (),
                rule or (),
                split,
                limit,
                batch_size,
                placements,
                fit,
                repeat,
                model_seconds,
                report,
                log,
                resume,
            )
    except KeyboardInterrupt:
        if log is None or not log.exists():
            raise
        raise BagcertError(f"interrupted; --resume goes on from {log}") from None
    if out is not None:
        write_evaluation(evaluation, out)
    if json:
        print_json(evaluation.info.to_dict())
    else:
        print_results(evaluation.info)
    for error in evaluation.errors:
        warn(error)
    if evaluation.errors:
        fail(f"{len(evaluation.errors)} images could not be read and are left out of the figures", 5)
    if fail_under_certified is not None:
        for row in evaluation.info.results:
            if row.certified_accuracy < fail_under_certified:
                fail(
                    f"certified accuracy {row.certified_accuracy:.4f} against {row.threat} by {row.rule} is below "
                    f"the bar of {fail_under_certified}",
                    3,
                )


def check_output(path: Path) -> None:
    """Refuses an output path before the work, not after it."""
    from bagcert.errors import UsageError
    from bagcert.files import require_writable

    if path.is_dir():
        raise UsageError(f"the output {path} is a folder; a file was expected")
    if path.suffix != ".json":
        raise UsageError(f"the output must be a .json file, got {path}")
    require_writable(path)
