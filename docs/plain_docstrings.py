"""The package's docstrings are plain text with `code` in backticks; here they become what Sphinx reads.

Code spans become literals, and formulas such as |z| or a*b keep their signs, which are markup to Sphinx otherwise.
"""

import re

from sphinx.application import Sphinx

SPAN = re.compile(r"(`[^`]+`)")
MARKUP = re.compile(r"([*|\\]|_(?!\w))")


def convert(line: str) -> str:
    """One line of text."""
    parts = SPAN.split(line)
    return "".join(
        f"`{part}`" if SPAN.fullmatch(part) else MARKUP.sub(r"\\\1", part).replace("`", r"\`") for part in parts
    )


def _convert(app: Sphinx, what: str, name: str, thing: object, options: object, lines: list[str]) -> None:
    example = False
    for number, line in enumerate(lines):
        example = bool(line.strip()) and (example or line.lstrip().startswith(">>>"))
        if not example:
            lines[number] = convert(line)


def setup(app: Sphinx) -> dict[str, bool]:
    """Runs before the sections of a docstring are read."""
    app.connect("autodoc-process-docstring", _convert, priority=100)
    return {"parallel_read_safe": True}
