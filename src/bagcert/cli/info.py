"""`bagcert info`."""

from typing import Annotated, Any

import typer

from bagcert.cli.console import print_facts, print_json, print_table, say
from bagcert.cli.options import Json


def info(
    model: Annotated[str | None, typer.Argument(help="A shipped model, a model folder, or a hub id.")] = None,
    json: Json = False,
) -> None:
    """List the shipped models, recipes, architectures, defenses and rules, or describe one model."""
    if model is None:
        _list(json)
        return
    from bagcert.hub.info import describe
    from bagcert.nets.saved_model import patch_text

    found = describe(model)
    if json:
        print_json(found)
        return
    shown = {key: value for key, value in found.items() if key not in ("recipe", "results") and value is not None}
    shown["patch"] = patch_text(found["patch"], found["image_size_px"])
    print_facts((key.replace("_", " "), _plain(value)) for key, value in shown.items())
    if found["results"]:
        say()
        say("measured results, patches in pixels of the dataset's images", "bold")
        for row in found["results"]:
            say(
                f"  {row['threat']:>8} {row['rule']:<15} clean {row['clean_accuracy']:.1%}  certified "
                f"{row['certified_accuracy']:.1%}  ({row['data']}, {row['images']:,} images)"
            )
    say()
    say("Recipe: see bagcert info MODEL --json, or the key recipe in config.json")


def _list(json: bool) -> None:
    from bagcert.defenses.bagcert import ALIASES, shipped_models
    from bagcert.defenses.table import DEFENSES
    from bagcert.nets import ARCHITECTURES
    from bagcert.rules import RULES
    from bagcert.training.recipe import shipped_recipes

    models = shipped_models()
    if json:
        listing = {"models": list(models), "aliases": ALIASES, "recipes": list(shipped_recipes())}
        tables = {"architectures": list(ARCHITECTURES), "defenses": list(DEFENSES), "rules": list(RULES)}
        print_json({**listing, **tables})
        return
    from bagcert.nets.saved_model import read_config

    rows = []
    for name, folder in models.items():
        config = read_config(folder)
        alias = ", ".join(alias for alias, target in ALIASES.items() if target == name)
        rows.append((name, alias, str(len(config.class_names)), config.rule, config.patch_text, config.architecture))
    print_table(rows, ("name", "alias", "classes", "rule", "patch", "architecture"), title="Models")
    say(f"Recipes: {', '.join(shipped_recipes())}")
    say(f"Architectures: {', '.join(ARCHITECTURES)}")
    say(f"Defenses: {', '.join(DEFENSES)}")
    say(f"Rules: {', '.join(RULES)}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
