"""Docstrings refer only to documents and headings that are in the repository."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = [*(ROOT / "src" / "bagcert").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
REFERENCE = re.compile(r'(docs/\w+\.md)(?:,?\s+"([^"\\]+?)")?')


def references() -> set[tuple[str, str]]:
    """(document, heading or nothing) of all references, with lines joined."""
    found = set()
    for path in FILES:
        if path != Path(__file__):
            text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8"))
            found |= {(document, heading or "") for document, heading in REFERENCE.findall(text)}
    return found


@pytest.mark.parametrize(("document", "heading"), sorted(references()))
def test_cited_document_and_heading_exist(document: str, heading: str) -> None:
    lines = (ROOT / document).read_text(encoding="utf-8").splitlines()
    assert not heading or any(re.fullmatch(rf"#+ (\d[\d.]* )?{re.escape(heading)}", line) for line in lines)


def test_no_docstring_cites_a_document_outside_the_repository() -> None:
    for path in FILES:
        if path != Path(__file__):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"METHOD (sections? )?\d|of the design notes\.", text), path
