"""Accuracy of a model whose score map is averaged over an image and its mirror image: two forward passes.

The mirror image is shifted so that every region of its map sees only pixels that the opposite region of the original
map sees. The average of the two maps then has the receptive fields of the original map, so the rules apply unchanged.

python benchmarks/flip_average.py --model default --data data/cifar10 --patch 5 --out results/averaged/flip-5.json
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bagcert.data import load_dataset
from bagcert.defenses.bagcert import BagCert, load
from bagcert.evaluation.evaluate import labels_for, versions
from bagcert.io.files import write_atomically
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel


def main() -> None:
    """Measures the plain and the averaged map on the same images."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="default")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--split", default="test")
    parser.add_argument("--patch", default="5")
    parser.add_argument("--rule", default="double-masking")
    parser.add_argument("--limit", type=int)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    model = load(arguments.model, device="cpu")
    found = load_dataset(arguments.data, arguments.split, arguments.limit)
    images, labels = found.array(), torch.from_numpy(labels_for(model, found))
    threat, rule = PatchThreatModel.parse(arguments.patch, model.image_size), get_rule(arguments.rule)
    shift = mirror_shift(model.scorer.grid().cols_seen)
    rows = {}
    for name, scored in (("plain", model.score_map), ("flip-averaged", lambda some: averaged_map(model, some, shift))):
        clock = time.perf_counter()
        right = certified = 0
        for start in range(0, len(images), arguments.batch_size):
            some = slice(start, start + arguments.batch_size)
            certificate = rule.certify(scored(images[some]), threat)
            hit = certificate.prediction == labels[some]
            right += int(hit.sum())
            certified += int((hit & certificate.certified).sum())
        rows[name] = {
            "forward_passes": 1 + (name != "plain"),
            "clean_accuracy": right / len(images),
            "certified_accuracy": certified / len(images),
            "seconds": round(time.perf_counter() - clock, 2),
        }
        print(name, rows[name], flush=True)
    document = {
        "command": shlex.join(["python", *sys.argv]),
        "model": model.name,
        "weights_sha256": model.weights_sha256,
        "data": found.name,
        "split": found.split,
        "images": len(images),
        "patch": str(threat),
        "rule": arguments.rule,
        "threads": torch.get_num_threads(),
        "versions": versions(model),
        "rows": rows,
    }
    if arguments.out:
        write_atomically(arguments.out, (json.dumps(document, indent=1) + "\n").encode())


def averaged_map(model: BagCert, images: np.ndarray, shift: int) -> ScoreMap:
    """Computes the map of images uint8 [batch, height, width, 3], averaged with that of images mirrored by `shift`."""
    batch = model.scorer.as_batch(images)
    z = model.scorer.real_scores(batch) + model.scorer.real_scores(mirrored(batch, shift)).flip(3)
    return model.scorer.to_scores(z / 2, model.image_size)


def mirrored(images: Float[Tensor, "batch channels height width"], shift: int) -> Tensor:
    """Mirrors images so that column c moves to column `shift - c`. Missing columns repeat the nearest one."""
    columns = torch.arange(images.shape[3], device=images.device)
    return images[..., (shift - columns).clamp(0, images.shape[3] - 1)]


def mirror_shift(seen: Bool[np.ndarray, "regions pixels"]) -> int:
    """Finds the shift for which each region of the mirror image sees only pixels of the opposite region.

    Raises:
        ValueError: there is no such shift.
    """
    pixels = seen.shape[1]
    for shift in sorted(range(pixels // 2, 3 * pixels // 2), key=lambda shift: abs(shift - (pixels - 1))):
        source = np.clip(shift - np.arange(pixels), 0, pixels - 1)
        if all(opposite[source[own]].all() for own, opposite in zip(seen, seen[::-1], strict=True)):
            return shift
    raise ValueError("the regions of this model have no mirror image")


if __name__ == "__main__":
    main()
