"""Errors that users can cause. Each class has the exit code that the command line returns for it."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters not allowed in names and messages: line ends, terminal control characters and surrogates."""

BIDIRECTIONAL = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Bidirectional control characters, which make text display in a different order."""


class BagcertError(Exception):
    """Base class of errors that the command line reports as one sentence, without a traceback."""

    exit_code = 1


class UsageError(BagcertError, ValueError):
    """Invalid argument, option, recipe or model name."""

    exit_code = 2


class UnsoundError(BagcertError):
    """A certificate is or may be invalid, for example because a network exceeds its declared receptive field."""

    exit_code = 4


class UnreadableError(BagcertError):
    """A file is missing, truncated, of the wrong type, or too large to be opened safely."""

    exit_code = 5


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """End of an error message about an unknown name: suggests the closest known name, or lists all names."""
    known = list(known)
    near = get_close_matches(name, known, 1, cutoff)
    return f"; did you mean {near[0]}?" if near else f"; choose from {', '.join(known)}"


def reason_of(error: Exception) -> str:
    """First line of the text of an error, or its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def cleaned(text: object) -> str:
    r"""Replace control and bidirectional characters by "?"; the length stays the same.

    >>> cleaned("two\nlines\x1b[2J")
    'two?lines?[2J'
    """
    return BIDIRECTIONAL.sub("?", CONTROL.sub("?", str(text)))


def sanitize(text: object, limit: int = 200) -> str:
    r"""Prepare untrusted text for a message: one line, no control characters, at most `limit` characters.

    >>> sanitize("two\nlines"), sanitize("abcdef", 3)
    ('two?lines', 'abc ...')
    """
    line = cleaned(str(text).strip())
    return line if len(line) <= limit else line[:limit] + " ..."
