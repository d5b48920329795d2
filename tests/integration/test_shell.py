"""Completion in the shell, and colors only where they are wanted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.command import run

COMMANDS = {"train", "evaluate", "certify", "push", "info"}


def complete(line: str) -> str:
    """What bash would be told after so much was typed."""
    code = "import sys; sys.argv[0] = 'bagcert'; from bagcert.cli import main; main()"
    words = line.split(" ")
    environment = {
        **os.environ,
        "_BAGCERT_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout


def test_commands_and_options_are_completed() -> None:
    assert set(complete("bagcert ").split()) >= COMMANDS
    assert complete("bagcert certi").split() == ["certify"]
    options = set(complete("bagcert push --").split())
    assert {"--dry-run", "--private", "--json"} <= options


def test_completion_is_offered_but_takes_no_room_in_help() -> None:
    out = run("--help").out
    assert "--show-completion" not in out
    assert out.count("--install-completion") == 1
    assert "Shell completion: bagcert --install-completion" in " ".join(out.split())


@pytest.mark.parametrize("no_color", ["1", ""])
def test_tables_have_colors(no_color: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (8, 8), 90).save(tmp_path / "a.png")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", no_color)
    result = run("certify", tmp_path / "a.png", "--model", "digits", "--patch", "1")
    assert result.code == 0, result
    colored = "\x1b[31m" in result.out or "\x1b[32m" in result.out  # the certificate: no in red, yes in green
    assert colored is (no_color == "")
