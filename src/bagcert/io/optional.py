"""Optional dependencies: lazy imports with an install hint."""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from bagcert.errors import UsageError


def require(module: str, extra: str, what: str = "this") -> Any:
    """Imports an optional library, or raises an error that names the extra to install.

    Args:
        extra: extra of this package, as in `pip install "bagcert[...]"`.
        what: the feature that needs the library, as the singular subject of the error message.

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
    """Returns whether libraries are installed, without importing them."""
    return all(map(find_spec, modules))


def require_installed(modules: Sequence[str], extra: str, what: str = "this") -> None:
    """Checks that several optional libraries are installed, without importing them.

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
