"""Documents that a tool writes are what it writes now."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOLS = ("command_reference", "recipe_reference", "results_tables", "scaling_tables")


@pytest.mark.parametrize("tool", TOOLS)
def test_generated_document_is_current(tool: str) -> None:
    command = [sys.executable, str(ROOT / "tools" / f"{tool}.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_tool_that_checks_a_document_is_listed() -> None:
    texts = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py")}
    checking = {name for name, text in texts.items() if "--check" in text and "__main__" in text}
    assert checking == set(TOOLS)
