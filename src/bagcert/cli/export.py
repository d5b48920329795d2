"""`bagcert export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagcert.cli.console import check_output, print_json, progress, say
from bagcert.cli.options import ExportedRule, Fit, Json, Model, OnePatch, Placements

if TYPE_CHECKING:
    from bagcert.defenses.bagcert import BagCert
    from bagcert.exporting.writer import Calibration, Exported

STEPS = 6  # at most, for the progress bar
CHECK_IMAGES = 48


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.onnx", help="Where to write.")],
    patch: OnePatch = None,
    rule: ExportedRule = None,
    placements: Placements = None,
    data: Annotated[
        str | None,
        typer.Option(help="Real images to compare answers on: digits, cifar10, or a path as for evaluate."),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize the network to 8 bits, statically, with --calibration images.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Labelled images for --int8: every other one finds the ranges, the rest measure what it costs.",
        ),
    ] = None,
    calibration_images: Annotated[int, typer.Option(min=2, metavar="N", help="How many of them.")] = 1000,
    split: Annotated[str, typer.Option(help="Which part of the data to take images from.")] = "train",
    fit: Fit = "squash",
    json: Json = False,
) -> None:
    """Write a model with its rule and its proof as one ONNX file, which any ONNX runtime runs without bagcert.

    Input: images float32 [N, 3, height, width] in [0, 1]. Outputs: label, certified, margin and scores, as certify
    gives them. The file is compared with the package's own rules before it is written; exit code 4 and no file if it
    differs.
    """
    from bagcert.defenses.bagcert import load
    from bagcert.errors import UsageError
    from bagcert.exporting.writer import export as run
    from bagcert.records import SCHEMA_VERSION

    check_output(out, ".onnx")
    if int8 and calibration is None:
        raise UsageError(
            "--int8 needs --calibration DATA: without calibration images ranges would be taken from each image as a "
            "whole (dynamic quantization), where a patch moves every score and no certificate holds"
        )
    if calibration is not None and not int8:
        raise UsageError("--calibration is for --int8, which was not given")
    with progress("reading"):
        loaded = load(model, device="cpu", checked=False)
        images = None if data is None else _images(loaded, data, split, CHECK_IMAGES, fit).images
        samples = None if calibration is None else _images(loaded, calibration, split, calibration_images, fit)
    with progress("exporting") as report:
        done = iter(range(STEPS * 2))
        found = run(
            loaded,
            out,
            patch=patch,
            rule=rule,
            placements=placements,
            images=images,
            calibration=samples,
            on_step=lambda step: report(min(next(done), STEPS), STEPS, step),
        )
    if json:
        print_json({"schema_version": SCHEMA_VERSION, **found.to_dict()})
    else:
        _print(found)


def _images(model: "BagCert", data: str, split: str, count: int, fit: str) -> "Calibration":
    """Labelled images of a data set as the network takes them; those that cannot be read are left out."""
    import numpy as np

    from bagcert.data import load_dataset
    from bagcert.data.photo import as_batch
    from bagcert.data.preprocess import Preprocessing
    from bagcert.errors import UnreadableError
    from bagcert.evaluation.evaluate import labels_for
    from bagcert.exporting.writer import Calibration

    found = load_dataset(data, split, count)
    labels, preprocessing = labels_for(model, found), Preprocessing(model.image_size, fit)
    read = found.prepare_each(range(len(found)), preprocessing.apply)
    good = {number: pixels for number, pixels in enumerate(read) if not isinstance(pixels, UnreadableError)}
    if not good:
        raise UnreadableError(f"no image of {found.name} can be read; the first: {read[0]}")
    kept, batch = list(good), as_batch(np.stack(list(good.values())))
    return Calibration(batch[:, : model.scorer.channels], labels[kept].astype(np.int64))


def _print(found: "Exported") -> None:
    check, about = found.check, found.metadata
    lines = [
        f"{', '.join(found.files)}: {about['model']}, {about['rule']} against {about['patch']} px",
        f"  locality in onnxruntime: {found.locality}"
        + (f" (scores moved by up to {found.leak_z:.3g}, which counts for the attacker)" if found.leak_z else ""),
    ]
    answers = (
        f"  onnxruntime: every answer on {check.maps} made-up score maps and {check.images} images is that of the "
    )
    lines.append(
        f"{answers}the rule; {check.same_verdicts} of {check.images} are torch's to the last unit of the margin, "
        f"{check.scores_moved:.3%} of the scores differ by rounding"
        if about["quantization"] == "none"
        else f"{answers}the rule on the file's own scores"
    )
    if found.accuracy is not None:
        for name in ("float32", "int8"):
            figures = found.accuracy[name]
            lines.append(
                f"  {name}: clean {figures['clean_accuracy']:.1%}, certified {figures['certified_accuracy']:.1%} on "
                f"{found.accuracy['images']} images beside the {found.accuracy['calibration_images']} for calibration"
            )
    for line in lines:
        say(line)
