"""Lazy loading of a package's public names, so that the command line starts without importing torch."""

import sys
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, homes: Mapping[str, str], *, deprecated: Mapping[str, str] | None = None
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Creates `__getattr__` and `__dir__` for a package whose public names are defined in other modules.

    Args:
        homes: public name -> module that defines it, or "module:other" if it is called `other` there.
        deprecated: old name -> new name. Old names still work, with a DeprecationWarning.

    Returns:
        The two functions, to be assigned to `__getattr__` and `__dir__` in the package.
    """
    old = deprecated or {}

    def load(name: str) -> Any:
        if name in old:
            warnings.warn(f"{package}.{name} is deprecated; use {package}.{old[name]}", DeprecationWarning, 2)
            return getattr(sys.modules[package], old[name])
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module, _, attribute = homes[name].partition(":")
        value = getattr(import_module(module), attribute or name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *homes})

    return load, names
