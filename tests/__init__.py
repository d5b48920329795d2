"""What all tests share."""

from collections.abc import Callable

import pytest


def refused(error: type[Exception], words: str | None, call: Callable, /, *arguments: object, **options: object) -> str:
    """The sentence with which a call is refused: one line without control characters, in which the words are found."""
    with pytest.raises(error, match=words or None) as caught:
        call(*arguments, **options)
    assert str(caught.value).isprintable()
    return str(caught.value)
