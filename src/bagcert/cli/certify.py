"""`bagcert certify`."""

from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.certify_many import certify_data
from bagcert.cli.console import check_output, fail, print_json, print_table, progress, say, styled, warn
from bagcert.cli.options import Backend, Device, Dtype, Fit, Json, Patches, Placements, Portable, Rules
from bagcert.records import in_unit


def certify(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="IMAGE_OR_FOLDER...", help="Image files, or folders of them.")
    ] = None,
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
    data: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER_OR_URL",
            help="Instead of single images: all below a folder or s3://bucket/folder, Parquet files among them, or all "
            'that match a glob in quotes ("s3://bucket/*.parquet").',
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="With --data: a row per image into Parquet files here. The same command again goes on."
        ),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="With --data: local, or ray, on all cores and GPUs of this machine or a Ray cluster.")
    ] = "local",
    workers: Annotated[
        int | None, typer.Option(min=1, help="With --engine ray: how many. Default: one per GPU, or per core.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="With --data: only the first N images.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="With --data: images per forward pass.")] = 100,
    part_size: Annotated[
        int, typer.Option(min=1, help="With --data: images per Parquet file; what a kill costs at most.")
    ] = 1000,
) -> None:
    """Classify images and prove, for each, which patches cannot change the answer.

    Patches and placements ([top, left, height, width]) are in pixels of the image file as stored.

    Single images are printed; --data takes any number of them, and --out keeps what is said of each.
    """
    from contextlib import ExitStack
    from dataclasses import asdict

    from bagcert.errors import UsageError

    if data is not None or out is not None:
        if data is None or out is None:
            raise UsageError("--data and --out belong together: where images come from, and where the rows go")
        if images:
            raise UsageError(
                f"--data stands instead of single images, but {images[0]} was given too; put a glob in quotes"
            )
        if record is not None or explain is not None or resume:
            raise UsageError("--record, --resume and --explain are for single images, not for --data")
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
        )
        return
    if engine != "local" or workers is not None or limit is not None:
        raise UsageError("--engine, --workers and --limit are for --data")
    if not images:
        raise UsageError("name at least one image or folder of images, or a --data source")

    import torch

    from bagcert.bulk.files import FileError, FileVerdict, certify_files, image_files
    from bagcert.defenses.bagcert import load
    from bagcert.devices import device_name
    from bagcert.evaluation.evaluate import versions
    from bagcert.proofs.file import RecordFile
    from bagcert.records import SCHEMA_VERSION

    if resume and record is None:
        raise UsageError("--resume goes on with a --record; name the file")
    files = image_files(images)
    if explain is not None:
        if len(files) != 1:
            raise UsageError(f"--explain draws one photo, but {len(files)} were given")
        check_output(explain, ".png")
    with progress("loading"):
        loaded = load(model, device, dtype=dtype, portable=portable, backend=backend)
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
        warn(f"{record} holds a certificate of another image named {source}; this one was certified anew")
    if records is not None and records.held:
        already = f"{records.held} of {len(files)} images already"
        warn(f"{record} held {already}; they are not certified again, nor listed here")
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
        say("largest: side of the largest square for which a defence built for it certifies the same class")


def places(worst: list) -> str:
    """Worst placements as short as they can be said.

    >>> places([[0, 3, 5, 5], [4, 8, 5, 5]])
    '5x5 at 0,3 and 4,8'
    """
    boxes = worst if worst and isinstance(worst[0], list) else [worst]
    shapes: dict[str, list[str]] = {}
    for top, left, height, width in boxes:
        shapes.setdefault(f"{height}x{width}", []).append(f"{top},{left}")
    return "; ".join(f"{shape} at {' and '.join(corners)}" for shape, corners in shapes.items())
