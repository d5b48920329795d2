"""Libraries that only some commands need, and what to install where one is missing."""

from importlib import import_module
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
        raise UsageError(
            f'{what} needs {module}, which is not installed here: pip install "bagcert[{extra}]" brings it'
        ) from None
