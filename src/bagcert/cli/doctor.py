"""`bagcert doctor`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bagcert.cli.console import fail, print_json, print_table, progress, say
from bagcert.cli.options import Device, Dtype, Json, Model, OnePatch
from bagcert.errors import UnreadableError
from bagcert.records import SCHEMA_VERSION

if TYPE_CHECKING:
    from bagcert.defenses.bagcert import BagCert
    from bagcert.locality import LocalityReport


def doctor(
    model: Model,
    onnx: Annotated[
        Path | None, typer.Option(metavar="FILE.onnx", help="Measure this file, exported from MODEL, in onnxruntime.")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "float32",
    patch: OnePatch = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Measure on these images how much certified accuracy a guard costs: digits, cifar10, or a path as "
            "for evaluate. Default: not measured."
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, metavar="N", help="Use at most N images of --data.")] = 1000,
    json: Json = False,
) -> None:
    """Measure whether scores outside the patch's footprint change on this device and dtype.

    Certificates assume that they do not. Exit code 0: no score changed (exact), or the changes are small enough to be
    covered by a guard (guarded). Exit code 4: certificates of this model are not valid here (refused).
    """
    from bagcert.defenses.bagcert import load
    from bagcert.locality import measure, measure_onnx
    from bagcert.locality.cache import keep

    loaded = load(model, device, dtype=dtype, checked=False)
    batch = None if data is None else _first_images(loaded, data)
    with progress("measuring"):
        report = measure_onnx(onnx, loaded, patch, batch) if onnx is not None else measure(loaded, patch, images=batch)
    if onnx is None and patch is None:
        keep(loaded, report)
    cost: list[dict[str, Any]] = []
    if data is not None and onnx is None and report.consequence != "refused":
        cost = _cost(loaded, report, data, patch, images)
    if json:
        print_json({"schema_version": SCHEMA_VERSION, **report.to_dict(), "cost": cost})
    else:
        _print(report, cost)
    if report.consequence == "refused":
        fail(f"{report.model} is refused: {report.reason}", 4)


def _first_images(loaded: "BagCert", data: str) -> Any:
    """Loads a few images of a data set as network input, float [images, channels, height, width]."""
    import numpy as np

    from bagcert.data import load_dataset
    from bagcert.data.photo import as_batch
    from bagcert.data.preprocess import Preprocessing

    found = load_dataset(data, "test", 16)
    preprocessing = Preprocessing(loaded.image_size)
    photos = [photo for photo in found.read_each(range(len(found))) if not isinstance(photo, UnreadableError)]
    if not photos:
        return None
    return as_batch(np.stack([preprocessing.apply(photo) for photo in photos]))[:, : loaded.scorer.channels]


def _cost(
    loaded: "BagCert", report: "LocalityReport", data: str, patch: str | None, count: int
) -> list[dict[str, Any]]:
    """Measures certified accuracy without a guard, with a guard against leaks, and with one against leaks and drift."""
    from bagcert.data import load_dataset
    from bagcert.evaluation.evaluate import evaluate

    found = load_dataset(data, "test", count)
    cost: list[dict[str, Any]] = []
    with progress("certifying") as show:
        for guard, tolerance in (
            ("none", 0.0),
            ("leak", report.tolerance()),
            ("leak and drift", report.tolerance(portable=True)),
        ):
            if guard == "leak and drift" and report.across_configurations == "refused":
                continue
            loaded.scorer.tolerance = tolerance
            row = evaluate(loaded, found, patches=[patch] if patch else [], on_progress=show).info.results[0]
            certified = row.certified_accuracy
            cost.append(
                {
                    "guard": guard,
                    "tolerance_z": tolerance,
                    "rule": row.rule,
                    "threat": row.threat,
                    "images": len(found),
                    **({"notes": list(found.notes)} if found.notes else {}),
                    "certified_accuracy": certified,
                    "certified_accuracy_lost": cost[0]["certified_accuracy"] - certified if cost else 0.0,
                }
            )
    return cost


def _print(report: "LocalityReport", cost: list[dict[str, Any]]) -> None:
    rows = []
    for probe in report.probes:
        change = "0" if probe.largest_z == 0 else f"{probe.largest_z:.3g}"
        rows.append((probe.name, probe.kind, str(probe.trials), change, str(probe.largest_levels)))
    patches = ", ".join(f"{height}x{width}" for height, width in report.patches)
    say(f"{report.model}: {report.backend} on {report.device}, {report.dtype}, patches of {patches} px")
    print_table(rows, ("probe", "kind"), ("images", "largest change, z", "largest change, levels"))
    for sentence in sentences(report):
        say(sentence)
    for note in cost[0].get("notes", ()) if cost else ():
        say(f"note: the guards are compared on {note}")
    for row in cost:
        say(
            f"  guard against {row['guard']:<15} tolerance {row['tolerance_z']:.3g}  certified "
            f"{row['certified_accuracy']:.2%}  (lost {row['certified_accuracy_lost']:.2%}, {row['threat']} by "
            f"{row['rule']}, {row['images']:,} images)"
        )


def sentences(report: "LocalityReport") -> list[str]:
    """Describes the result of a measurement in sentences."""
    footprint = {
        "equal": "NaN reaches exactly the regions that are declared to see it.",
        "inside": "NaN reaches fewer regions than are declared to see it.",
        "larger": "NaN reaches regions that are declared not to see it.",
        "unmeasured": "The reach of NaN in single rows and columns was not measured.",
    }
    found = [f"footprint: {footprint[report.footprint]}"]
    if report.nan_spreads and report.cannot_overflow:
        found.append(
            f"  No value in this network can exceed {report.activation_bound:.1e}, so there is no NaN to spread."
        )
    within = {
        "exact": "exact: not one bit outside a patch's reach moved.",
        "guarded": f"guarded: scores moved by up to {report.leak_z:.3g} ({report.leak_levels} levels); what could "
        f"change within {report.tolerance():.3g} counts for the attacker, certificates are marked locality: measured.",
        "refused": f"refused: {report.reason}.",
    }
    found.append(f"within one configuration: {within[report.consequence]}")
    if report.consequence == "refused":
        return found
    across = {
        "exact": "exact: other batch sizes and threads give the same bits.",
        "guarded": f"scores moved by up to {report.drift_z:.3g} ({report.drift_levels} levels); certificates that are "
        "to hold there as well need load(..., portable=True), which guards against "
        f"{report.tolerance(portable=True):.3g}.",
        "refused": f"scores moved by up to {report.drift_z:.3g}: certify with the batch size and threads you deploy.",
    }
    return [*found, f"across batch sizes and threads: {across[report.across_configurations]}"]
