"""Libraries that only some commands need, and what to install where one is missing."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from bagcert.errors import UsageError


def require(module: str, extra: str, what: str = "this") -> Any:
    """Imports an optional library, or says which extra brings it.

    Args:
        module: its import name, such as `onnxruntime`.
        extra: of this package, as in `pip install "bagcert[...]"`.
        what: the subject of the sentence, in the singular: what cannot be done without the library.

    Raises:
        UsageError: the library is not installed.

    >>> require("json", "onnx").dumps([1])
    '[1]'
    >>> require("no_such_library", "onnx", "measuring an ONNX file")
    Traceback (most recent call last):
    bagcert.errors.UsageError: measuring an ONNX file needs no_such_library, which is not installed here: \
pip install "bagcert[onnx]" brings it
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or module).partition(".")[0] != module.partition(".")[0]:
            raise  # it is there, and broken in a way of its own
        raise _missing([module], extra, what) from None


def installed(modules: Sequence[str]) -> bool:
    """Whether libraries are there, by their import names, without the seconds that importing some of them takes."""
    return all(map(find_spec, modules))


def require_installed(modules: Sequence[str], extra: str, what: str = "this") -> None:
    """Like `require` for several libraries, which are imported only when they are first used.

    Args:
        modules: their import names, not those of parts of them.
        extra, what: as in `require`.

    Raises:
        UsageError: some are not installed.

    >>> require_installed(["json", "no_such_library"], "onnx", "exporting")
    Traceback (most recent call last):
    bagcert.errors.UsageError: exporting needs no_such_library, which is not installed here: \
pip install "bagcert[onnx]" brings it
    """
    if missing := [name for name in modules if not installed([name])]:
        raise _missing(missing, extra, what)


def _missing(modules: Sequence[str], extra: str, what: str) -> UsageError:
    verb, pronoun = ("is", "it") if len(modules) == 1 else ("are", "them")
    return UsageError(
        f"{what} needs {' and '.join(modules)}, which {verb} not installed here: "
        f'pip install "bagcert[{extra}]" brings {pronoun}'
    )
