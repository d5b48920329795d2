"""`bagcert certify`."""

from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.console import check_output, fail, print_json, progress, stdout, warn
from bagcert.cli.options import Backend, Device, Dtype, Fit, Json, Patches, Placements, Portable, Rules


def certify(
    images: Annotated[list[str], typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Image files, or folders of them.")],
    model: Annotated[str, typer.Option(help="A shipped model, a model folder, or a hub id (owner/name).")] = "default",
    patch: Patches = None,
    rule: Rules = None,
    placements: Placements = None,
    fit: Fit = "squash",
    device: Device = "auto",
    dtype: Dtype = "float32",
    backend: Backend = "torch",
    portable: Portable = False,
    json: Json = False,
    record: Annotated[
        Path | None,
        typer.Option(metavar="FILE.jsonl", help="Add to this file all that `bagcert verify` needs, image by image."),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a --record that was interrupted, after its whole images.")
    ] = False,
    explain: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw one photo: what its regions vote for, and where a patch comes closest to changing the answer.",
        ),
    ] = None,
) -> None:
    """Classify images and prove, for each, which patches cannot change the answer.

    Patches and placements ([top, left, height, width]) are in pixels of the image file as stored.
    """
    from contextlib import ExitStack
    from dataclasses import asdict

    import torch

    from bagcert.defenses.bagcert import load
    from bagcert.engines.local import FileError, FileVerdict, certify_files, image_files
    from bagcert.errors import UsageError
    from bagcert.evaluate import device_name, versions
    from bagcert.record_file import RecordFile
    from bagcert.records import SCHEMA_VERSION

    if resume and record is None:
        raise UsageError("--resume goes on with a --record; name the file")
    files = image_files(images)
    if explain is not None:
        if len(files) != 1:
            raise UsageError(f"--explain draws one photo, but {len(files)} were given")
        check_output(explain, ".png")
    loaded = load(model, device, dtype, portable, backend=backend)
    verdicts: list[FileVerdict] = []
    errors: list[FileError] = []
    with ExitStack() as stack, progress("certifying") as report:
        records = None
        if record is not None:
            environment = {
                "device": device_name(loaded),
                "backend": loaded.backend,
                "dtype": dtype,
                "threads": torch.get_num_threads(),
                "versions": versions(loaded),
            }
            records = RecordFile(record, loaded, rule or (), patch or (), environment, fit, placements, resume)
            stack.enter_context(records)
        kept = 0 if records is None else records.kept
        for found in certify_files(loaded, files, patch or (), rule or (), fit, placements, records):
            if isinstance(found, FileError):
                errors.append(found)
                warn(found.error)
            else:
                verdicts.append(found)
            report(kept + len(verdicts) + len(errors), len(files))
    if kept:
        warn(f"{record} held {kept} of {len(files)} images already; they are not certified again, nor listed here")
    if explain is not None and verdicts:
        from bagcert.images import read_image
        from bagcert.report.explain import write_explanation

        write_explanation(loaded, read_image(files[0]), verdicts[0].results[0], explain, fit, placements)
    if json:
        print_json(
            {
                "schema_version": SCHEMA_VERSION,
                "model": loaded.name,
                "weights_sha256": loaded.weights_sha256,
                "images": len(verdicts),
                "results": [asdict(verdict) for verdict in verdicts],
                "errors": [asdict(error) for error in errors],
            }
        )
    else:
        _print(verdicts)
    if errors:
        fail(f"{len(errors)} of {len(files)} inputs could not be certified", max(error.exit_code for error in errors))


def _print(verdicts: list) -> None:
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    for column in (
        "image",
        "size, px",
        "class",
        "patch",
        "rule",
        "certified",
        "margin",
        "worst placement",
        "largest, px",
    ):
        table.add_column(column, overflow="fold")
    for verdict in verdicts:
        for i, result in enumerate(verdict.results):
            first = i == 0
            table.add_row(
                escape(verdict.source) if first else "",
                "x".join(map(str, verdict.size_px)) if first else "",
                escape(verdict.class_name) if first else "",
                result.threat,
                result.rule,
                "[green]yes[/]" if result.certified else "[red]no[/]",
                str(result.margin),
                str(result.worst_placement),
                str(verdict.largest_certifiable_px) if first else "",
            )
    if verdicts:
        console = stdout()
        console.print(table)
        console.print("largest: side of the largest square for which a defence built for it certifies the same class")
