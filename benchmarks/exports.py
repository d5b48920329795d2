"""Exported files on a whole test set: size, accuracy and speed in float32 and in 8 bits, in onnxruntime.

Calibration images are training images; the figures are on test images, which the files have not seen. On a machine
that is busy with other things, --untimed leaves speeds out.

python benchmarks/exports.py --model cifar10 --data data/cifar10 --out results/exports/cifar10.json
"""

import argparse
import json
import shlex
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bagcert.data import load_dataset
from bagcert.data.photo import as_batch
from bagcert.defenses.bagcert import load
from bagcert.evaluation.evaluate import labels_for, versions
from bagcert.exporting.writer import Calibration, export
from bagcert.io.files import write_atomically
from bagcert.nets.runtimes.onnx_graph import INPUT
from bagcert.nets.runtimes.onnxruntime import onnx_session


def main() -> None:
    """Exports a model twice, runs every file on the test set, and compares answers with those of torch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--patch")
    parser.add_argument("--rule")
    parser.add_argument("--limit", type=int, default=10_000)
    parser.add_argument("--calibration-images", type=int, default=1000, help="Every other one finds the ranges.")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--untimed", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("results/exports/cifar10.json"))
    arguments = parser.parse_args()
    model = load(arguments.model, device="cpu", checked=False)
    channels = model.scorer.channels
    known = load_dataset(arguments.data, "train", arguments.calibration_images)
    calibration = Calibration(as_batch(known.array())[:, :channels], labels_for(model, known).astype(np.int64))
    found = load_dataset(arguments.data, "test", arguments.limit)
    images, labels = as_batch(found.array())[:, :channels].numpy(), labels_for(model, found)
    own = model.certify(found.array(), arguments.patch, rule=arguments.rule)
    truth = [column.numpy() for column in (own.prediction, own.certified, own.margin)]
    threads, answers, rows = torch.get_num_threads(), {}, []
    with tempfile.TemporaryDirectory() as folder:
        for precision, ranges in (("float32", None), ("int8", calibration)):
            file = Path(folder) / f"{precision}.onnx"
            exported = export(
                model, file, patch=arguments.patch, rule=arguments.rule, calibration=ranges, on_step=print
            )
            session = onnx_session(file.read_bytes(), threads)
            in_onnxruntime(session, images[: arguments.batch_size])
            start, parts = time.perf_counter(), []
            for first in range(0, len(images), arguments.batch_size):
                parts.append(in_onnxruntime(session, images[first : first + arguments.batch_size])[:3])
            seconds = time.perf_counter() - start
            answers[precision] = [np.concatenate(column) for column in zip(*parts, strict=True)]
            rows.append(
                {
                    "precision": precision,
                    "runtime": "onnxruntime",
                    "bytes": file.stat().st_size,
                    "locality_in_onnxruntime": exported.locality,
                    **figures(answers[precision], labels),
                    "beside_torch": differing(answers[precision], truth),
                    "beside_float32": differing(answers[precision], answers["float32"]),
                }
                | ({} if arguments.untimed else {"images_per_second": round(len(images) / seconds, 1)})
            )
            print(json.dumps(rows[-1]), flush=True)
    libraries = ("onnx", "onnxscript", "onnxruntime")
    result = {
        "command": f"python benchmarks/exports.py {shlex.join(sys.argv[1:])}",
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "rule": own.rule,
        "patch": str(own.threat),
        "data": found.name,
        "images": len(images),
        "calibration_images": len(calibration.images[::2]),
        "batch_size": arguments.batch_size,
        "device": "cpu",
        "threads": threads,
        "versions": versions() | {name: metadata.version(name) for name in libraries},
        "torch": figures(truth, labels),
        "results": rows,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())


def in_onnxruntime(session: Any, batch: np.ndarray) -> Sequence[np.ndarray]:
    """All outputs for a batch."""
    return session.run(None, {INPUT: batch})


def figures(answers: list[np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """Clean and certified accuracy."""
    right = answers[0] == labels
    return {"clean_accuracy": float(right.mean()), "certified_accuracy": float((right & answers[1]).mean())}


def differing(answers: list[np.ndarray], others: list[np.ndarray]) -> dict[str, int]:
    """On how many images label, certificate and margin are others."""
    names = ("labels", "certificates", "margins")
    return {name: int((a != b).sum()) for name, a, b in zip(names, answers, others, strict=True)}


if __name__ == "__main__":
    main()
