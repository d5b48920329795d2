"""What the rules cost beside the forward pass, at 10 to 1,000 classes and 32 to 224 pixels.

    python benchmarks/rule_cost.py --out results/speed/rule-cost.json

Score maps are synthetic: one class leads on most images, by a lead drawn so that easy, hard and hopeless
images all occur. Nets have random weights and 10 to 1,000 output channels; times do not depend on either.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from bagcert.devices import keep_freed_memory
from bagcert.evaluate import versions
from bagcert.files import write_atomically
from bagcert.nets import ARCHITECTURES
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import RULES
from bagcert.scores import FIXED_POINT_LIMIT, ScoreMap
from bagcert.threat import PatchThreatModel

NETS = {32: ("resnet-rf8s2", "5", 256), 64: ("resnet-rf12s4", "2%", 64), 224: ("bagnet17", "2%", 8)}


def synthetic(grid, classes: int, images: int, seed: int) -> ScoreMap:
    """Fixed-point maps: noise in every region, and a class that leads by 0 to 1.5 of its spread."""
    random = torch.Generator().manual_seed(seed)
    z = torch.randn(images, classes, *grid.map_size, generator=random) * 400
    winner = torch.randint(0, classes, (images,), generator=random)
    lead = torch.rand(images, generator=random) * 600
    z[torch.arange(images), winner] += lead[:, None, None]
    return ScoreMap(z.round().clamp(-2047, 2047).to(torch.int16), -FIXED_POINT_LIMIT, FIXED_POINT_LIMIT, grid)


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    """Measures every size and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/speed/rule-cost.json"))
    parser.add_argument("--repeat", type=int, default=5)
    arguments = parser.parse_args()
    keep_freed_memory()
    rows = []
    for side, (name, patch, images) in NETS.items():
        architecture = ARCHITECTURES[name]
        for classes in (10, 100, 1000):
            net = architecture.build(classes, architecture.width, architecture.depth, True)
            scorer = RegionScorer(net, [str(c) for c in range(classes)], (side, side))
            scorer = scorer.fold_batch_norm().to(memory_format=torch.channels_last)
            batch = torch.rand(images, 3, side, side)
            threat = PatchThreatModel.parse(patch, (side, side))
            scores = synthetic(scorer.grid(), classes, images, seed=side + classes)
            calls = {"forward": lambda s=scorer, b=batch: s.real_scores(b)}
            for rule in ("vote", "double-masking"):
                calls[rule] = lambda r=rule, s=scores, t=threat: RULES[r].certify(s, t)
            seconds = {what: [] for what in calls}
            for call in calls.values():
                call()
            for _ in range(arguments.repeat):  # alternating, so that a slow moment hits all alike
                for what, call in calls.items():
                    seconds[what].append(timed(call))
            per_image = {what: statistics.median(values) / images * 1e3 for what, values in seconds.items()}
            row = {
                "image_px": side,
                "architecture": name,
                "regions": list(scorer.grid().map_size),
                "classes": classes,
                "patch": patch,
                "images": images,
                "certified_share": RULES["double-masking"].certify(scores, threat).certified.float().mean().item(),
                "ms_per_image": {what: round(value, 4) for what, value in per_image.items()},
                "share_of_forward": {
                    rule: round(per_image[rule] / per_image["forward"], 4) for rule in ("vote", "double-masking")
                },
            }
            rows.append(row)
            print(row["image_px"], row["classes"], row["ms_per_image"], row["share_of_forward"], flush=True)
    result = {
        "command": f"python benchmarks/rule_cost.py --repeat {arguments.repeat}",
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "results": rows,
    }
    write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
