"""Console output of all commands: text, tables, progress bars and errors.

No other module of the command line prints. Names come from files and are untrusted: every text is printed on one line,
without control characters, and is never interpreted as markup.
"""

import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from rich.box import HEAVY_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bagcert.errors import UsageError, cleaned
from bagcert.io.files import require_writable
from bagcert.records import RunInfo, in_unit
from bagcert.training.launcher import is_first_here

WIDTH_WHEN_PIPED = 120


class Report(Protocol):
    """Callback that updates a progress bar."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Sets the number of finished items, the total and a short note."""


def say(line: str = "", style: str = "") -> None:
    """Prints one line of results on stdout."""
    _stdout().print(styled(line, style), soft_wrap=True)


def say_notes(notes: Iterable[str] | None) -> None:
    """Prints notes about the results, one per line."""
    for note in notes or ():
        say(f"note: {note}")


def say_all(text: str) -> None:
    """Prints a multi-line text on stdout. Its line breaks must be trusted."""
    for line in text.removesuffix("\n").split("\n"):
        say(line)


def tell(line: str) -> None:
    """Prints one line of progress on stderr."""
    _stderr().print(styled(line))


def fail(sentence: str, exit_code: int) -> NoReturn:
    """Prints an error on stderr and exits. With several processes on a machine, only the first one prints."""
    if is_first_here():
        _stderr().print(Text.assemble(("Error:", "bold red"), " ", _joined(sentence)))
    sys.exit(exit_code)


def warn(sentence: str) -> None:
    """Prints a warning on stderr."""
    _stderr().print(Text.assemble(("Warning:", "yellow"), " ", _joined(sentence)))


def styled(text: object, style: str = "") -> Text:
    """Returns a text, without control characters, in the given style."""
    return Text(cleaned(text), style)


def print_table(
    rows: Iterable[Sequence[str | Text]],
    left: Sequence[str] = (),
    right: Sequence[str] = (),
    title: str | None = None,
    fold: bool = False,
    first_whole: bool = False,
    names: bool = False,
) -> None:
    """Prints a table on stdout.

    Args:
        rows: one cell per column; plain text, or text from `styled`.
        left, right: names of the left-aligned columns, and of the right-aligned columns after them.
        first_whole: never wrap the first column, even if the table becomes wider than the terminal.
        names: the first column holds file names. If the table is too wide, the names are printed above it as a
            numbered list, and the table shows the numbers.
    """
    rows = list(rows)
    if names and _room(_table(rows, left, right, title, fold, first_whole)).maximum > _stdout().width:
        numbers = itertools.count(1)
        short = []
        for row in rows:
            number = str(next(numbers)) if str(row[0]) else ""
            if number:
                say(f"{number}: {row[0]}")
            short.append((number, *row[1:]))
        rows = short
    table = _table(rows, left, right, title, fold, first_whole)
    _stdout(_room(table).minimum if first_whole else 0).print(table)


def _room(table: Table) -> Measurement:
    """Returns the minimum and maximum width of a table, measured on a console that is wide enough not to limit it."""
    return _stdout(1 << 16).measure(table)


def _table(
    rows: Iterable[Sequence[str | Text]],
    left: Sequence[str],
    right: Sequence[str],
    title: str | None,
    fold: bool,
    first_whole: bool,
) -> Table:
    table = Table(title=None if title is None else styled(title), title_justify="left", box=HEAVY_HEAD)
    for number, name in enumerate((*left, *right)):
        table.add_column(
            styled(name),
            justify="left" if number < len(left) else "right",
            overflow="fold" if fold else "ellipsis",
            no_wrap=first_whole and number == 0,
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else styled(cell) for cell in row))
    return table


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Prints names and values on stdout, one pair per line."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(styled(name), styled(value))
    _stdout().print(table)


def print_json(value: Any) -> None:
    """Prints the machine-readable result on stdout."""
    # DEL is the only control character that json.dumps does not escape.
    print(json.dumps(value, indent=2, allow_nan=False).replace("\x7f", "\\u007f"))


def check_output(path: Path, suffix: str = ".json") -> None:
    """Checks before the work starts that an output path can be written."""
    if path.is_dir():
        raise UsageError(f"the output {path} is a folder; expected a file")
    if path.suffix != suffix:
        raise UsageError(f"the output must be a {suffix} file, got {path}")
    require_writable(path)


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """Shows a progress bar with the remaining time on stderr. Silent if stderr is not a terminal.

    The bar pulses until the total is known.
    """
    console = _stderr()
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(cleaned(what), total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total)
            if note:
                bar.update(task, note=cleaned(note))

        yield report


def print_results(info: RunInfo) -> None:
    """Prints the results of an evaluation."""
    attacked = ("attacked",) if info.attack else ()
    rows = []
    for row in info.results:
        low, high = row.interval95["certified_accuracy"]
        rows.append(
            (
                in_unit(row.threat, info.pixels),
                row.rule,
                f"{row.clean_accuracy:.1%}",
                *(() if row.attacked_accuracy is None else (f"{row.attacked_accuracy:.1%}",)),
                f"{row.certified_accuracy:.1%}",
                f"{low:.1%} to {high:.1%}",
                f"{row.seconds:.2f}",
            )
        )
    # Not a table title, which would be truncated to the table's width.
    say(f"{info.model} on {info.data} ({info.split}, {info.images:,} images)")
    say_notes(info.notes)
    right = ("clean", *attacked, "certified", "certified, 95 % interval", "seconds")
    print_table(rows, ("patch", "rule"), right)
    seconds = info.seconds
    say(
        f"forward pass {seconds['forward']:.1f} s, loading {seconds['load']:.1f} s, {seconds['total']:.1f} s in total "
        f"({info.device}, {info.dtype}, {info.threads} threads)"
    )
    if info.attack:
        attempts, certified, broken = (
            sum(getattr(row, name) or 0 for row in info.results)
            for name in ("attempts", "certified_attempts", "broken_certificates")
        )
        say(f"{attempts:,} attack attempts, {certified:,} of them on certified images; {broken} certificates broken")


def _stdout(least: int = 0) -> Console:
    """Returns a console as wide as the terminal or COLUMNS, and at least `least` characters wide."""
    asked = os.environ.get("COLUMNS", "")
    width = int(asked) if asked.isdecimal() and int(asked) > 0 else None
    if width is None and not sys.stdout.isatty():
        width = WIDTH_WHEN_PIPED
    console = Console(width=width, highlight=False, emoji=False, markup=False)
    if console.width < least:
        console.width = least
    return console


def _stderr() -> Console:
    return Console(stderr=True, highlight=False, emoji=False, markup=False, soft_wrap=True)


def _joined(sentence: str) -> str:
    """Joins a message of several lines, as some libraries raise, into one line."""
    return cleaned(" ".join(line.strip() for line in sentence.splitlines()))
