"""What users import: every public name exists, shows up in `dir`, and loads only when it is asked for."""

import inspect
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from bagcert.io.lazy import lazy_names

PACKAGES = ("bagcert", "bagcert.defenses")
FUNCTIONS = ("attack", "evaluate", "export", "load")
NAMES = [(package, name) for package in PACKAGES for name in import_module(package).__all__]


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_public_name_exists_and_is_listed(package: str, name: str) -> None:
    module = import_module(package)
    assert getattr(module, name) is getattr(module, name)
    assert name in dir(module)


@pytest.mark.parametrize(("package", "name"), NAMES)
def test_public_name_is_in_the_reference(package: str, name: str) -> None:
    """docs/api.md lists the module that defines it; constants are listed by name."""
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    modules = re.findall(r"automodule:: (\S+)", page)
    home = getattr(getattr(import_module(package), name), "__module__", "bagcert.defenses.table")
    assert home in modules


def test_table_of_the_reference_is_the_public_root() -> None:
    page = (Path(__file__).parents[2] / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[?`(\w+)`", page, re.MULTILINE)
    assert sorted(listed) == sorted(import_module("bagcert").__all__)


@pytest.mark.parametrize("name", import_module("bagcert").__all__)
def test_public_name_is_no_part_of_the_package(name: str) -> None:
    """An import of a part named like a function would replace the function at the root."""
    source = Path(str(import_module("bagcert").__file__)).parent
    assert not (source / name).exists()
    assert not (source / f"{name}.py").exists()


OPTIONS = [name for name in NAMES if name[1] in FUNCTIONS or (name[0] == "bagcert.defenses" and name[1] != "DEFENSES")]


@pytest.mark.parametrize(("package", "name"), OPTIONS)
def test_options_after_the_second_argument_are_keyword_only(package: str, name: str) -> None:
    """Whoever reads a call knows what its third optional argument is. Required arguments may be given by place."""
    thing = getattr(import_module(package), name)
    methods = [getattr(thing, method, None) for method in ("__init__", "predict", "certify", "certify_scores", "alert")]
    for function in filter(inspect.isfunction, [thing] if inspect.isfunction(thing) else methods):
        parameters = [each for each in inspect.signature(function).parameters.values() if each.name != "self"]
        places = [each for each in parameters if each.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        late = [each.name for each in places[2:] if each.default is not inspect.Parameter.empty]
        assert not late, f"{function.__qualname__} takes {late} by place"


def test_names_that_users_expect_are_there() -> None:
    import bagcert

    assert "digits" in bagcert.list_models()
    assert "patchcleanser" in bagcert.list_defenses()
    images = bagcert.load_dataset("digits").take(2)
    result = bagcert.evaluate(bagcert.load("digits"), images)
    assert result.info.images == 2


@pytest.mark.parametrize("package", PACKAGES)
def test_unknown_name_is_an_attribute_error(package: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{package}' has no attribute 'nothing'"):
        _ = import_module(package).nothing


@pytest.mark.parametrize("package", PACKAGES)
def test_import_and_dir_load_no_torch(package: str) -> None:
    code = (
        f"import sys, {package}; names = dir({package}); assert 'BagCert' in names; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_deprecated_name_warns_and_is_the_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    module = import_module("bagcert.io.lazy")
    load, names = lazy_names("bagcert.io.lazy", {"join": "posixpath"}, deprecated={"old_join": "join"})
    monkeypatch.setattr(module, "__getattr__", load, raising=False)
    with pytest.warns(
        DeprecationWarning, match=r"bagcert\.io\.lazy\.old_join is deprecated; use bagcert\.io\.lazy\.join"
    ):
        assert module.old_join is import_module("posixpath").join
    assert "join" in names()
    assert "old_join" not in names()
    monkeypatch.delattr(module, "join")
