"""Growth of time and memory with images, classes, image size, number of patches, threads and workers.

    python benchmarks/cost_growth.py --out results/speed/cost-growth.json

Every point is `bagcert.evaluation.evaluate.evaluate` in a process of its own, on random images with a network of
random weights: the one of the recipe `cifar10-cpu`, double masking. Seconds are medians of whole passes, without start
and loading; memory is the most that the process has held. Each series has the straight line nearest to its points, and
how far the farthest point lies from it. About seven minutes on two quiet cores.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

RECIPE, RULE = "cifar10-cpu", "double-masking"
STRAIGHT = 0.10  # a line whose farthest point is nearer than this needs no explanation
QUANTITIES = ("seconds", "forward_seconds", "rule_seconds", "peak_memory_mib")


@dataclass(frozen=True)
class Point:
    """What one process certifies."""

    images: int = 1024
    classes: int = 10
    side_px: int = 32
    patches: tuple[str, ...] = ("5",)
    threads: int = 2
    workers: int = 1
    repeat: int = 3


@dataclass(frozen=True)
class Series:
    """Points that differ in one thing, counted by `x`; `why` explains what is no straight line."""

    x: str
    points: list[tuple[float, Point]]
    why: str


def all_series(quick: bool) -> dict[str, Series]:
    """Every series; with `quick` of a few images, to try the command."""
    base = Point(images=16, threads=1, repeat=1) if quick else Point()
    few = replace(base, images=8 if quick else 512)
    counts = (16, 32, 48) if quick else (512, 1024, 2048, 4096, 8192)
    classes = (10, 20) if quick else (10, 100, 250, 500, 1000)
    sides = (32, 64) if quick else (32, 64, 96, 128, 160)
    sizes = ("5", "3") if quick else ("5", "3", "4", "6", "7", "2x8")
    most = 2 if not quick else 1
    single = replace(base, images=4 * base.images, threads=1)
    return {
        "images": Series(
            "images",
            [(n, replace(base, images=n)) for n in counts],
            "Every image costs the same. Memory grows by the records, which are kept until they are written.",
        ),
        "classes": Series(
            "classes",
            [(n, replace(few, classes=n)) for n in classes],
            "The body of the network costs the same for any number of classes; its last layer and the rule's sums grow "
            "with them. Up to some number of classes the maps of a batch fit into the processor's caches.",
        ),
        "image size": Series(
            "pixels",
            [(n * n, replace(few, images=max(8, few.images // 4), side_px=n)) for n in sides],
            "The network is linear in the pixels. The rule is not: windows grow with the regions, a sum over every "
            "window is two matrix products, and above 1,024 regions (128x128 px at stride 4) sums need float64.",
        ),
        "patch sizes": Series(
            "patch sizes asked at once",
            [(n, replace(base, patches=sizes[:n])) for n in range(1, len(sizes) + 1)],
            "One forward pass serves all. Each size adds a run of the rule, and larger patches leave more to search.",
        ),
        "threads": Series(
            "threads",
            [(n, replace(single, threads=n)) for n in range(1, most + 1)],
            "Layers split over threads wait for each other, and memory bandwidth is shared.",
        ),
        "workers": Series(
            "workers of one thread",
            [(n, replace(single, workers=n)) for n in range(1, most + 1)],
            "Workers share no work, only memory bandwidth and the processor's clock; each holds the model once.",
        ),
    }


def measure(point: Point) -> dict[str, Any]:
    """What this process needs for its point. Imports are late, so that the parent process stays small."""
    import torch

    from bagcert.data.image_set import ArraySource, ImageSet
    from bagcert.defenses.bagcert import BagCert
    from bagcert.devices import peak_memory_mib, tune_malloc
    from bagcert.evaluation.evaluate import evaluate
    from bagcert.nets import get_architecture
    from bagcert.nets.region_scorer import RegionScorer
    from bagcert.training.held_out import scale_of, validation_scores
    from bagcert.training.recipe import load_recipe

    torch.set_num_threads(point.threads)
    torch.manual_seed(0)
    tune_malloc()
    recipe = load_recipe(RECIPE).model
    shape = get_architecture(recipe.architecture)
    net = shape.build(point.classes, recipe.width or shape.width, recipe.depth or shape.depth, recipe.padded)
    names = [str(number) for number in range(point.classes)]
    scorer = RegionScorer(net, names, (point.side_px, point.side_px)).fold_batch_norm()
    scorer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (point.images, point.side_px, point.side_px, 3), dtype=np.uint8)
    labels = np.arange(point.images) % point.classes
    images = ImageSet("random", "test", labels, tuple(names), ArraySource(pixels, "random"))
    scorer.scale = scale_of(validation_scores(scorer, pixels[:16]))
    model = BagCert(scorer, RULE, patch=point.patches[0])
    evaluate(model, images.take(8), patches=point.patches)  # warms up
    before = peak_memory_mib()
    # As many images at a time as the package's own networks take, but no more scores than fit 64 MiB.
    regions = int(np.prod(scorer.grid().map_size))
    batch_size = max(1, min(250, 2**24 // (regions * point.classes)))
    found = evaluate(model, images, patches=point.patches, batch_size=batch_size, repeat=point.repeat)
    rule = sum(row.seconds for row in found.info.results)
    return {
        "seconds": found.info.seconds["forward"] + rule,
        "forward_seconds": found.info.seconds["forward"],
        "rule_seconds": rule,
        "peak_memory_mib": peak_memory_mib(),
        "memory_before_mib": before,
        "batch_size": batch_size,
        "record_bytes_per_image": sum(len(record.to_json()) + 1 for record in found.records) / len(found.records),
        "versions": found.info.versions,
    }


def run(point: Point) -> dict[str, Any]:
    """The point in a fresh process, or in several at once, each with its share of the images."""
    share = replace(point, images=point.images // point.workers)
    command = [sys.executable, __file__, "--point", json.dumps(asdict(share))]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(point.workers)]
    outputs = [process.communicate()[0] for process in processes]
    if failed := [process.returncode for process in processes if process.returncode]:
        raise SystemExit(f"a process ended with code {failed[0]}")
    found = [json.loads(output.splitlines()[-1]) for output in outputs]
    slowest = max(found, key=lambda each: each["seconds"])
    return {**slowest, "peak_memory_mib": sum(each["peak_memory_mib"] for each in found)}


def line(x: list[float], y: list[float]) -> dict[str, float]:
    """The straight line nearest to the points, and the largest distance of a point from it as a share of the point."""
    slope, intercept = np.polyfit(x, y, 1)
    away = np.abs(np.array(y) - (intercept + slope * np.array(x))) / np.maximum(np.abs(y), 1e-9)
    return {"intercept": float(intercept), "slope": float(slope), "largest_deviation": round(float(away.max()), 4)}


def main() -> None:
    """Measures all series, writing after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/speed/cost-growth.json"))
    parser.add_argument("--quick", action="store_true", help="a few images, to try the command; no figures to keep")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.point:
        values = json.loads(arguments.point)
        print(json.dumps(measure(Point(**{**values, "patches": tuple(values["patches"])}))))
        return
    from bagcert.io.files import write_atomically

    result: dict[str, Any] = {
        "command": "python benchmarks/cost_growth.py" + (" --quick" if arguments.quick else ""),
        "recipe": RECIPE,
        "rule": RULE,
        "device": "cpu",
        "cores": os.cpu_count(),
        "load_average_before": round(os.getloadavg()[0], 2),
        "straight_below": STRAIGHT,
        "series": {},
    }
    for name, series in all_series(arguments.quick).items():
        rows = []
        for x, point in series.points:
            found = run(point)
            result["versions"] = found.pop("versions")
            settings = {key: value for key, value in asdict(point).items() if key != "repeat"}
            rows.append({"x": x, **settings, "repeat": point.repeat, **found})
            print(name, x, {key: round(found[key], 3) for key in QUANTITIES}, flush=True)
        xs = [row["x"] for row in rows]
        # Any two points lie on a line, so they are given none.
        fits = {key: line(xs, [row[key] for row in rows]) for key in QUANTITIES} if len(rows) > 2 else {}
        result["series"][name] = {"x": series.x, "points": rows, "lines": fits, "why": series.why}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
