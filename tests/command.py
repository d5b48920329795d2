"""The command line in this process."""

import io
import signal
import sys
from contextlib import redirect_stderr, redirect_stdout
from typing import NamedTuple

import pytest

from bagcert import cli


class Result(NamedTuple):
    code: int
    out: str
    err: str


def run(*arguments: object) -> Result:
    """`bagcert` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    before = sys.argv, signal.getsignal(signal.SIGTERM)
    sys.argv = ["bagcert", *map(str, arguments)]
    try:
        with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as exited:
            cli.main()
    finally:
        sys.argv = before[0]
        signal.signal(signal.SIGTERM, before[1])
    return Result(int(exited.value.code or 0), out.getvalue(), err.getvalue())


def check_mistake(result: Result, code: int, *words: str) -> None:
    """The exit code, nothing on stdout, and one sentence on stderr."""
    assert result.code == code, result
    assert result.out == ""
    (line,) = result.err.splitlines()
    assert line.startswith("Error: ")
    for word in words:
        assert word in line


def check_error(result: Result, code: int, *words: str) -> None:
    """The exit code, and what stderr says, whatever else was printed."""
    assert result.code == code, result
    for word in words:
        assert word in result.err, result
