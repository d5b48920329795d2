"""Cost of the rules relative to the forward pass, for 10 to 1,000 classes and 32 to 224 pixels.

    python benchmarks/rule_cost.py --out results/speed/rule-cost.json

The first rows are small networks of the package, whatever the number of classes; the last ones the networks, heads and
patches of the recipes for 1,000 classes, whose rules have a budget: 5 % of the forward pass for the vote, 10 % for
double masking. Score maps are synthetic, laid out in memory as networks leave them: one class leads on most images, by
a lead drawn so that easy, hard and hopeless images all occur. Nets have random weights; times do not depend on them.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from bagcert.devices import tune_malloc
from bagcert.evaluation.evaluate import versions
from bagcert.grid import RegionGrid
from bagcert.io.files import write_atomically
from bagcert.nets import ARCHITECTURES, get_architecture
from bagcert.nets.heads import HeadName
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import RULES
from bagcert.scores import FIXED_POINT_LIMIT, ScoreMap
from bagcert.threat import PatchThreatModel
from bagcert.training.recipe import load_recipe

NETS = {32: ("resnet-rf8s2", "5", 256), 64: ("resnet-rf12s4", "2%", 64), 224: ("bagnet17", "2%", 8)}
RECIPES = {"imagenet64-bagcert": (("1%", "2%", "3%"), 32), "imagenet-bagcert": (("1%", "2%", "3%"), 8)}
BUDGET = {"vote": 0.05, "double-masking": 0.10}


@dataclass(frozen=True)
class Case:
    """A network for so many classes, and what its rules are asked."""

    side: int
    architecture: str
    width: int
    depth: int
    head: HeadName
    classes: int
    patches: tuple[str, ...]
    images: int
    recipe: str | None = None

    def scorer(self) -> RegionScorer:
        """The network, ready for inference."""
        net = ARCHITECTURES[self.architecture].build(self.classes, self.width, self.depth, True)
        scorer = RegionScorer(net, [str(c) for c in range(self.classes)], (self.side, self.side), self.head)
        return scorer.fold_batch_norm().to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def cases() -> Iterator[Case]:
    for side, (name, patch, images) in NETS.items():
        shape = ARCHITECTURES[name]
        for classes in (10, 100, 1000):
            yield Case(side, name, shape.width, shape.depth, "fixed-point", classes, (patch,), images)
    for name, (patches, images) in RECIPES.items():
        model = load_recipe(name).model
        shape = get_architecture(model.architecture)
        width, depth = model.width or shape.width, model.depth or shape.depth
        side = (model.image_size or shape.image_size)[0]
        yield Case(side, model.architecture, width, depth, model.head, 1000, patches, images, name)


def synthetic(grid: RegionGrid, head: HeadName, classes: int, images: int, seed: int) -> ScoreMap:
    """Fixed-point maps: noise in every region, and a class that leads by 0 to 1.5 of its spread.

    Binary ones: about two classes on by chance in every region, and a class that is on in 0 to all of them.
    """
    random = torch.Generator().manual_seed(seed)
    winner = torch.randint(0, classes, (images,), generator=random)
    strength = torch.rand(images, generator=random)
    every = torch.arange(images)
    if head == "binary":
        scores = (torch.rand(images, classes, *grid.map_size, generator=random) < 2 / classes).to(torch.int16)
        on = torch.rand(images, *grid.map_size, generator=random) < strength[:, None, None]
        scores[every, winner] |= on.to(torch.int16)
        low, high = 0, 1
    else:
        z = torch.randn(images, classes, *grid.map_size, generator=random) * 400
        z[every, winner] += strength[:, None, None] * 600
        scores = z.round().clamp(-FIXED_POINT_LIMIT, FIXED_POINT_LIMIT).to(torch.int16)
        low, high = -FIXED_POINT_LIMIT, FIXED_POINT_LIMIT
    return ScoreMap(scores.contiguous(memory_format=torch.channels_last), low, high, grid)


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(case: Case, repeat: int) -> Iterator[dict]:
    """A row for each patch, all from the same forward passes."""
    scorer = case.scorer()
    batch = torch.rand(case.images, 3, case.side, case.side)
    scores = synthetic(scorer.grid(), case.head, case.classes, case.images, seed=case.side + case.classes)
    threats = {patch: PatchThreatModel.parse(patch, (case.side, case.side)) for patch in case.patches}
    calls: dict[tuple[str, str], Callable[[], object]] = {("forward", ""): partial(scorer.real_scores, batch)}
    for patch, threat in threats.items():
        for rule in BUDGET:
            calls[rule, patch] = partial(RULES[rule].certify, scores, threat)
    seconds: dict[tuple[str, str], list[float]] = {what: [] for what in calls}
    for call in calls.values():
        call()
    for _ in range(repeat):  # alternating, so that a slow moment hits all alike
        for what, call in calls.items():
            seconds[what].append(timed(call))
    each = {what: statistics.median(values) / case.images * 1e3 for what, values in seconds.items()}
    for patch, threat in threats.items():
        per_image = {"forward": each["forward", ""], **{rule: each[rule, patch] for rule in BUDGET}}
        share = {rule: round(per_image[rule] / per_image["forward"], 4) for rule in BUDGET}
        row = {
            "image_px": case.side,
            "architecture": case.architecture,
            "width": case.width,
            "depth": case.depth,
            "recipe": case.recipe,
            "head": case.head,
            "regions": list(scorer.grid().map_size),
            "classes": case.classes,
            "patch": patch,
            "images": case.images,
            "certified_share": RULES["double-masking"].certify(scores, threat).certified.float().mean().item(),
            "ms_per_image": {what: round(value, 4) for what, value in per_image.items()},
            "share_of_forward": share,
        }
        if case.recipe:
            row["within_budget"] = {rule: share[rule] <= BUDGET[rule] for rule in BUDGET}
        print(case.side, case.architecture, case.classes, patch, row["ms_per_image"], share, flush=True)
        yield row


def main() -> None:
    """Measures every case and prints its rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/speed/rule-cost.json"))
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--recipe", choices=RECIPES, help="only the rows of this recipe")
    arguments = parser.parse_args()
    tune_malloc()
    load_before = os.getloadavg()[0]
    chosen = [case for case in cases() if arguments.recipe in (None, case.recipe)]
    rows = [row for case in chosen for row in measure(case, arguments.repeat)]
    result = {
        "command": f"python benchmarks/rule_cost.py --repeat {arguments.repeat}"
        + (f" --recipe {arguments.recipe}" if arguments.recipe else ""),
        "device": "cpu",
        "threads": torch.get_num_threads(),
        "load_average_before": round(load_before, 2),
        "versions": versions(),
        "budget": BUDGET,
        "results": rows,
    }
    write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
