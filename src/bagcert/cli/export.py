"""`bagcert export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagcert.cli.console import check_output, print_json, progress, say
from bagcert.cli.options import ExportedRule, Fit, Json, Model, OnePatch, Placements

if TYPE_CHECKING:
    from bagcert.defenses.bagcert import BagCert
    from bagcert.exporting.writer import Calibration, Exported

STEPS = 6  # upper bound, for the progress bar
CHECK_IMAGES = 48


def export(
    model: Model,
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE.onnx", help="Output file.")],
    patch: OnePatch = None,
    rule: ExportedRule = None,
    placements: Placements = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Images on which the file is compared with the package: digits, cifar10, or a path as for evaluate. "
            "Default: made-up inputs."
        ),
    ] = None,
    int8: Annotated[
        bool, typer.Option("--int8", help="Quantize the network statically to 8 bits. Needs --calibration.")
    ] = False,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Labeled images for --int8: half calibrate the ranges, the other half measure the accuracy loss.",
        ),
    ] = None,
    calibration_images: Annotated[int, typer.Option(min=2, metavar="N", help="Number of --calibration images.")] = 1000,
    split: Annotated[str, typer.Option(help="Dataset split of --data and --calibration.")] = "train",
    fit: Fit = "squash",
    json: Json = False,
) -> None:
    """Export a model, its rule and its certification as one ONNX file, which any ONNX runtime runs without bagcert.

    Input: images, float32 [N, 3, height, width] in [0, 1]. Outputs: label, certified, margin and scores, the same as
    from certify. The file is compared with the package's rules before it is written. If they differ, no file is
    written and the exit code is 4.
    """
    from bagcert.defenses.bagcert import load
    from bagcert.errors import UsageError
    from bagcert.exporting.writer import export as run
    from bagcert.records import SCHEMA_VERSION

    check_output(out, ".onnx")
    if int8 and calibration is None:
        raise UsageError(
            "--int8 needs --calibration DATA: without calibration images, the ranges would be computed from each whole "
            "image (dynamic quantization), so a patch would change every score and no certificate would hold"
        )
    if calibration is not None and not int8:
        raise UsageError("--calibration needs --int8")
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
    """Loads labeled images of a data set as network input. Skips images that cannot be read."""
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
        raise UnreadableError(f"no image of {found.name} can be read; first error: {read[0]}")
    kept, batch = list(good), as_batch(np.stack(list(good.values())))
    return Calibration(batch[:, : model.scorer.channels], labels[kept].astype(np.int64))


def _print(found: "Exported") -> None:
    check, about = found.check, found.metadata
    lines = [
        f"{', '.join(found.files)}: {about['model']}, {about['rule']} against {about['patch']} px",
        f"  locality in onnxruntime: {found.locality}"
        + (f" (scores changed by up to {found.leak_z:.3g}, which counts for the attacker)" if found.leak_z else ""),
    ]
    answers = f"  onnxruntime: all verdicts on {check.maps} random score maps and {check.images} images agree with "
    lines.append(
        f"{answers}the rule; {check.same_verdicts} of {check.images} have exactly the verdict and margin of torch, "
        f"{check.scores_moved:.3%} of the scores differ by rounding"
        if about["quantization"] == "none"
        else f"{answers}the rule on the file's scores"
    )
    if found.accuracy is not None:
        for name in ("float32", "int8"):
            figures = found.accuracy[name]
            lines.append(
                f"  {name}: clean {figures['clean_accuracy']:.1%}, certified {figures['certified_accuracy']:.1%} on "
                f"{found.accuracy['images']} images (calibrated on {found.accuracy['calibration_images']} others)"
            )
    for line in lines:
        say(line)
