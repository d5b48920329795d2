"""Benchmark of certified defenses: same training data and budget, evaluated in the same run.

Every training step costs the same and every network sees the same number of training images, so that differences in
accuracy are due to the method. The cost of deployment is reported with the accuracy. Writes one JSON file per defense
and patch, and the records of its images. Existing files are kept, so that a run can be resumed.
"""

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from pydantic import TypeAdapter, ValidationError

from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.defenses.base import Detector
from bagcert.defenses.table import DEFENSES, TRAININGS, Setting, get_entry
from bagcert.devices import tune_malloc
from bagcert.errors import UnreadableError, UsageError
from bagcert.evaluation.evaluate import versions
from bagcert.io.files import read_regular, write_together
from bagcert.nets import get_architecture
from bagcert.nets.cost import multiply_adds
from bagcert.nets.saved_model import CONFIG, read_model
from bagcert.records import SCHEMA_VERSION, ImageRecord, Record, document, wilson_interval
from bagcert.threat import PatchThreatModel
from bagcert.training.checkpoint import CHECKPOINT
from bagcert.training.loop import train
from bagcert.training.recipe import Recipe, load_recipe

MAX_RESULT_BYTES = 1 << 20
BATCH = 100
TIMED = 200  # images on which the prediction of a slow defense is timed; its predictions come from the certificates


@dataclass(frozen=True)
class Networks:
    """The networks that a benchmark trains, and the training budget.

    Attributes:
        regions, whole, plain: (architecture, depth) of networks with small receptive fields, of networks that see the
            whole image, and of networks for interval bounds.
        multiply_adds: MACs of one forward pass of every network, or of the passes that a training step uses in its
            place; determines the widths.
        column_px, block_px: sizes of the ablations that randomized smoothing keeps.
        some: number of images on which defenses with many forward passes are evaluated.
    """

    recipe: str
    regions: tuple[str, int]
    whole: tuple[str, int]
    plain: tuple[str, int]
    multiply_adds: int
    epochs: int
    column_px: int
    block_px: int
    some: int


SMALL = Networks("digits", ("resnet-rf3", 3), ("resnet-rf13", 6), ("convnet-rf10s4", 1), 1_000_000, 15, 2, 4, 100)
"""For images of up to 16 px."""
LARGE = Networks(
    "cifar10-cpu", ("resnet-rf8s4", 6), ("resnet-rf36s4", 6), ("convnet-rf10s4", 1), 12_000_000, 12, 4, 12, 1000
)
"""For larger ones."""


@dataclass(frozen=True)
class BenchmarkRow:
    """Results of one defense against one patch, as in its JSON file.

    Attributes:
        clean_accuracy: share of images classified correctly; for a detector, correctly and without an alert.
        certified_accuracy: share of images classified correctly and certified.
        images: number of images, chosen by `limit` and `subset_seed`.
        forward_passes: maximum number per image, for `predict` and for `certify`.
        images_per_second: measured speed of `predict` and of `certify`.
        peak_memory_mib: peak memory of the process while the defense ran.
        training: name of the training of its network, which defenses may share; it took `training_seconds`.
    """

    defense: str
    patch: str
    rule: str
    guarantee: str
    data: str
    split: str
    images: int
    limit: int | None
    subset_seed: int | None
    clean_accuracy: float
    certified_accuracy: float
    interval95: dict[str, list[float]]
    parameters: int
    multiply_adds: int
    forward_passes: dict[str, int]
    images_per_second: dict[str, float]
    peak_memory_mib: int
    training: str
    training_seconds: float
    epochs: int
    seed: int
    device: str
    threads: int
    versions: dict[str, str]
    notes: list[str] | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """Returns a JSON-serializable dictionary that starts with the schema version. Empty notes are omitted."""
        return document(self)


_ROW = TypeAdapter(BenchmarkRow)


def benchmark(
    data: str,
    out: Path,
    patches: Sequence[str],
    defenses: Sequence[str] = (),
    limit: int | None = None,
    train_limit: int | None = None,
    epochs: int | None = None,
    multiply_adds: int | None = None,
    seed: int = 0,
    device: str = "auto",
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> list[BenchmarkRow]:
    """Trains missing networks in `out`, evaluates every defense against every patch, and returns the rows.

    Args:
        data: a data set as in `bagcert.data.load_dataset`, with a training and a test split.
        out: for `<defense>-<patch>.json`, their records, and the trained networks under `networks`.
        patches: squares, in the notation of `PatchThreatModel.parse`. Networks are trained once, against the largest.
        defenses: names from `DEFENSES`; all of them when empty.
        limit, train_limit: maximum number of test and training images, see `ImageSet.take`.
        epochs, multiply_adds: epochs of each training and MACs of each pass; by default depending on the image size.
        seed: random seed of trainings and of the choice of images for slow defenses.
        on_progress: called with (current step, done, total).

    Raises:
        UsageError: an unknown defense, a patch that does not fit, or results in `out` that belong to another benchmark.
    """
    entries = {name: get_entry(name) for name in defenses or DEFENSES}
    if not patches:
        raise UsageError("a benchmark needs at least one patch")
    tune_malloc()
    source, images = load_dataset(data, "train", train_limit), load_dataset(data, "test", limit)
    pixels = images.array()
    size = (pixels.shape[1], pixels.shape[2])
    threats = {patch: PatchThreatModel.parse(patch, size) for patch in patches}
    side = max(max(shape) for threat in threats.values() for shape in threat.shapes)
    networks = SMALL if max(size) <= 16 else LARGE
    rows = []
    for name, entry in entries.items():
        recipe = recipe_for(entry.training, networks, source, size, side, seed, epochs, multiply_adds)
        chosen = _some(len(images), networks.some, seed) if entry.slow else np.arange(len(images))
        for patch, threat in threats.items():
            path = out / f"{name}-{patch.replace(',', '+').replace(':', '-')}.json"
            asked = {
                "defense": name,
                "patch": patch,
                "data": images.name,
                "limit": limit,
                "images": len(chosen),
                "notes": _notes(source, images, len(chosen)) or None,
                "epochs": recipe.train.epochs,
                "seed": seed,
            }
            if (row := _kept(path, asked)) is None:
                folder = _trained(recipe, out / "networks" / entry.training, source, device, on_progress)
                row, records = _measured(
                    name, patch, threat, folder, networks, images, pixels, chosen, limit, on_progress
                )
                row = replace(row, notes=_notes(source, images, len(chosen)) or None)
                document = (json.dumps(row.to_dict(), indent=2) + "\n").encode()
                write_together({path: document, path.with_suffix(".records.jsonl"): records})
            rows.append(row)
    return rows


def recipe_for(
    training: str,
    networks: Networks,
    source: ImageSet,
    size: tuple[int, int],
    patch_px: int,
    seed: int,
    epochs: int | None = None,
    multiply_adds: int | None = None,
) -> Recipe:
    """Returns the recipe of a training, with a width at which one forward pass has the MACs of the benchmark."""
    how = TRAININGS[training]
    architecture, depth = {"regions": networks.regions, "whole": networks.whole, "plain": networks.plain}[how.sees]
    sizes = {"patch": patch_px, "column": networks.column_px, "block": networks.block_px}
    changes = [change.format(**sizes) for change in how.changes]
    recipe = load_recipe(
        networks.recipe,
        [
            f"name={training}",
            f"model.architecture={architecture}",
            f"model.depth={depth}",
            f"defense.patch={patch_px}",
            f"train.epochs={epochs or networks.epochs}",
            f"train.seed={seed}",
            *changes,
        ],
    )
    channels = 6 if recipe.augment.ablation != "none" else 3
    budget = (multiply_adds or networks.multiply_adds) // how.passes
    width = width_for(architecture, depth, len(source.class_names), channels, size, budget)
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"width": width})})


def width_for(
    architecture: str, depth: int, classes: int, channels: int, size: tuple[int, int], multiply_adds: int
) -> int:
    """Returns the width, a multiple of 4, whose forward pass is closest to the given number of MACs."""

    def cost(width: int) -> int:
        return cost_of(architecture, depth, classes, channels, size, width)

    width = 8
    while cost(width + 4) <= multiply_adds:
        width += 4
    return width if multiply_adds - cost(width) <= cost(width + 4) - multiply_adds else width + 4


def cost_of(architecture: str, depth: int, classes: int, channels: int, size: tuple[int, int], width: int) -> int:
    """Returns the MACs of one forward pass, without allocating weights."""
    build = get_architecture(architecture).build
    return multiply_adds(lambda: build(classes, width, depth, True, channels), channels, size)


def _notes(source: ImageSet, images: ImageSet, count: int) -> list[str]:
    """Returns the notes of a row: whether only some of the images were used for testing or training."""
    some = [f"tested on {count:,} of these {len(images):,} images, drawn at random"] if count < len(images) else []
    return [f"tested on {note}" for note in images.notes] + [f"trained on {note}" for note in source.notes] + some


def _some(count: int, most: int, seed: int) -> np.ndarray:
    """Draws the numbers of at most `most` images at random, sorted."""
    return np.sort(np.random.default_rng(seed).permutation(count)[:most])


def _kept(path: Path, asked: dict[str, Any]) -> BenchmarkRow | None:
    """Reads the row of an earlier run of the same benchmark, if there is one."""
    try:
        row = _ROW.validate_json(read_regular(path, MAX_RESULT_BYTES))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValidationError, RecursionError):
        raise UnreadableError(f"{path} is not a row of a benchmark; remove it to measure again") from None
    for key, value in asked.items():
        old = key == "notes" and row.notes is None and "sample" not in str(value)  # an older version drew no samples
        if getattr(row, key) != value and not old:
            raise UsageError(
                f"{path} was measured with {key} {getattr(row, key)}, now {value} is asked for; choose another --out"
            )
    return row


def _trained(
    recipe: Recipe, folder: Path, source: ImageSet, device: str, on_progress: Callable[[str, int, int], None]
) -> Path:
    """Returns the folder of the trained network. Trains it if needed, and resumes an unfinished training."""
    resume = (folder / CHECKPOINT).exists()  # an unfinished training also has a model, from its last validation
    if resume or not (folder / CONFIG).exists():
        what = f"training {recipe.name}"
        train(
            recipe, folder, source, resume, device=device, on_progress=lambda at: on_progress(what, at.step, at.steps)
        )
    return folder


def _measured(
    name: str,
    patch: str,
    threat: PatchThreatModel,
    folder: Path,
    networks: Networks,
    images: ImageSet,
    pixels: np.ndarray,
    chosen: np.ndarray,
    limit: int | None,
    on_progress: Callable[[str, int, int], None],
) -> tuple[BenchmarkRow, bytes]:
    """Evaluates one defense against one patch on the chosen images; returns its row, and its records as JSONL."""
    entry = get_entry(name)
    scorer, config = read_model(folder)
    scorer.fold_batch_norm().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = sum(parameter.numel() for parameter in scorer.parameters())
    defense = entry.deploy(Setting(scorer, patch, networks.column_px, networks.block_px))
    seconds = {"predict": 0.0, "certify": 0.0}
    records: list[ImageRecord] = []
    right = certified = 0
    timed = TIMED if entry.slow else len(chosen)
    with _peak_memory() as peak:
        for start in range(0, len(chosen), BATCH):
            numbers = chosen[start : start + BATCH]
            batch, labels = pixels[numbers], torch.from_numpy(images.labels[numbers])
            if start < timed:
                clock = time.perf_counter()
                defense.predict(batch, threat)
                seconds["predict"] += time.perf_counter() - clock
            clock = time.perf_counter()
            certificate = defense.certify(batch, threat)
            seconds["certify"] += time.perf_counter() - clock
            good = certificate.prediction.cpu() == labels
            proved = good & certificate.certified.cpu()
            if isinstance(defense, Detector):
                good &= ~defense.alert(batch, threat).cpu()
            right, certified = right + int(good.sum()), certified + int(proved.sum())
            records += [
                ImageRecord(int(number), int(label), [record])
                for number, label, record in zip(numbers, labels, Record.each(certificate), strict=True)
            ]
            on_progress(f"{name} against {patch}", min(start + BATCH, len(chosen)), len(chosen))
    count = len(chosen)
    row = BenchmarkRow(
        defense=name,
        patch=patch,
        rule=defense.rule,
        guarantee=defense.guarantee,
        data=images.name,
        split=images.split,
        images=count,
        limit=limit,
        subset_seed=config.recipe["train"]["seed"] if count < len(images) else None,
        clean_accuracy=right / count,
        certified_accuracy=certified / count,
        interval95={
            "clean_accuracy": wilson_interval(right, count),
            "certified_accuracy": wilson_interval(certified, count),
        },
        parameters=parameters,
        multiply_adds=multiply_adds(config.build, len(config.mean), config.image_size),
        forward_passes={
            "predict": defense.forward_passes(threat, certify=False),
            "certify": defense.forward_passes(threat, certify=True),
        },
        images_per_second={
            "predict": round(min(timed, count) / seconds["predict"], 2),
            "certify": round(count / seconds["certify"], 2),
        },
        peak_memory_mib=peak[0],
        training=entry.training,
        training_seconds=config.provenance["training_seconds"],
        epochs=config.recipe["train"]["epochs"],
        seed=config.recipe["train"]["seed"],
        device=str(scorer.device),
        threads=torch.get_num_threads(),
        versions=versions(),
    )
    return row, "".join(record.to_json() + "\n" for record in records).encode()


@contextmanager
def _peak_memory() -> Iterator[list[int]]:
    """Context manager that yields a list with the peak memory of the process in MiB, sampled every 20 ms."""
    process, peak, done = psutil.Process(), [0], threading.Event()

    def watch() -> None:
        while True:
            peak[0] = max(peak[0], process.memory_info().rss // 2**20)
            if done.wait(0.02):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        done.set()
        watcher.join()
