"""`bagcert certify`."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.certify_many import certify_data
from bagcert.cli.console import check_output, fail, print_json, print_table, progress, say, styled, warn
from bagcert.cli.options import (
    MODEL_HELP,
    Backend,
    Device,
    Dtype,
    Fit,
    Json,
    MasksPerAxis,
    Patches,
    Placements,
    Portable,
    Rules,
)
from bagcert.errors import UsageError
from bagcert.records import SCHEMA_VERSION, in_unit


def certify(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Image files, or folders of them.")
    ] = None,
    model: Annotated[str, typer.Option(help=MODEL_HELP)] = "default",
    patch: Patches = None,
    rule: Rules = None,
    placements: Placements = None,
    masks_per_axis: MasksPerAxis = None,
    fit: Fit = "squash",
    device: Device = "auto",
    dtype: Dtype = "float32",
    backend: Backend = "torch",
    portable: Portable = False,
    json: Json = False,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl", help="Append to this file the records that `bagcert verify` checks, image by image."
        ),
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Resume an interrupted --record after its last complete image.")
    ] = False,
    explain: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.png",
            help="Draw one photo with the votes of its regions and the patch placement that comes closest to changing "
            "the prediction.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_URL",
            help="Instead of single images: all images and Parquet files below a folder or s3://bucket/folder, or all "
            'files that match a quoted glob ("s3://bucket/*.parquet").',
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="With --data: write one row per image to Parquet files in this folder. Rerun the same command to "
            "resume.",
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            help="With --data: local (one process), or ray (all cores and GPUs of this machine or of a Ray cluster)."
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(min=1, help="With --engine ray: number of workers. Default: one per GPU, or one per core."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --data: certify only the first N images. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --data: images per forward pass.")] = 100,
    part_size: Annotated[
        int,
        typer.Option(
            min=1,
            help="With --data: images per Parquet file; at most this many images are recomputed after an interruption.",
        ),
    ] = 1000,
) -> None:
    """Classify images and certify for each whether a patch can change the prediction.

    Patches and placements ([top, left, height, width]) are in pixels of the image file as stored.

    Results for single images are printed. For large data sets, use --data and --out, which write them to files.
    """
    if data is not None or out is not None:
        if data is None or out is None:
            raise UsageError("--data and --out need each other: the source of the images, and the folder for the rows")
        if images:
            raise UsageError(f"--data cannot be combined with single images ({images[0]}); put a glob in quotes")
        if record is not None or explain is not None or resume:
            raise UsageError("--record, --resume and --explain cannot be combined with --data")
        certify_data(
            data,
            out,
            engine,
            json,
            model=model,
            patches=patch or (),
            rules=rule or (),
            limit=limit,
            workers=workers,
            placements=placements,
            fit=fit,
            batch_size=batch_size,
            part_size=part_size,
            device=device,
            dtype=dtype,
            portable=portable,
            backend=backend,
            masks_per_axis=masks_per_axis,
        )
        return
    if engine != "local" or workers is not None or limit is not None:
        raise UsageError("--engine, --workers and --limit need --data")
    if not images:
        raise UsageError("give at least one image, a folder of images, or a --data source")

    import torch

    from bagcert.bulk.files import FileError, FileVerdict, certify_files, image_files
    from bagcert.defenses.bagcert import load
    from bagcert.devices import device_name
    from bagcert.evaluation.evaluate import versions
    from bagcert.proofs.file import RecordFile

    if resume and record is None:
        raise UsageError("--resume needs the --record file to resume")
    files = image_files(images)
    if explain is not None:
        if len(files) != 1:
            raise UsageError(f"--explain draws exactly one photo, got {len(files)}")
        check_output(explain, ".png")
    with progress("loading"):
        loaded = load(model, device, dtype=dtype, portable=portable, backend=backend, masks_per_axis=masks_per_axis)
    verdicts: list[FileVerdict] = []
    errors: list[FileError] = []
    with ExitStack() as stack, progress("certifying") as report:
        records = None
        if record is not None:
            environment = {
                "device": device_name(loaded.scorer.device),
                "backend": loaded.backend,
                "dtype": dtype,
                "threads": torch.get_num_threads(),
                "versions": versions(loaded),
            }
            records = RecordFile(record, loaded, rule or (), patch or (), environment, fit, placements, resume)
            stack.enter_context(records)
        for found in certify_files(loaded, files, patch or (), rule or (), fit, placements, records):
            if isinstance(found, FileError):
                errors.append(found)
                warn(found.error)
            else:
                verdicts.append(found)
            held = 0 if records is None else records.held
            report(held + len(verdicts) + len(errors), len(files))
    for source in () if records is None else records.changed:
        warn(f"{record} holds a certificate for a different image named {source}; this one was certified")
    if records is not None and records.held:
        already = f"{records.held} of {len(files)} images"
        warn(f"{record} already held {already}; they are not certified again or listed here")
    if explain is not None and verdicts:
        from bagcert.data.photo import read_image
        from bagcert.evaluation.gallery import photo_picture
        from bagcert.report.explain import MOST_SIDE, write_explanation

        verdict = verdicts[0].results[0]
        picture = photo_picture(loaded, read_image(files[0]), verdict, fit, placements, MOST_SIDE)
        write_explanation(picture, loaded.class_names, verdict, str(files[0]), explain)
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
    rows = []
    for verdict in verdicts:
        for i, result in enumerate(verdict.results):
            first = i == 0
            rows.append(
                (
                    verdict.source if first else "",
                    "x".join(map(str, verdict.size_px)) if first else "",
                    verdict.class_name if first else "",
                    in_unit(result.threat, "of the photo"),
                    result.rule,
                    styled("yes", "green") if result.certified else styled("no", "red"),
                    str(result.margin),
                    places(result.worst_placement),
                    str(verdict.largest_certifiable_px) if first else "",
                )
            )
    if rows:
        columns = ("image", "size, px", "class", "patch", "rule", "certified", "margin", "worst placement")
        print_table(rows, (*columns, "largest, px"), fold=True, names=True)
        say("sizes and placements (size at top, left) are in pixels of the photo as stored")
        say("largest: side of the largest square patch for which a defense built for it certifies the same class")


def places(worst: list) -> str:
    """Formats worst placements compactly.

    >>> places([[0, 3, 5, 5], [4, 8, 5, 5]])
    '5x5 at 0,3 and 4,8'
    """
    boxes = worst if worst and isinstance(worst[0], list) else [worst]
    shapes: dict[str, list[str]] = {}
    for top, left, height, width in boxes:
        shapes.setdefault(f"{height}x{width}", []).append(f"{top},{left}")
    return "; ".join(f"{shape} at {' and '.join(corners)}" for shape, corners in shapes.items())
