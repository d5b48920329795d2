"""Generated pages of the documentation: Markdown cells, and writing or checking a page."""

import sys
from pathlib import Path


def plain(text: str) -> str:
    """Escapes Markdown in a text, except inside backticks."""
    parts = text.strip().split("`")
    escaped = [
        part if i % 2 else "".join(f"\\{sign}" if sign in "*_<>[]#" else sign for sign in part)
        for i, part in enumerate(parts)
    ]
    return "`".join(escaped)


def cell(text: str) -> str:
    """Escapes Markdown in a text for a table cell."""
    return " ".join(plain(text).split()).replace("|", "\\|")


def write_or_check(file: Path, page: str) -> int:
    """Writes a page. With --check nothing is written, and the exit code is 1 if the file differs from the page."""
    if "--check" not in sys.argv[1:]:
        file.write_text(page, encoding="utf-8")
    elif not file.exists() or file.read_text(encoding="utf-8") != page:
        print(f"{file} is out of date: python tools/{Path(sys.argv[0]).name}")
        return 1
    return 0
