"""Images per second on every installed backend and dtype, and whether their certificates equal those of torch.

A backend that changes scores outside a patch's reach is refused when it loads, and stands under `refused`.

python benchmarks/backends.py --data data/cifar10 --out results/speed/backends.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from bagcert.data import load_dataset
from bagcert.defenses.bagcert import DTYPES, load
from bagcert.errors import UnsoundError, UsageError
from bagcert.evaluation.evaluate import labels_for, versions
from bagcert.io.files import write_atomically
from bagcert.nets.runtimes import installed_backends


def main() -> None:
    """Times all of them batch by batch in turn, and compares certificates with those of torch in float32."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("results/speed/backends.json"))
    arguments = parser.parse_args()
    models, rows, refused = {}, {}, []
    for backend in installed_backends():
        for dtype in DTYPES:
            start = time.perf_counter()
            try:
                model = load(arguments.model, device="cpu", dtype=dtype, backend=backend)
            except UsageError as error:  # a backend without this dtype
                print(f"{backend} {dtype}: {error}", flush=True)
                continue
            except UnsoundError as error:  # it has the dtype, and changes scores outside a patch's reach
                refused.append({"backend": backend, "dtype": dtype, "reason": str(error)})
                print(json.dumps(refused[-1]), flush=True)
                continue
            models[backend, dtype] = model
            assert model.locality is not None
            rows[backend, dtype] = {
                "backend": backend,
                "dtype": dtype,
                "load_seconds": round(time.perf_counter() - start, 2),
                "locality": model.locality.consequence,
                "tolerance_z": model.scorer.tolerance,
            }
    found = load_dataset(arguments.data, "test", arguments.limit)
    images, labels = found.array(), labels_for(models["torch", "float32"], found)
    for model in models.values():
        model.certify(images[: arguments.batch_size])
    seconds: dict[tuple[str, str], tuple[list[float], list[float]]] = {which: ([], []) for which in models}
    certificates: dict[tuple[str, str], list[np.ndarray]] = {which: [] for which in models}
    for run in range(arguments.repeat):
        forward, rule = dict.fromkeys(models, 0.0), dict.fromkeys(models, 0.0)
        for first in range(0, len(images), arguments.batch_size):
            batch = images[first : first + arguments.batch_size]
            for which, model in models.items():  # in turn, so that a slow moment hits all alike
                start = time.perf_counter()
                score_map = model.score_map(batch)
                middle = time.perf_counter()
                certificate = model.certify_scores(score_map)
                forward[which] += middle - start
                rule[which] += time.perf_counter() - middle
                if run == 0:
                    columns = (certificate.prediction, certificate.certified, certificate.margin)
                    certificates[which].append(torch.stack([column.long() for column in columns], 1).numpy())
        for which in models:
            seconds[which][0].append(forward[which])
            seconds[which][1].append(rule[which])
    truth = np.concatenate(certificates["torch", "float32"])
    for which, row in rows.items():
        forward_s, rule_s = (statistics.median(column) for column in seconds[which])
        here = np.concatenate(certificates[which])
        right = here[:, 0] == labels
        row |= {
            "forward_seconds": round(forward_s, 3),
            "rule_seconds": round(rule_s, 3),
            "images_per_second": round(len(images) / (forward_s + rule_s), 1),
            "clean_accuracy": float(right.mean()),
            "certified_accuracy": float((right & (here[:, 1] == 1)).mean()),
            "other_predictions": int((here[:, 0] != truth[:, 0]).sum()),
            "other_certificates": int((here[:, 1] != truth[:, 1]).sum()),
            "other_margins": int((here[:, 2] != truth[:, 2]).sum()),
        }
        print(json.dumps(row), flush=True)
    model = models["torch", "float32"]
    libraries = {k: v for m in models.values() if m.scorer.runner for k, v in m.scorer.runner.versions().items()}
    result = {
        "command": f"python benchmarks/backends.py --model {arguments.model} --data {arguments.data} --limit "
        f"{arguments.limit} --batch-size {arguments.batch_size} --repeat {arguments.repeat}",
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "rule": model.rule,
        "patch": str(model.patch),
        "images": len(images),
        "batch_size": arguments.batch_size,
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions() | libraries,
        "results": list(rows.values()),
        "refused": refused,
    }
    write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
