"""Names of version 0.1 still work, and warn."""

import subprocess
import sys
from importlib import import_module

import pytest

from bagcert.io.deprecated import MODULES, NAMES

RENAMED = [
    (module, old, MODULES.get(module, module), new) for module, names in NAMES.items() for old, new in names.items()
]


@pytest.mark.parametrize("old", MODULES)
def test_moved_module_warns_and_has_the_same_names(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=rf"^{old} is deprecated; use {MODULES[old]}$") as caught:
        module = import_module(old)
    assert {warning.filename for warning in caught} != {import_module("bagcert.io.deprecated").__file__}
    moved = import_module(MODULES[old])
    public = [name for name in vars(moved) if not name.startswith("_")]
    assert public
    assert all(getattr(module, name) is getattr(moved, name) for name in public)
    monkeypatch.delitem(sys.modules, old)


@pytest.mark.parametrize(("module", "old", "home", "new"), RENAMED)
def test_renamed_name_warns_and_is_the_new_one(module: str, old: str, home: str, new: str) -> None:
    sys.modules.pop(module, None) if module in MODULES else None
    with pytest.warns(DeprecationWarning, match="is deprecated; use"):
        found = getattr(import_module(module), old)
    assert found is getattr(import_module(home), new)


def test_module_that_never_was_is_not_found() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"bagcert\.nothing"):
        import_module("bagcert.nothing")


def test_old_import_warns_at_its_own_line() -> None:
    code = "from bagcert.images import Photo\nfrom bagcert.data.photo import Photo as Moved\nassert Photo is Moved"
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert "<string>:1: DeprecationWarning: bagcert.images is deprecated; use bagcert.data.photo" in done.stderr
