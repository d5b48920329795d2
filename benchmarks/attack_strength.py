"""Strength of the gradient attack, measured on an undefended CNN that was trained on the same data.

    python benchmarks/attack_strength.py --data data/cifar10 --limit 500 --out results/attacks/undefended.json

An attack that leaves a plain classifier above 20 % at 5x5 says little when it fails on a certified one. The network
has strided 3x3 convolutions and global average pooling, so that every logit sees the whole image.
"""

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from bagcert.attacks import Settings
from bagcert.attacks.evaluate import attack_dataset
from bagcert.data import load_dataset
from bagcert.defenses.undefended import Undefended
from bagcert.devices import resolve_device, tune_malloc
from bagcert.evaluation.evaluate import versions
from bagcert.io.files import write_atomically
from bagcert.nets.region_scorer import Normalize
from bagcert.records import wilson_interval
from bagcert.training.muon import MuonAdamW

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def ordinary_cnn(classes: int, width: int) -> nn.Sequential:
    """Five 3x3 convolutions, every other one of stride 2, pooled over the whole map."""
    layers: list[nn.Module] = [Normalize(MEAN, STD)]
    channels = 3
    for outputs, stride in ((width, 2), (2 * width, 1), (2 * width, 2), (4 * width, 1), (4 * width, 2)):
        layers += [nn.Conv2d(channels, outputs, 3, stride, 1, bias=False)]
        layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        channels = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, classes))


def augmented(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flips each image with even odds and shifts the batch by up to two pixels, mirrored at the border."""
    flip = torch.rand(len(images), generator=generator) < 0.5
    images = torch.where(flip[:, None, None, None].to(images.device), images.flip(3), images)
    top, left = torch.randint(0, 5, (2,), generator=generator).tolist()
    height, width = images.shape[2:]
    return functional.pad(images, (2, 2, 2, 2), mode="reflect")[:, :, top : top + height, left : left + width]


def train(net: nn.Sequential, images: np.ndarray, labels: np.ndarray, options: argparse.Namespace) -> float:
    """Trains in place; returns the seconds it took."""
    started = time.perf_counter()
    device = resolve_device(options.device)
    generator = torch.Generator().manual_seed(options.seed)
    net.to(device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    kernels = [parameter for parameter in net.parameters() if parameter.ndim == 4]
    others = [parameter for parameter in net.parameters() if parameter.ndim != 4]
    optimizer: torch.optim.Optimizer
    if options.optimizer == "muon":
        optimizer = MuonAdamW(kernels, others, options.learning_rate, options.learning_rate, 0.01)
    else:
        optimizer = torch.optim.AdamW(net.parameters(), options.learning_rate, weight_decay=0.01)
    steps = options.epochs * (len(images) // options.batch_size)
    peaks = [group["lr"] for group in optimizer.param_groups]
    pixels, truth = torch.from_numpy(images), torch.from_numpy(labels)
    done = 0
    for epoch in range(options.epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: steps // options.epochs * options.batch_size].split(options.batch_size):
            share = done / steps
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * min(1.0, share / 0.2, (1 - share) / 0.8 + 0.01)
            batch = (pixels[rows].permute(0, 3, 1, 2).to(device).float() / 255).contiguous(
                memory_format=torch.channels_last
            )
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=options.precision == "bf16"):
                logits = net(augmented(batch, generator))
            loss = functional.cross_entropy(logits.float(), truth[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            done += 1
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}/{options.epochs}: loss {loss.item():.3f}, {seconds:.0f} s", flush=True)
    return time.perf_counter() - started


def main() -> None:
    """Trains, attacks and writes the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--train-limit", type=int, default=None, help="training images; all by default")
    parser.add_argument("--limit", type=int, default=500, help="test images to attack")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--learning-rate", type=float, default=0.004)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the training only")
    parser.add_argument("--patch", default="5")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--placements", type=int, default=12)
    parser.add_argument("--attack-batch", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("results/attacks/undefended.json"))
    options = parser.parse_args()
    tune_malloc()
    torch.manual_seed(options.seed)
    known = load_dataset(options.data, "train", options.train_limit)
    net = ordinary_cnn(len(known.class_names), options.width)
    training_seconds = train(net, known.array(), known.labels, options)
    test = load_dataset(options.data, "test", options.limit)
    pixels = test.array()
    defense = Undefended(net, test.class_names, (pixels.shape[1], pixels.shape[2]), name="ordinary CNN")
    settings = Settings(options.steps, options.restarts, options.placements, options.seed)
    started = time.perf_counter()
    numbers = list(range(len(test)))
    batches = [
        (numbers[start : start + options.attack_batch], pixels[rows], test.labels[rows])
        for start in range(0, len(test), options.attack_batch)
        for rows in (slice(start, start + options.attack_batch),)
    ]
    found = attack_dataset(
        defense,
        batches,
        [options.patch],
        [defense.rule],
        attacks=["gradient"],
        settings=settings,
        on_progress=lambda done, broken: print(f"{done:.0f} of {len(test)} images, {broken} broken", flush=True),
    )
    (row,) = found.rows
    kept = sum(image.results[0].prediction == image.label and not image.results[0].broken for image in found.records)
    result = {
        "command": f"python {shlex.join(sys.argv)}",
        "model": defense.name,
        "parameters": sum(parameter.numel() for parameter in net.parameters()),
        "data": test.name,
        "images": len(test),
        "training": {
            "images": len(known),
            **{name: getattr(options, name) for name in ("epochs", "width", "batch_size", "optimizer", "precision")},
            "learning_rate": options.learning_rate,
            "seconds": round(training_seconds, 1),
        },
        "attack": {
            "attacks": ["gradient"],
            **{name: getattr(options, name) for name in ("steps", "restarts", "placements")},
            "seconds": round(time.perf_counter() - started, 1),
        },
        "seed": options.seed,
        "device": str(defense.device),
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "patch": row.threat,
        "clean_accuracy": row.clean_accuracy,
        "attacked_accuracy": row.attacked_accuracy,
        "interval95": wilson_interval(kept, len(test)),
        "attempts": row.attempts,
    }
    write_atomically(options.out, (json.dumps(result, indent=2) + "\n").encode())
    print(f"clean {row.clean_accuracy:.1%}, under attack {row.attacked_accuracy:.1%}")


if __name__ == "__main__":
    main()
