"""`bagcert export`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagcert.cli.certify import places
from bagcert.cli.console import check_output, print_json, progress, say
from bagcert.cli.options import ExportedRule, Fit, Json, MasksPerAxis, Model, OnePatch, Placements
from bagcert.errors import UnreadableError, UsageError
from bagcert.records import SCHEMA_VERSION, in_unit

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
    masks_per_axis: MasksPerAxis = None,
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
    vnnlib: Annotated[
        Path | None,
        typer.Option(
            "--vnnlib",
            metavar="IMAGE",
            help="Write a property of this image for neural network verifiers instead: FILE.onnx with one value per "
            "class, and FILE.vnnlib, which asserts that a patch at --at changes the class.",
        ),
    ] = None,
    at: Annotated[
        str | None,
        typer.Option(
            metavar="TOP,LEFT,HEIGHT,WIDTH",
            help="Placement of the patch for --vnnlib, in px of the resized image. Default: the worst placement.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Export a model, its rule and its certification as one ONNX file, which any ONNX runtime runs without bagcert.

    Input: images, float32 [N, 3, height, width] in [0, 1]. Outputs: label, certified, margin and scores, the same as
    from certify. The file is compared with the package's rules before it is written. If they differ, no file is
    written and the exit code is 4.

    With --vnnlib, the files describe one image and one patch placement. A verifier that answers unsat confirms the
    certificate; sat is a counterexample.
    """
    from bagcert.defenses.bagcert import load
    from bagcert.exporting.writer import export as run

    check_output(out, ".onnx")
    if vnnlib is not None:
        if data is not None or int8 or calibration is not None or placements is not None:
            raise UsageError("--vnnlib cannot be combined with --data, --int8, --calibration or --placements")
        _export_property(model, vnnlib, at, out, patch, rule, masks_per_axis, fit, json)
        return
    if at is not None:
        raise UsageError("--at needs --vnnlib IMAGE")
    if int8 and calibration is None:
        raise UsageError(
            "--int8 needs --calibration DATA: without calibration images, the ranges would be computed from each whole "
            "image (dynamic quantization), so a patch would change every score and no certificate would hold"
        )
    if calibration is not None and not int8:
        raise UsageError("--calibration needs --int8")
    with progress("reading"):
        loaded = load(model, device="cpu", checked=False, masks_per_axis=masks_per_axis)
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
        _print(found, loaded.image_size)


def _export_property(
    model: str,
    image: Path,
    at: str | None,
    out: Path,
    patch: str | None,
    rule: str | None,
    masks_per_axis: int | None,
    fit: str,
    json: bool,
) -> None:
    from bagcert.data.photo import read_image
    from bagcert.data.preprocess import Preprocessing
    from bagcert.defenses.bagcert import load
    from bagcert.exporting.vnnlib import write_property

    placement = None if at is None else _placement(at)
    with progress("exporting"):
        loaded = load(model, device="cpu", masks_per_axis=masks_per_axis)
        pixels = Preprocessing(loaded.image_size, fit).apply(read_image(image))
        if placement is None:
            found = loaded.certify(pixels[None], patch=patch, rule=rule)
            top, left, height, width = found.worst_placement[0, 0].tolist()
            placement = (top, left, height, width)
        label = write_property(loaded, pixels, placement, out, patch=patch, rule=rule)
    files = [str(out), str(out.with_suffix(".vnnlib"))]
    name, size = loaded.class_names[label], "x".join(map(str, loaded.image_size))
    if json:
        facts = {"files": files, "label": label, "class_name": name, "placement": list(placement)}
        print_json({"schema_version": SCHEMA_VERSION, **facts})
    else:
        say(f"{', '.join(files)}: {name}, patch {places(list(placement))}, in px of the {size} input")


def _placement(text: str) -> tuple[int, int, int, int]:
    """Parses TOP,LEFT,HEIGHT,WIDTH.

    >>> _placement("3,4,5,5")
    (3, 4, 5, 5)
    """
    parts = [part.strip() for part in text.split(",")]
    if len(parts) != 4 or not all(part.isascii() and part.isdigit() and len(part) < 10 for part in parts):
        raise UsageError(f"--at must be TOP,LEFT,HEIGHT,WIDTH in whole px, such as 3,4,5,5; got {text!r}")
    top, left, height, width = map(int, parts)
    return top, left, height, width


def _images(model: "BagCert", data: str, split: str, count: int, fit: str) -> "Calibration":
    """Loads labeled images of a data set as network input. Skips images that cannot be read."""
    import numpy as np

    from bagcert.data import load_dataset
    from bagcert.data.photo import as_batch
    from bagcert.data.preprocess import Preprocessing
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


def _print(found: "Exported", image_size: tuple[int, int]) -> None:
    check, about = found.check, found.metadata
    patch = in_unit(about["patch"], "at " + "x".join(map(str, image_size)))
    lines = [
        f"{', '.join(found.files)}: {about['model']}, {about['rule']} against {patch}",
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
