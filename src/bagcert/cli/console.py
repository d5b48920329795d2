"""What every command shares: where text goes, how progress looks, the table of results."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from bagcert.errors import CONTROL
from bagcert.ranks import is_first_here
from bagcert.records import RunInfo

WIDTH_WHEN_PIPED = 120


class Report(Protocol):
    """Tells a progress bar where the work stands."""

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Done so far, of how many, and a short note."""


def stdout() -> Console:
    """For results."""
    return Console(width=None if sys.stdout.isatty() else WIDTH_WHEN_PIPED, highlight=False, emoji=False)


def stderr() -> Console:
    """For progress and errors."""
    return Console(stderr=True, highlight=False, emoji=False, soft_wrap=True)


def fail(sentence: str, exit_code: int) -> NoReturn:
    """One sentence on stderr, and out. Of several processes on a machine the first says it."""
    if is_first_here():
        stderr().print(f"[bold red]Error:[/] {_line(sentence)}")
    sys.exit(exit_code)


def warn(sentence: str) -> None:
    """One sentence on stderr."""
    stderr().print(f"[yellow]Warning:[/] {_line(sentence)}")


def print_json(value: Any) -> None:
    """The machine-readable result, alone on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def check_output(path: Path, suffix: str = ".json") -> None:
    """Refuses an output path before the work, not after it."""
    from bagcert.errors import UsageError
    from bagcert.files import require_writable

    if path.is_dir():
        raise UsageError(f"the output {path} is a folder; a file was expected")
    if path.suffix != suffix:
        raise UsageError(f"the output must be a {suffix} file, got {path}")
    require_writable(path)


@contextmanager
def progress(what: str) -> Iterator[Report]:
    """A progress bar on stderr with the time left; silent when stderr is no terminal.

    Until it is told how much there is to do, it only moves to and fro.
    """
    console = stderr()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task(what, total=None, note="")

        def report(done: int, total: int, note: str = "") -> None:
            bar.update(task, completed=done, total=total)
            if note:
                bar.update(task, note=note)

        yield report


def print_results(info: RunInfo) -> None:
    """The table of an evaluation."""
    table = Table()
    table.add_column("patch")
    table.add_column("rule")
    attacked = ("attacked",) if info.attack else ()
    for column in ("clean", *attacked, "certified", "certified, 95 % interval", "seconds"):
        table.add_column(column, justify="right")
    for row in info.results:
        low, high = row.interval95["certified_accuracy"]
        table.add_row(
            row.threat,
            row.rule,
            f"{row.clean_accuracy:.1%}",
            *(() if row.attacked_accuracy is None else (f"{row.attacked_accuracy:.1%}",)),
            f"{row.certified_accuracy:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{row.seconds:.2f}",
        )
    console = stdout()
    title = f"{info.model} on {info.data} ({info.split}, {info.images:,} images)"
    console.print(escape(title), soft_wrap=True)  # a table's own title would be cut to the table's width
    console.print(table)
    seconds = info.seconds
    console.print(
        f"forward pass {seconds['forward']:.1f} s, loading {seconds['load']:.1f} s, {seconds['total']:.1f} s in all "
        f"({info.device}, {info.dtype}, {info.threads} threads)"
    )
    if info.attack:
        attempts, certified, broken = (
            sum(getattr(row, name) or 0 for row in info.results)
            for name in ("attempts", "certified_attempts", "broken_certificates")
        )
        console.print(f"{attempts:,} attempts, {certified:,} of them on certified images; {broken} certificates broken")


def _line(sentence: str) -> str:
    joined = " ".join(line.strip() for line in sentence.splitlines())
    return escape(CONTROL.sub("?", joined))  # names of files may hold what moves the cursor
