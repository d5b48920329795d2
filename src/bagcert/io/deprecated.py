"""Old public names: each still works for one version, with a DeprecationWarning."""

import sys
import warnings
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType

MODULES = {
    "bagcert.failsafe": "bagcert.defenses.failsafe",
    "bagcert.images": "bagcert.data.photo",
    "bagcert.nets.model_folder": "bagcert.nets.saved_model",
    "bagcert.preprocess": "bagcert.data.preprocess",
    "bagcert.record_lines": "bagcert.proofs.lines",
    "bagcert.verify": "bagcert.proofs.verify",
}
"""Modules that moved after 0.1: the old name and the new one."""

NAMES = {
    "bagcert.records": {"telling_column": "headline_column"},
    "bagcert.verify": {"Verdict": "VerifyResult"},
}
"""Renamed after 0.1: in each module the old names and the new ones."""


class _MovedModules(MetaPathFinder, Loader):
    """Imports an old module as a copy of the names of the new one."""

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in MODULES else None

    def exec_module(self, module: ModuleType) -> None:
        old, new = module.__name__, MODULES[module.__name__]
        warnings.warn(f"{old} is deprecated; use {new}", DeprecationWarning, stacklevel=2)
        names = {name: value for name, value in vars(import_module(new)).items() if not name.startswith("__")}
        vars(module).update(names, **{before: names[now] for before, now in NAMES.get(old, {}).items()})


def find_moved_modules() -> None:
    """Lets `import` find the modules in `MODULES` by their old names."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules())
