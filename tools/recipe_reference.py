"""Generates docs/recipes.md from the recipe classes. With --check, exits with 1 if the file is out of date."""

import sys
import types
import typing
from pathlib import Path

from pages import cell, write_or_check
from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from bagcert.training.recipe import Recipe, shipped_recipes

FILE = Path(__file__).resolve().parents[1] / "docs" / "recipes.md"

HEAD = """\
# Recipe keys

A recipe is a TOML file that says everything a training run needs. A key that is left out has its default.
`bagcert train RECIPE --print-recipe` prints all keys of a recipe, and `--set section.key=value` changes one for a run.

This page is written by `tools/recipe_reference.py` from the models in `bagcert.training.recipe`.
"""

TABLE = ["| key | values | default | meaning |", "|---|---|---|---|"]


def reference() -> str:
    """Renders the page in Markdown."""
    lines = [HEAD, "Shipped recipes: " + ", ".join(f"`{name}`" for name in shipped_recipes()) + ".", ""]
    lines += [
        "| key | values | default | meaning |",
        "|---|---|---|---|",
        _row("name", Recipe.model_fields["name"]),
        "",
    ]
    for section, field in Recipe.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            lines += [f"## {section}", "", cell(field.annotation.__doc__ or ""), ""]
            lines += TABLE
            lines += [_row(f"{section}.{key}", inner) for key, inner in field.annotation.model_fields.items()]
            lines += [""]
    return "\n".join(lines)


def _row(key, field) -> str:
    default = "required" if field.default is PydanticUndefined else _value(field.default)
    return f"| `{key}` | {_values(field)} | {default} | {cell(field.description or '')} |"


def _value(value) -> str:
    if value is None:
        return "absent"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _values(field) -> str:
    kind = _without_none(field.annotation)
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{each}`" for each in typing.get_args(kind))
    if typing.get_origin(kind) is tuple:
        return "two integers"
    name = {bool: "true, false", int: "integer", float: "number", str: "text"}[kind]
    bounds = {type(each).__name__: vars_of(each) for each in field.metadata}
    signs = {"Ge": "≥", "Gt": ">", "Le": "≤", "Lt": "<"}
    limits = [f"{sign} {_bound(bounds[each])}" for each, sign in signs.items() if each in bounds]
    return " ".join([name, ", ".join(limits)]).strip()


def vars_of(constraint):
    """Returns the number in a bound."""
    return next((getattr(constraint, name) for name in ("ge", "gt", "le", "lt") if hasattr(constraint, name)), None)


def _bound(value) -> str:
    return {2**63: "2^63", 2**31: "2^31"}.get(value, f"{value:,}")


def _without_none(kind):
    """Returns the type without None and without validators."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kind = next(each for each in typing.get_args(kind) if each is not type(None))
    while typing.get_origin(kind) is typing.Annotated:
        kind = typing.get_args(kind)[0]
    return kind


def main() -> int:
    """Writes or checks the page."""
    return write_or_check(FILE, reference())


if __name__ == "__main__":
    sys.exit(main())
