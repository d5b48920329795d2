"""Ablations: one change of a recipe at a time, evaluated on the held-out split of the training set.

    python benchmarks/ablations.py --data data/cifar10 --epochs 3 --out results/ablations/cifar10-cpu.json

The rows stand in `ablations.toml`. Every row is trained with the same seed and number of epochs. A row that is
in the output already, with the same settings, is not run again; so the command can be stopped and repeated.
"""

import argparse
import json
import platform
import tempfile
import tomllib
from pathlib import Path

import torch

from bagcert.data import load_dataset
from bagcert.defenses.bagcert import load
from bagcert.evaluation.evaluate import evaluate, versions
from bagcert.hub.info import describe
from bagcert.io.files import write_atomically
from bagcert.training.loop import train
from bagcert.training.recipe import load_recipe

ROWS = Path(__file__).with_name("ablations.toml")


def main() -> None:
    """Trains and evaluates missing rows, and writes the results after each row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="cifar10-cpu")
    parser.add_argument("--data", default="data/cifar10")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--limit", type=int, help="train on the first so many images only")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes that all rows share")
    parser.add_argument("--rows", type=int, nargs="*", help="only these rows, counted from 0")
    parser.add_argument("--out", type=Path, default=Path("results/ablations/cifar10-cpu.json"))
    arguments = parser.parse_args()
    setting = {
        "recipe": arguments.recipe,
        "epochs": arguments.epochs,
        "limit": arguments.limit,
        "shared": arguments.set,
    }
    result = {
        "command": f"python benchmarks/ablations.py --recipe {arguments.recipe} --data {arguments.data} "
        f"--epochs {arguments.epochs}"
        + (f" --limit {arguments.limit}" if arguments.limit else "")
        + (f" --set {' '.join(arguments.set)}" if arguments.set else ""),
        "part": "validation",
        **setting,
        "device": f"cpu ({platform.machine()})",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "results": [],
    }
    if arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        if all(before[key] == value for key, value in setting.items()):
            result["results"] = before["results"]
    done = {json.dumps(row["set"]) for row in result["results"]}
    rows = tomllib.loads(ROWS.read_text())["row"]
    chosen = rows if arguments.rows is None else [rows[i] for i in arguments.rows]
    for row in chosen:
        if json.dumps(row["set"]) not in done:
            result["results"].append(judge(row, arguments))
            order = [other["name"] for other in rows]
            result["results"].sort(key=lambda judged: order.index(judged["name"]))
            write_atomically(arguments.out, (json.dumps(result, indent=2) + "\n").encode())


def judge(row: dict, arguments: argparse.Namespace) -> dict:
    """Trains one row and evaluates it on the held-out images against the recipe's own patch."""
    recipe = load_recipe(arguments.recipe, [*arguments.set, *row["set"], f"train.epochs={arguments.epochs}"])
    patch = load_recipe(arguments.recipe).defense.patch
    source = load_dataset(arguments.data, "train", arguments.limit)
    held_out = source.split_off(recipe.data.validation, recipe.data.split_seed)[1]
    with tempfile.TemporaryDirectory() as folder:
        train(recipe, Path(folder), source)
        model, facts = load(folder), describe(folder)
        rules = ["double-masking", "vote"] if recipe.model.head == "binary" else ["double-masking"]
        info = evaluate(model, held_out, patches=[patch], rules=rules).info
        assert model.config is not None
        seconds = model.config.provenance["training_seconds"]
    judged = {
        **row,
        "seed": recipe.train.seed,
        "parameters": facts["parameters"],
        "multiply_adds": facts["multiply_adds"],
        "training_seconds": seconds,
        "images": info.images,
        "rules": {
            found.rule: {
                "clean_accuracy": found.clean_accuracy,
                "certified_accuracy": found.certified_accuracy,
                "interval95": found.interval95,
            }
            for found in info.results
        },
    }
    print(row["name"], {rule: list(found.values())[:2] for rule, found in judged["rules"].items()}, flush=True)
    return judged


if __name__ == "__main__":
    main()
