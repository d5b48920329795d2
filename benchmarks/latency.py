"""Latency of a verdict for one image: percentiles at batch size 1 for the fail-safe component.

python benchmarks/latency.py --data data/cifar10 --out results/speed/latency.json
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bagcert.data import load_dataset
from bagcert.defenses.bagcert import load
from bagcert.defenses.failsafe import FailSafe
from bagcert.evaluation.evaluate import versions
from bagcert.io.files import write_atomically

PERCENTILES = (50, 90, 99, 99.9)


def main() -> None:
    """Times the bare network and the verdict by each rule, image by image."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--patch", default="5")
    parser.add_argument("--out", type=Path, default=Path("results/speed/latency.json"))
    arguments = parser.parse_args()
    model = load(arguments.model)
    images = load_dataset(arguments.data, "test", arguments.images).array()
    calls: dict[str, Callable[[np.ndarray], object]] = {"forward": model.score_map}
    for rule in ("vote", "double-masking"):
        calls[rule] = FailSafe(model, arguments.patch, rule=rule)
    milliseconds = {what: np.empty(len(images)) for what in calls}
    for call in calls.values():
        call(images[:1])
    for i in range(len(images)):  # alternating, so that a slow moment hits all alike
        for what, call in calls.items():
            start = time.perf_counter()
            call(images[i : i + 1])
            milliseconds[what][i] = (time.perf_counter() - start) * 1e3
    result = {
        "command": f"python benchmarks/latency.py --model {arguments.model} --data {arguments.data} "
        f"--images {arguments.images} --patch {arguments.patch}",
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "patch": arguments.patch,
        "images": len(images),
        "batch_size": 1,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "milliseconds": {
            what: {f"p{p:g}": round(float(np.percentile(values, p)), 3) for p in PERCENTILES}
            for what, values in milliseconds.items()
        },
    }
    write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())
    print(json.dumps(result["milliseconds"], indent=2))


if __name__ == "__main__":
    main()
