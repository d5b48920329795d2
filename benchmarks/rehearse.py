"""Rehearsal of a recipe on random images: seconds per step, memory, FLOPs, and an estimate of the whole training.

    python benchmarks/rehearse.py imagenet-bagcert --classes 1000 --batch-size 4 8 --steps 4

The training is the real one (`bagcert.training.loop.train`), on random uint8 images of the recipe's size and with
its own precision, augmentation and loss; only batch size and length differ. What it measures stands under `measured`.
The hours on several accelerators are extrapolated: on the CPU from a throughput that is assumed, on an accelerator
from the one just measured.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.devices import peak_memory_mib, resolve_device
from bagcert.evaluation.evaluate import versions
from bagcert.io.files import write_atomically
from bagcert.nets import get_architecture
from bagcert.training.loop import Progress, train
from bagcert.training.recipe import Recipe, load_recipe

UNTIMED = 2  # steps: the first warms up, the last also validates and saves
IMAGENET = 1_281_167  # training images


def random_images(count: int, size: tuple[int, int], classes: int) -> ImageSet:
    """Random uint8 images, made when they are asked for; image i is of class i mod classes."""

    def image(row: int) -> Photo:
        pixels = np.random.default_rng(row).integers(0, 256, (*size, 3), dtype=np.uint8)
        return Photo(pixels, source=f"random image {row}")

    labels = np.arange(count) % classes
    return ImageSet("random", "train", labels, tuple(str(label) for label in range(classes)), image)


def input_size(recipe: Recipe) -> tuple[int, int]:
    """(height_px, width_px) of the network's input."""
    return recipe.model.image_size or get_architecture(recipe.model.architecture).image_size


def arithmetic(recipe: Recipe, classes: int) -> dict[str, int]:
    """Multiply-adds of a forward pass of one image, and the floating-point operations of training on it once."""
    architecture = get_architecture(recipe.model.architecture)
    width, depth = recipe.model.width or architecture.width, recipe.model.depth or architecture.depth
    with torch.device("meta"):
        net = architecture.build(classes, width, depth, recipe.model.padded)
        image = torch.empty(1, 3, *input_size(recipe))
    with FlopCounterMode(display=False) as forward:
        net(image)
    with FlopCounterMode(display=False) as both:
        net(image).sum().backward()
    return {
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "multiply_adds_per_image": forward.get_total_flops() // 2,
        "training_flop_per_image": both.get_total_flops(),
    }


def rehearse(recipe: Recipe, classes: int, batch_size: int, steps: int, device: torch.device) -> dict[str, Any]:
    """Trains a few steps and times each; the memory is the most the process, or the accelerator, has held so far."""
    count, held_out = (steps + UNTIMED) * batch_size, max(1, batch_size // 2)
    changes = {
        "data": {"validation": held_out / (count + held_out)},
        "train": {"batch_size": batch_size, "epochs": 1, "validate_every": 1, "checkpoint_every": 10**6},
    }
    short = recipe.model_copy(
        update={name: getattr(recipe, name).model_copy(update=values) for name, values in changes.items()}
    )
    size = (recipe.augment.resize, recipe.augment.resize) if recipe.augment.resize else input_size(recipe)
    ends: list[float] = []

    def step_done(progress: Progress) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.perf_counter())

    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder:
        train(
            short,
            Path(folder),
            random_images(count + held_out, size, classes),
            device=str(device),
            on_progress=step_done,
        )
    seconds = np.diff(ends)[:steps]
    peak = torch.cuda.max_memory_allocated(device) // 2**20 if device.type == "cuda" else peak_memory_mib()
    return {
        "batch_size": batch_size,
        "steps": len(seconds),
        "seconds_per_step": {
            "median": round(float(np.median(seconds)), 4),
            "least": round(float(seconds.min()), 4),
            "most": round(float(seconds.max()), 4),
        },
        "images_per_second": round(batch_size / float(np.median(seconds)), 3),
        "peak_memory_mib": peak,
    }


def extrapolate(recipe: Recipe, measured: dict[str, Any], assumed: dict[str, Any], on_cpu: bool) -> dict[str, Any]:
    """The whole training: here at the measured speed, and on several accelerators."""
    images = assumed["training_images"] * recipe.train.epochs
    flop = images * measured["training_flop_per_image"]
    fastest = max(run["images_per_second"] for run in measured["runs"])
    if on_cpu:
        each = assumed["tflops_per_accelerator"] * 1e12 / measured["training_flop_per_image"]
        speed_from = "tflops_per_accelerator, which is assumed"
    else:
        each, speed_from = fastest, "the throughput measured on this accelerator"
    together = each * assumed["accelerators"] * assumed["scaling_efficiency"]
    result = {
        "training_flop": flop,
        "hours_here": round(images / fastest / 3600, 1),
        "accelerator_speed_from": speed_from,
        "images_per_second_on_accelerators": round(together, 1),
        "hours_on_accelerators": round(images / together / 3600, 1),
    }
    if len(measured["runs"]) > 1:
        first, last = measured["runs"][0], measured["runs"][-1]
        each_image = (last["peak_memory_mib"] - first["peak_memory_mib"]) / (last["batch_size"] - first["batch_size"])
        share = recipe.train.batch_size / assumed["accelerators"]
        whole = last["peak_memory_mib"] + each_image * (share - last["batch_size"])
        result["mib_per_image_of_a_batch"] = round(each_image, 1)
        result["mib_per_accelerator_at_the_recipes_batch"] = round(whole)
    return result


def main() -> None:
    """Rehearses and writes `results/rehearsals/<recipe>.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--classes", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=4, help="timed steps for each batch size")
    parser.add_argument(
        "--batch-size", type=int, nargs="+", default=[4, 8], help="growing; memory is a high-water mark"
    )
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to the recipe")
    parser.add_argument("--training-images", type=int, default=IMAGENET, help="assumed size of the data set")
    parser.add_argument("--accelerators", type=int, default=8)
    parser.add_argument("--tflops", type=float, default=60.0, help="assumed: sustained in training by one accelerator")
    parser.add_argument("--scaling-efficiency", type=float, default=0.9, help="assumed: of several accelerators")
    parser.add_argument("--out", type=Path, help="results/rehearsals/RECIPE.json when absent")
    arguments = parser.parse_args()
    if sorted(set(arguments.batch_size)) != arguments.batch_size or arguments.batch_size[0] < 2 or arguments.steps < 1:
        parser.error("--batch-size needs growing numbers from 2, --steps at least 1")
    recipe = load_recipe(arguments.recipe, arguments.set)
    device = resolve_device(arguments.device)
    load_before = os.getloadavg()[0]
    runs = []
    for batch_size in arguments.batch_size:
        runs.append(rehearse(recipe, arguments.classes, batch_size, arguments.steps, device))
        print(json.dumps(runs[-1]), flush=True)
    measured = {**arithmetic(recipe, arguments.classes), "runs": runs}
    speeds = [run["images_per_second"] for run in runs]
    measured["tflops_here"] = round(statistics.median(speeds) * measured["training_flop_per_image"] / 1e12, 4)
    assumed = {
        "training_images": arguments.training_images,
        "epochs": recipe.train.epochs,
        "accelerators": arguments.accelerators,
        "tflops_per_accelerator": arguments.tflops,
        "scaling_efficiency": arguments.scaling_efficiency,
    }
    result = {
        "command": f"python benchmarks/rehearse.py {arguments.recipe} --classes {arguments.classes} --steps "
        f"{arguments.steps} --batch-size {' '.join(map(str, arguments.batch_size))}"
        + (f" --set {' '.join(arguments.set)}" if arguments.set else ""),
        "recipe": recipe.name,
        "architecture": recipe.model.architecture,
        "image_size_px": list(input_size(recipe)),
        "classes": arguments.classes,
        "precision": recipe.train.precision,
        "batch_size_of_recipe": recipe.train.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "threads": torch.get_num_threads(),
        "load_average_before": round(load_before, 2),
        "versions": versions(),
        "measured": measured,
        "assumed": assumed,
        "extrapolated": extrapolate(recipe, measured, assumed, device.type == "cpu"),
    }
    out = arguments.out or Path("results/rehearsals") / f"{recipe.name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result["extrapolated"]), flush=True)


if __name__ == "__main__":
    main()
