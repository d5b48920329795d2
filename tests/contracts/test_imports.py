"""The order of the package: imports point to earlier parts only, and the other habits that a machine can hold."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "bagcert"
MODULES = {
    ".".join(("bagcert", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}

ORDER = [
    "errors",
    "io",
    "devices",
    "threat",
    "grid",
    "aggregation",
    "scores",
    "certificate",
    "records",
    "data",
    "nets",
    "rules",
    "locality",
    "defenses",
    "training",
    "attacks",
    "proofs",
    "evaluation",
    "bulk",
    "exporting",
    "hub",
    "report",
    "playground",
    "cli",
    "__main__",
]
"""Every part of the package. A part imports from the parts before it only."""

MOST_PARTS, MOST_ARROWS = 24, 140
DOCSTRING_ONLY = ["io", "training", "proofs", "evaluation", "bulk", "exporting", "hub", "report", "playground"]


def _imports(tree: ast.AST) -> Iterator[str]:
    """The modules a file imports, also inside functions; not those for type checkers alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for other in node.orelse:
                yield from _imports(other)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide where they point"
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                yield below if below in MODULES else str(node.module)
        else:
            yield from _imports(node)


def _part(module: str) -> str:
    """`bagcert.nets.region_scorer` belongs to `nets`."""
    return module.split(".")[1]


INSIDE = {module: path for module, path in MODULES.items() if module != "bagcert"}  # the root loads names on first use
ARROWS = sorted(
    {
        (_part(module), _part(target))
        for module, path in INSIDE.items()
        for target in _imports(ast.parse(path.read_text()))
        if target.startswith("bagcert.") and _part(target) != _part(module) and module != "bagcert.__main__"
    }
)


def test_the_order_names_every_part_once() -> None:
    assert sorted(ORDER) == sorted({_part(module) for module in INSIDE})


@pytest.mark.parametrize(("importer", "imported"), ARROWS, ids=[f"{a}-{b}" for a, b in ARROWS])
def test_imports_point_to_an_earlier_part(importer: str, imported: str) -> None:
    assert ORDER.index(imported) < ORDER.index(importer)


def test_parts_and_arrows_stay_few() -> None:
    """Counts the parts of the package and the imports between them.

    A part is a module or a folder directly in `src/bagcert`; `__init__.py` and `__main__.py` do not count. An arrow is
    a pair (A, B) of different parts such that some module in A imports some module in B. Import statements count
    anywhere in a file, also inside functions, but not under `if TYPE_CHECKING`. Any number of imports from A to B is
    one arrow.
    """
    assert len(ORDER) - 1 <= MOST_PARTS
    assert len(ARROWS) <= MOST_ARROWS


def test_architecture_states_the_same_order() -> None:
    text = " ".join((ROOT / "ARCHITECTURE.md").read_text().split())
    assert " ".join(ORDER[:-1]) in text


def test_only_the_version_is_taken_from_the_package_root() -> None:
    """The root loads public names from anywhere; modules that took them there would hide where they point."""
    for module, path in INSIDE.items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module == "bagcert":
                taken = {alias.name for alias in node.names if f"bagcert.{alias.name}" not in MODULES}
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bagcert":
                taken = {node.attr}
            else:
                continue
            assert taken <= {"__version__"}, f"{module} takes {taken} from the package root"


@pytest.mark.parametrize("folder", DOCSTRING_ONLY)
def test_init_of_folders_without_a_table_is_a_docstring(folder: str) -> None:
    """An import of any module in a folder runs its `__init__` first, and the command line starts without torch."""
    (statement,) = ast.parse((SOURCE / folder / "__init__.py").read_text()).body
    assert isinstance(statement, ast.Expr)
    assert isinstance(statement.value, ast.Constant)
    assert isinstance(statement.value.value, str)


def test_rules_know_no_network_no_files_and_no_labels() -> None:
    known = {"torch", "numpy", "jaxtyping", "dataclasses", "functools", "collections", "difflib", "fractions"}
    known |= {"itertools", "math", "concurrent"}
    for module, path in INSIDE.items():
        if _part(module) == "rules":
            for target in _imports(ast.parse(path.read_text())):
                assert target.split(".")[0] in {*known, "bagcert", "typing"}, f"{module} imports {target}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= 400
    if not module.startswith("bagcert.cli"):
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        assert "print" not in [call.func.id for call in calls if isinstance(call.func, ast.Name)]
