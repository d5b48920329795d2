"""All that the command line prints goes through one module, which lets nothing move the cursor."""

import ast
import io
import re
import sys
from pathlib import Path

import pytest

from bagcert.cli import console
from bagcert.records import Row, RunInfo

SOURCE = Path(__file__).parents[2] / "src" / "bagcert"
CONSOLE = SOURCE / "cli" / "console.py"
PRINTERS = {"print", "echo", "secho", "print_exception", "showtraceback"}
STREAMS = {"stdout", "stderr", "__stdout__", "__stderr__"}
MOVES = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
HOSTILE = "\x1b[2J\x1b]0;t\x07\x9b31m\u202e\r\u2066\x7f\udcff\x85\x08[/x][red]]\nyes"


def _prints(tree: ast.AST) -> list[int]:
    """Lines of a module that write to a terminal by themselves."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            stream = node.func.value if isinstance(node.func, ast.Attribute) else None
            writes = name in ("write", "writelines") and isinstance(stream, ast.Attribute) and stream.attr in STREAMS
            if name in PRINTERS or writes:
                found.append(node.lineno)
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        if any(name.split(".")[0] == "rich" for name in names):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", sorted(SOURCE.rglob("*.py")), ids=lambda path: str(path.relative_to(SOURCE)))
def test_no_other_module_prints(path: Path) -> None:
    found = _prints(ast.parse(path.read_text(encoding="utf-8")))
    assert bool(found) == (path == CONSOLE), f"{path} prints in lines {found}; {CONSOLE.name} is for that"


@pytest.mark.parametrize(
    "text",
    ["print('a')", "typer.echo('a')", "sys.stdout.write('a')", "import rich.table", "from rich.text import Text"],
)
def test_a_module_that_prints_is_noticed(text: str) -> None:
    assert _prints(ast.parse(text)) == [1]


def _said(capsys: pytest.CaptureFixture[str]) -> str:
    out, err = capsys.readouterr()
    return out + err


def test_every_way_to_print_leaves_no_control_character(capsys: pytest.CaptureFixture[str]) -> None:
    row = Row(HOSTILE, None, HOSTILE, 1.0, 0.5, 0.5, {"certified_accuracy": [0.1, 0.9]}, 1.0)
    texts = {name: HOSTILE for name in ("model", "weights_sha256", "data", "split", "device", "backend", "dtype")}
    seconds = {"forward": 1.0, "load": 1.0, "total": 1.0}
    info = RunInfo(**texts, images=1, limit=None, threads=1, versions={}, seconds=seconds, results=[row])
    ways = {
        "say": lambda: console.say(HOSTILE, "bold"),
        "say_all": lambda: console.say_all(HOSTILE),
        "tell": lambda: console.tell(HOSTILE),
        "warn": lambda: console.warn(HOSTILE),
        "fail": lambda: console.fail(HOSTILE, 1),
        "styled": lambda: console.say(console.styled(HOSTILE, "red").plain),
        "print_table": lambda: console.print_table(
            [(HOSTILE, console.styled(HOSTILE, "red"))], (HOSTILE,), (HOSTILE,), HOSTILE, fold=True
        ),
        "say_notes": lambda: console.say_notes([HOSTILE]),
        "print_facts": lambda: console.print_facts([(HOSTILE, HOSTILE)]),
        "print_json": lambda: console.print_json({HOSTILE: HOSTILE}),
        "print_results": lambda: console.print_results(info),
    }
    others = {"stdout", "stderr", "progress", "check_output"}
    public = {name for name, value in vars(console).items() if callable(value) and not name.startswith("_")}
    public = {name for name in public if getattr(getattr(console, name), "__module__", "") == console.__name__}
    assert public - others - {"Report"} == ways.keys(), "a new way to print is tried here as well"
    for name, way in ways.items():
        try:
            way()
        except SystemExit:
            assert name == "fail"
        found = _said(capsys)
        assert "yes" in found, name
        assert not MOVES.search(found), f"{name} lets {MOVES.findall(found)} through"
        if name != "print_json":
            assert "[/x][red]]" in found.replace("\n", ""), f"{name} reads markup"


@pytest.mark.parametrize("name", ["say", "tell", "warn", "fail"])
def test_a_line_is_one_line(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        getattr(console, name)(HOSTILE + "\n" + HOSTILE, *([1] if name == "fail" else []))
    except SystemExit:
        assert name == "fail"
    assert _said(capsys).count("\n") == 1


def test_a_progress_bar_shows_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "stderr", stream)
    with console.progress(HOSTILE) as report:
        report(1, 2, HOSTILE)
    shown = stream.getvalue()
    assert shown.count("[/x][red]]?yes") >= 2
    for part in ("\x1b[2J", "\x1b]0;", "\x07", "\x9b", "\u202e", "\x7f"):
        assert part not in shown
