"""Errors a user can cause. Each carries the exit code the command line returns for it."""

import re
from collections.abc import Iterable
from difflib import get_close_matches

CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""What has no place in a name or a message: line ends, what moves a terminal's cursor, halves of characters."""

BIDIRECTIONAL = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""What turns the direction of writing, so that a text reads otherwise than it is."""


class BagcertError(Exception):
    """Something went wrong that is worth one clear sentence, not a traceback."""

    exit_code = 1


class UsageError(BagcertError, ValueError):
    """An argument, option, recipe or model name that makes no sense as given."""

    exit_code = 2


class UnsoundError(BagcertError):
    """A certificate was broken, or a network reaches beyond its declared receptive field."""

    exit_code = 4


class UnreadableError(BagcertError):
    """A file that is missing, truncated, of the wrong kind, or too large to be opened safely."""

    exit_code = 5


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of a sentence about an unknown name: the known one nearest to it, or all of them."""
    known = list(known)
    near = get_close_matches(name, known, 1, cutoff)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def cleaned(text: object) -> str:
    r"""A text on one line, of the same length, with "?" for all that moves a cursor or turns the direction of writing.

    >>> cleaned("two\nlines\x1b[2J")
    'two?lines?[2J'
    """
    return BIDIRECTIONAL.sub("?", CONTROL.sub("?", str(text)))


def shown(text: object, limit: int = 200) -> str:
    r"""A text that came out of a file, fit for a message: on one line, without control characters, not too long.

    >>> shown("two\nlines"), shown("abcdef", 3)
    ('two?lines', 'abc ...')
    """
    line = cleaned(str(text).strip())
    return line if len(line) <= limit else line[:limit] + " ..."
