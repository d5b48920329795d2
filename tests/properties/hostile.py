"""Loads model folders whose tensors and config are hostile: each is refused, or keeps still outside a patch's reach.

python -m tests.properties.hostile --cases 2000 --dtype bfloat16 --json
"""

import json
import os
import tempfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from bagcert.defenses.bagcert import DTYPES, BagCert, load
from bagcert.errors import UnreadableError, UnsoundError, UsageError
from bagcert.nets.saved_model import CONFIG, WEIGHTS, ModelConfig
from tests.properties.command import run

SIZE = (8, 8)
ARCHITECTURES = ("resnet-rf3", "resnet-rf5", "resnet-rf6s2", "convnet-rf10s4")
VALUES = (0.0, 1e-45, 1e-38, 1e-30, 1e-4, 1.0, 255.0, 1e10, 1e19, 1e30, 3.38e38, 3.4e38)
MEANS = ([0.0] * 3, [0.5] * 3, [128 / 255] * 3, [1.0] * 3, [-1e30] * 3)
STDS = ([1.0] * 3, [0.25] * 3, [1e-37] * 3, [1e-44] * 3, [3e38] * 3)
ATTACKS = 24  # images in the one batch of attacks on a model


def write_folder(folder: Path, random: np.random.Generator) -> None:
    """A small model, some of whose tensors and settings are chosen to overflow, cancel or vanish."""
    mean, std = ([0.5] * 3, [0.25] * 3) if random.random() < 0.5 else (_one(random, MEANS), _one(random, STDS))
    facts = {
        "name": "hostile",
        "architecture": _one(random, ARCHITECTURES),
        "width": int(random.integers(1, 9)),
        "depth": int(random.integers(1, 3)),
        "padded": bool(random.integers(2)),
        "head": _one(random, ("binary", "fixed-point")),
        "scale": 1.0,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "class_names": ["a", "b", "c"],
        "image_size": SIZE,
        "rule": "double-masking",
        "patch": "3",
    }
    torch.manual_seed(int(random.integers(2**31)))
    tensors = ModelConfig.model_validate(facts).build().state_dict()
    tensors["normalize.mean"] = torch.tensor(mean)[None, :, None, None]
    tensors["normalize.std"] = torch.tensor(std)[None, :, None, None]
    if random.random() < 0.8:  # or the config does not say what the tensors hold
        facts |= {"mean": mean, "std": std}
    facts["scale"] = _one(random, (1.0, 1.0, 100.0, 1e-30, 1e-44, 1e30))
    if random.random() < 0.5 and std == [0.25] * 3:
        _gate(tensors, float(_one(random, VALUES[4:])))
    names = sorted(name for name, tensor in tensors.items() if name.startswith("net.") and tensor.is_floating_point())
    for name in random.choice(names, int(random.integers(0, 4))):
        tensors[name] = _perturbed(tensors[name].clone(), name, random)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))
    (folder / CONFIG).write_text(json.dumps(facts))


def _gate(tensors: dict[str, torch.Tensor], strength: float) -> None:
    """The first layer answers where red is far above green, as on saturated pixels, which noise hardly ever is."""
    weight, threshold = tensors["net.0.weight"], 4 * (1 - 2**-6)  # of pixels divided by a deviation of 1/4
    weight.zero_()
    weight[:, 0, -1, -1], weight[:, 1, -1, -1] = 1.0, -1.0
    if "net.0.bias" in tensors:
        tensors["net.0.bias"].fill_(-threshold)
        tensors["net.2.weight"].fill_(strength)
    else:
        for name, value in (("weight", strength), ("bias", 0.0), ("running_mean", threshold), ("running_var", 1.0)):
            tensors[f"net.1.{name}"].fill_(value)


def _perturbed(tensor: torch.Tensor, name: str, random: np.random.Generator) -> torch.Tensor:
    value = _one(random, VALUES)
    way = random.integers(5)
    if way == 0:
        return tensor.fill_(value)
    if way == 1:
        tensor.fill_(value)[::2] *= -1
        return tensor
    if way == 2:
        return tensor.mul_(value).clamp_(-3.4e38, 3.4e38)
    if way == 3:  # of many numbers one
        tensor.view(-1)[random.integers(tensor.numel())] = value if random.random() < 0.5 else -value
        return tensor
    return tensor.fill_(-value) if name.endswith(("bias", "running_mean", "running_var")) else tensor.zero_()


def holds(model: BagCert, random: np.random.Generator) -> tuple[bool, bool]:
    """(Did every score beyond a patch's reach stand still up to its slack, did any score within it stop being finite?)

    Clean images are gray, of the color that normalization turns into 0, or noise; contents black, white, that color,
    primary colors or noise. All patches have the same shape, as large as the image at most.
    """
    mean = model.scorer.normalize.mean.flatten().clamp(0, 1).numpy()
    palette = np.stack([np.zeros(3), np.ones(3), np.full(3, 128 / 255), mean, *np.eye(3)])
    clean = np.repeat(palette[random.integers(len(palette), size=ATTACKS), None], SIZE[0] * SIZE[1], 1)
    clean = clean.reshape(ATTACKS, *SIZE, 3)
    clean[::4] = random.random(clean[::4].shape)
    attacked = clean.copy()
    height, width = random.integers(1, SIZE[0] + 1), random.integers(1, SIZE[1])
    grid, still = model.scorer.grid(), []
    for number in range(ATTACKS):
        top, left = random.integers(0, SIZE[0] - height + 1), random.integers(0, SIZE[1] - width + 1)
        content = palette[random.integers(len(palette), size=(height, width))]
        if number % 3 == 0:
            content = np.broadcast_to(palette[random.integers(len(palette))], content.shape)
        elif number % 3 == 1:
            content = random.random(content.shape)
        attacked[number, top : top + height, left : left + width] = content
        rows = grid.rows_seen[:, top : top + height].any(1)
        cols = grid.cols_seen[:, left : left + width].any(1)
        still.append(~(rows[:, None] & cols[None]))
    before, after = (
        model.score_map(np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32))
        for images in (clean, attacked)
    )
    moved = (after.scores.long() - before.scores.long()).abs()
    allowed = torch.zeros_like(moved) if before.slack is None else before.slack.long()
    beyond = torch.as_tensor(np.stack(still))[:, None].expand_as(moved)
    z = model.scorer.real_scores(torch.as_tensor(attacked.transpose(0, 3, 1, 2), dtype=torch.float32))
    return not bool(((moved > allowed) & beyond).any()), not bool(z.isfinite().all())


def count(cases: int, seed: int = 0, dtype: str = "float32", backend: str = "torch") -> dict[str, int]:
    """Loads and attacks `cases` folders."""
    random = np.random.default_rng(seed)
    totals = {"cases": cases, "unreadable": 0, "unsound": 0, "accepted": 0, "not_finite_under_attack": 0, "broken": 0}
    with tempfile.TemporaryDirectory(prefix="bagcert-hostile-") as name:
        cache, folder = os.environ.get("BAGCERT_CACHE"), Path(name)
        os.environ["BAGCERT_CACHE"] = str(folder / "cache")
        try:
            for _ in range(cases):
                write_folder(folder, random)
                try:
                    model = load(folder, "cpu", dtype=dtype, backend=backend)
                except (UnreadableError, UnsoundError, UsageError) as error:
                    totals["unsound" if isinstance(error, UnsoundError) else "unreadable"] += 1
                    continue
                totals["accepted"] += 1
                held, extreme = holds(model, random)
                totals["broken"] += not held
                totals["not_finite_under_attack"] += extreme
        finally:
            os.environ.pop("BAGCERT_CACHE")
            if cache is not None:
                os.environ["BAGCERT_CACHE"] = cache
    return totals


def _one(random: np.random.Generator, choices):
    return choices[random.integers(len(choices))]


if __name__ == "__main__":
    run(count, "hostile", __doc__, cases=2000, dtype=tuple(DTYPES), backend="torch")
