"""Writes docs/commands.md from the commands themselves. With --check: exits with 1 where the file is out of date."""

import sys
from pathlib import Path

import typer.main

from bagcert.cli import app

FILE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"

HEAD = """\
# Commands

Results go to stdout, progress and errors to stderr. Exit codes: 0 fine, 1 failed, 2 usage, 3 a `--fail-under` bar not
met, 4 a certificate was broken or locality failed, 5 some inputs unreadable.

This page is written by `tools/command_reference.py` from the commands.
"""


def reference() -> str:
    """The page, in Markdown."""
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    return "\n".join([HEAD, *(section(name, command) for name, command in sorted(commands.items()))])


def section(name, command) -> str:
    """One command: its line, its help, its arguments and options."""
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    words = ["bagcert", name, *(_argument(argument) for argument in arguments), "[OPTIONS]"]
    rows = [(f"`{_name(argument)}`", _text(argument)) for argument in arguments]
    rows += [(f"`{_option(option)}`", _text(option)) for option in options if not option.hidden]
    table = ["| argument or option | meaning |", "|---|---|", *(f"| {left} | {right} |" for left, right in rows)]
    return "\n".join([f"## {name}", "", f"    {' '.join(words)}", "", _plain(command.help), "", *table, ""])


def _argument(argument) -> str:
    return _name(argument) if argument.required else f"[{_name(argument)}]"


def _name(parameter) -> str:
    return parameter.metavar or parameter.name.upper()


def _option(option) -> str:
    names = ", ".join(option.opts)
    if option.is_flag:
        return names
    return f"{names} {_name(option)}"


def _text(parameter) -> str:
    text = _cell(parameter.help or "")
    if parameter.param_type_name == "option" and not parameter.is_flag and parameter.default not in (None, (), []):
        text += f" Default: `{parameter.default}`."
    return text + (" Required." if parameter.required else "")


def _cell(text: str) -> str:
    return _plain(text).replace("\n", " ").replace("|", "\\|")


def _plain(text: str) -> str:
    """Help is plain text: outside of backticks nothing in it is markup."""
    parts = text.strip().split("`")
    escaped = [
        part if i % 2 else "".join(f"\\{sign}" if sign in "*_<>[]#" else sign for sign in part)
        for i, part in enumerate(parts)
    ]
    return "`".join(escaped)


def main() -> int:
    """Writes or checks."""
    page = reference()
    if "--check" in sys.argv[1:]:
        if FILE.exists() and FILE.read_text(encoding="utf-8") == page:
            return 0
        print(f"{FILE} is out of date: python tools/command_reference.py")
        return 1
    FILE.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
