"""`bagcert info`."""

from typing import Annotated, Any

import typer

from bagcert.cli.console import print_json, stdout
from bagcert.cli.options import Json


def info(
    model: Annotated[str | None, typer.Argument(help="A shipped model, a model folder, or a hub id.")] = None,
    json: Json = False,
) -> None:
    """List the shipped models, recipes and architectures, or describe one model."""
    if model is None:
        _list(json)
        return
    from bagcert.describe import describe

    found = describe(model)
    if json:
        print_json(found)
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for key, value in found.items():
        if key not in ("recipe", "results"):
            table.add_row(key.replace("_", " "), escape(_plain(value)))
    console = stdout()
    console.print(table)
    if found["results"]:
        console.print("\n[bold]measured[/]")
        for row in found["results"]:
            console.print(
                f"  {row['threat']:>8} {row['rule']:<15} clean {row['clean_accuracy']:.1%}  certified "
                f"{row['certified_accuracy']:.1%}  ({row['data']}, {row['images']:,} images)",
                markup=False,
            )
    console.print("\nThe recipe: bagcert info MODEL --json, or recipe in config.json")


def _list(json: bool) -> None:
    from bagcert.defenses.bagcert import ALIASES, shipped_models
    from bagcert.nets import ARCHITECTURES
    from bagcert.recipe import shipped_recipes

    models = shipped_models()
    if json:
        listing = {"models": list(models), "aliases": ALIASES, "recipes": list(shipped_recipes())}
        print_json({**listing, "architectures": list(ARCHITECTURES)})
        return
    from rich.table import Table

    from bagcert.nets.model_folder import read_config

    console = stdout()
    table = Table(title="Models", title_justify="left")
    for column in ("name", "alias", "classes", "rule", "patch, px", "architecture"):
        table.add_column(column)
    for name, folder in models.items():
        config = read_config(folder)
        alias = ", ".join(alias for alias, target in ALIASES.items() if target == name)
        table.add_row(name, alias, str(len(config.class_names)), config.rule, config.patch, config.architecture)
    console.print(table)
    console.print(f"Recipes: {', '.join(shipped_recipes())}")
    console.print(f"Architectures: {', '.join(ARCHITECTURES)}")


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items() if inner is not None)
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
