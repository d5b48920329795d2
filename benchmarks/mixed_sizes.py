"""Speed on photos of hundreds of sizes compared with the same photos at one size, for `evaluate` and `certify --data`.

Makes smooth random photos whose sizes are spread like those of traffic signs (25 to 266 px, median about 43), once as
they are and once brought to the size of the network's input. Also checks that the records of the mixed photos are those
of one photo at a time, each with a rule call of its own.

python benchmarks/mixed_sizes.py --images 2000 --out results/speed/mixed_sizes.json
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image

from bagcert.bulk.run import certify_many
from bagcert.data import load_dataset
from bagcert.data.preprocess import Preprocessing
from bagcert.defenses.bagcert import BagCert, load
from bagcert.evaluation.evaluate import Evaluation, evaluate, versions
from bagcert.io.files import write_atomically
from bagcert.records import Record
from bagcert.rules import get_rule
from bagcert.threat import PatchThreatModel


def main() -> None:
    """Measures both commands on both folders, alternating; the JSON holds medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--patch", action="append", help="repeat for several; default: 2, 5 and 2%%")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--check", type=int, default=200, help="photos compared with one at a time")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    patches = arguments.patch or ["2", "5", "2%"]
    load_average = psutil.getloadavg()
    model = load(arguments.model, "cpu")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = make_photos(folder, arguments.images, model)
        seconds: dict[str, dict[str, list[float]]] = {
            command: {"mixed": [], "one": []} for command in ("evaluate", "certify --data")
        }
        evaluate(model, str(folder / "one"), patches=patches, limit=250)  # the first passes of a process are slower
        for turn in range(arguments.repeat):
            for kind in ("mixed", "one"):
                clock = time.process_time()
                found = evaluate(model, str(folder / kind), patches=patches)
                seconds["evaluate"][kind].append(time.process_time() - clock)
                if kind == "mixed":
                    mixed = found
                clock = time.process_time()
                certify_many(str(folder / kind), folder / f"out-{kind}-{turn}", arguments.model, patches, device="cpu")
                seconds["certify --data"][kind].append(time.process_time() - clock)
        differing = compared(model, folder, patches, mixed, arguments.check)
    medians = {
        command: {kind: round(float(np.median(values)), 3) for kind, values in kinds.items()}
        for command, kinds in seconds.items()
    }
    result = {
        "command": f"python benchmarks/mixed_sizes.py --model {arguments.model} --images {arguments.images} --repeat "
        f"{arguments.repeat} --check {arguments.check} " + " ".join(f"--patch {patch}" for patch in patches),
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "patches": patches,
        "images": arguments.images,
        "distinct_sizes": len(set(sizes)),
        "cpu_seconds": medians,
        "ratio": {command: round(kinds["mixed"] / kinds["one"], 2) for command, kinds in medians.items()},
        "photos_compared_with_one_at_a_time": arguments.check,
        "photos_that_differ": differing,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "load_average_before": [round(value, 2) for value in load_average],
        "versions": versions(),
    }
    print(json.dumps(result, indent=2))
    if arguments.out is not None:
        write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())
    if differing:
        raise SystemExit(f"{differing} photos have other verdicts together than alone")


def make_photos(folder: Path, count: int, model: BagCert) -> list[tuple[int, int]]:
    """Writes `mixed/CLASS/*.png` and the same photos at the network's size as `one/CLASS/*.png`; their sizes."""
    random = np.random.default_rng(0)
    sizes = []
    for number in range(count):
        height = int(np.clip(np.exp(random.normal(np.log(43), 0.45)), 25, 266))
        width = int(np.clip(height * np.exp(random.normal(0, 0.08)), 25, 266))
        sizes.append((height, width))
        coarse = Image.fromarray(random.integers(0, 256, (5, 5, 3), dtype=np.uint8))
        photo = coarse.resize((width, height), Image.Resampling.BICUBIC)
        for kind, image in (("mixed", photo), ("one", photo.resize(model.image_size[::-1]))):
            path = folder / kind / model.class_names[number % len(model.class_names)] / f"{number:05}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path)
    return sizes


def compared(model: BagCert, folder: Path, patches: list[str], together: Evaluation, count: int) -> int:
    """How many of the first photos have other records than one at a time, from the same forward pass."""
    images = load_dataset(str(folder / "mixed"))
    preprocessing = Preprocessing(model.image_size)
    differing = 0
    batch = 250  # the default of evaluate: its forward passes are repeated as they were
    for start in range(0, count, batch):
        photos = images.read(range(start, min(start + batch, len(images))))
        scores = model.score_map(np.stack([preprocessing.apply(photo) for photo in photos]))
        for place, photo in enumerate(photos[: count - start]):
            alone: list[Record] = []
            score_map = preprocessing.geometry(photo.stored_size).score_map(scores[place : place + 1])
            for patch in patches:
                threat = PatchThreatModel.parse(patch, photo.stored_size)
                alone += Record.each(get_rule(model.rule).certify(score_map, threat))
            differing += alone != together.records[start + place].results
    return differing


if __name__ == "__main__":
    main()
