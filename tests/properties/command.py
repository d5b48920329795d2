"""The command line of the modules here that count cases."""

import argparse
import json
from collections.abc import Callable
from typing import Any


def run(
    count: Callable[..., dict[str, Any]], name: str, about: str, cases: int, **options: int | str | tuple[str, ...]
) -> None:
    """Runs `count` with --cases, --seed and `options`, and prints what it returns as JSON, with the command.

    Args:
        count: takes all of them by name.
        name: of the module.
        about: help text; the first line is used.
        cases: default number of cases.
        options: further options, with their defaults, or with all allowed values, the default first.
    """
    parser = argparse.ArgumentParser(description=about.splitlines()[0])
    for option, default in {"cases": cases, "seed": 0, **options}.items():
        words = default if isinstance(default, tuple) else None
        first = words[0] if words else default
        parser.add_argument(f"--{option.replace('_', '-')}", type=type(first), default=first, choices=words)
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    chosen = vars(parser.parse_args())
    indent = None if chosen.pop("json") else 1
    given = " ".join(f"--{option.replace('_', '-')} {value}" for option, value in chosen.items())
    print(json.dumps({"command": f"python -m tests.properties.{name} {given}", **count(**chosen)}, indent=indent))
