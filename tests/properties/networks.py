"""Makes small networks at random, local and not, and attacks those that `RegionScorer.from_module` accepts.

python -m tests.properties.networks --cases 50000 --json

A leak is a score that changes outside the derived reach of a patch, in an image without a patch, or between batches.
"""

import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from bagcert.errors import BagcertError
from bagcert.nets.region_scorer import RegionScorer
from tests.properties.command import run
from tests.properties.operations import LOCAL, OTHER, Skip

SIZE, CHANNELS, CLASSES = (10, 10), 3, ["a", "b", "c"]
PATCHES = ((1, 1), (2, 2), (3, 1), (1, 4), (4, 4))
Statement = Callable[[list[Tensor]], Tensor]


class Program(nn.Module):
    """A network of statements; each takes some of the maps before it and adds one."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draw = random.Random(seed)
        self.parts = nn.ModuleList()
        self.statements: list[Statement] = []
        self.names: list[str] = []
        self.thresholds: list[float] = []
        self.details: list[str] = []
        self._write(seed)
        del self.draw
        for part in self.parts:
            if hasattr(part, "forget"):
                part.forget()

    def forward(self, image: Tensor) -> Tensor:
        maps = [image]
        for statement in self.statements:
            maps.append(statement(maps))
        return maps[-1]

    def _write(self, seed: int) -> None:
        """Statements are tried on a sample, so that most of them run; what comes out last is a map of three classes."""
        sample = torch.rand(2, CHANNELS, *SIZE, generator=torch.Generator().manual_seed(seed))
        maps = [sample]
        wanted = self.draw.randint(1, 5)
        other = self.draw.randrange(wanted) if self.draw.random() < 0.6 else -1
        for _ in range(40):
            if len(self.names) >= wanted:
                break
            table = OTHER if len(self.names) == other else LOCAL
            self._try(self.draw.choice(list(table)), table, maps)
        self._try("classes", {"classes": _classes}, maps)

    def _try(self, name: str, table: dict[str, Callable], maps: list[Tensor]) -> None:
        try:
            statement = table[name](self, maps)
            with torch.no_grad():
                result = statement(list(map(torch.clone, maps)))
            if not isinstance(result, Tensor) or result.ndim != 4 or len(result) != 2 or not 0 < result.numel() < 4000:
                raise Skip
        except (Skip, RuntimeError, IndexError, TypeError, ValueError, NotImplementedError, AssertionError):
            return
        maps.append(result.float() if not result.is_floating_point() else result)
        self.statements.append(statement if result.dtype == torch.float32 else lambda maps: statement(maps).float())
        self.names.append(name)


def _classes(program: Program, maps: list[Tensor]) -> Statement:
    last = len(maps) - 1
    layer = nn.Conv2d(maps[last].shape[1], len(CLASSES), 1)
    program.parts.append(layer)
    return lambda maps: layer(maps[last])


def images(program: Program, draw: random.Random) -> list[Tensor]:
    """Noise, flat images, and such as a patch takes across a threshold."""
    noise = torch.rand(CHANNELS, *SIZE, generator=torch.Generator().manual_seed(draw.randrange(2**31)))
    levels = [0.0, 0.5, 1.0] + [t + step for t in program.thresholds for step in (-0.004, 0.004)]
    flat = [torch.full_like(noise, min(1.0, max(0.0, level))) for level in draw.sample(levels, min(3, len(levels)))]
    return [noise, *flat]


def leaks(scorer: RegionScorer, program: Program, seed: int) -> list[str]:
    """What changes that must not."""
    draw, found = random.Random(seed), []
    grid = scorer.grid()
    for image in images(program, draw):
        patches = []
        for _ in range(10):
            shape = draw.choice(PATCHES)
            top, left = (draw.randint(0, side - length) for side, length in zip(SIZE, shape, strict=True))
            patches.append((shape, top, left, draw.choice((0.0, 1.0, None, 1e30, -1e30, torch.inf, torch.nan))))
        before = image.repeat(len(patches) + 1, 1, 1, 1)
        after = before.clone()
        outside = torch.ones(len(before), 1, *grid.map_size, dtype=torch.bool)  # the last image has no patch
        for k, ((height, width), top, left, content) in enumerate(patches):
            under = after[k, :, top : top + height, left : left + width]
            under.copy_(torch.rand(under.shape) if content is None else torch.full(under.shape, content))
            rows, cols = grid.touched_rows((height, width))[top], grid.touched_cols((height, width))[left]
            outside[k, 0] = torch.as_tensor(~np.outer(rows, cols))
        z, attacked = scorer.forward_batch(before), scorer.forward_batch(after)
        moved = ((z != attacked) & ~(z.isnan() & attacked.isnan())) & outside
        if moved.any():
            found.append(f"{int(moved.sum())} scores move, patch {patches[int(moved.nonzero()[0, 0]) % len(patches)]}")
        few = scorer.forward_batch(before[:5])
        apart = ~torch.isclose(few, z[:5], rtol=1e-3, atol=1e-3, equal_nan=True)
        if apart.float().mean() > 0.1:
            found.append("batches differ")
    return found


def count(cases: int, seed: int = 0, verbose: bool = False) -> dict[str, object]:
    """Makes `cases` networks; the totals, and which operations were in accepted and refused ones."""
    totals: dict[str, int] = {"cases": 0, "accepted": 0, "refused": 0, "crashed": 0, "changed": 0, "leaks": 0}
    accepted, refused, leaking = Counter(), Counter(), []
    for number in range(cases):
        torch.manual_seed(seed * 1_000_003 + number)
        program = Program(seed * 1_000_003 + number)
        totals["cases"] += 1
        before = copy.deepcopy(program.state_dict())
        try:
            scorer = RegionScorer.from_module(program, CLASSES, SIZE)
        except BagcertError:
            totals["refused"] += 1
            refused.update(set(program.names))
        except Exception as error:
            totals["crashed"] += 1
            leaking.append({"number": number, "operations": program.names + program.details, "found": repr(error)})
        else:
            totals["accepted"] += 1
            accepted.update(set(program.names))
            if found := leaks(scorer, program, number):
                totals["leaks"] += 1
                leaking.append({"number": number, "operations": program.names + program.details, "found": found[0]})
        after = program.state_dict()
        totals["changed"] += any(not torch.equal(value, after[name]) for name, value in before.items())
        if verbose and leaking and leaking[-1]["number"] == number:
            print(leaking[-1], file=sys.stderr, flush=True)
    return {**totals, "leaking": leaking, "in_accepted": dict(accepted), "in_refused": dict(refused)}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    run(partial(count, verbose=True), "networks", __doc__, cases=1000)
