"""The layers of the package: imports point down only, and the other habits that a machine can hold."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "bagcert"
MODULES = {
    ".".join(("bagcert", *path.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(SOURCE.rglob("*.py"))
}
EXEMPT = {"bagcert"}  # the front door names everything, and loads it on first use

LEVELS = {
    1: "errors extras files addresses ahead ranks devices threat grid aggregation scores "
    "certificate records images draws distributed verify",
    2: "backends rules nets data losses optimizers recipe preprocess record_lines image_records gallery_file",
    3: "defenses train training_data objective run_folder validation locality model_card",
    4: "attacks gallery export hub failsafe evaluation_log certificate_records record_file describe",
    5: "evaluate engines recompute compare",
    6: "benchmark",
    7: "report page",
    8: "cli __main__",
}
LEVEL = {name: level for level, names in LEVELS.items() for name in names.split()}

SAME_LINE = {
    ("threat", "errors"): "everything may raise the package's errors",
    ("grid", "errors"): "likewise",
    ("scores", "errors"): "likewise",
    ("images", "errors"): "likewise",
    ("devices", "errors"): "likewise",
    ("files", "errors"): "likewise",
    ("extras", "errors"): "likewise",
    ("addresses", "errors"): "likewise",
    ("addresses", "extras"): "says which extra brings a store's library",
    ("images", "files"): "how a file is opened safely",
    ("threat", "files"): "likewise",
    ("grid", "threat"): "the windows of a grid are those of a threat",
    ("scores", "devices"): "sums are formed in it",
    ("aggregation", "errors"): "likewise",
    ("scores", "aggregation"): "a score map carries its readout",
    ("scores", "grid"): "a score map carries its grid",
    ("certificate", "threat"): "a certificate says against what",
    ("distributed", "errors"): "likewise",
    ("objective", "defenses"): "ablated images are made by the defense that votes on them",
    ("train", "defenses"): "training on interval bounds stands beside the bounds",
    ("train", "objective"): "the training's own, in a file of its own",
    ("train", "training_data"): "the training's own, in a file of its own",
    ("train", "validation"): "the training's own, in a file of its own",
    ("validation", "defenses"): "ablated images are judged by the defense that votes on them",
    ("train", "run_folder"): "the folder of a run is the training's own, in a file of its own",
    ("defenses", "locality"): "a loaded defense is measured before it certifies",
    ("record_file", "certificate_records"): "a file of those records",
    ("export", "certificate_records"): "geometry and threat are written as in records",
    ("__main__", "cli"): "python -m bagcert is the command line",
}


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
    """`bagcert.nets.receptive_field.probe` belongs to `nets`."""
    return module.split(".")[1]


PAIRS = sorted(
    {
        (_part(module), _part(target))
        for module, path in MODULES.items()
        if module not in EXEMPT
        for target in _imports(ast.parse(path.read_text()))
        if target.startswith("bagcert.") and _part(target) != _part(module)
    }
)


def test_every_part_of_the_package_has_a_level() -> None:
    assert {_part(module) for module in MODULES if module not in EXEMPT} <= LEVEL.keys()


@pytest.mark.parametrize(("importer", "imported"), PAIRS, ids=[f"{a}-{b}" for a, b in PAIRS])
def test_imports_point_to_a_lower_line(importer: str, imported: str) -> None:
    assert LEVEL[imported] < LEVEL[importer] or (importer, imported) in SAME_LINE


def test_the_list_of_exceptions_is_used_and_has_no_circle() -> None:
    assert SAME_LINE.keys() <= set(PAIRS)
    lowest = "errors extras addresses files devices distributed threat images grid aggregation scores certificate"
    order = {name: i for i, name in enumerate(lowest.split())}
    order |= {
        "locality": 98,
        "defenses": 99,
        "certificate_records": 99,
        "record_file": 100,
        "export": 100,
        "run_folder": 100,
        "validation": 100,
        "objective": 100,
        "training_data": 100,
        "train": 101,
        "cli": 102,
        "__main__": 103,
    }
    assert all(order[imported] < order[importer] for importer, imported in SAME_LINE)


def test_rules_know_no_network_no_files_and_no_labels() -> None:
    known = {"torch", "numpy", "jaxtyping", "dataclasses", "functools", "collections", "difflib", "fractions"}
    known |= {"itertools", "math"}
    for module, path in MODULES.items():
        if _part(f"{module}.") == "rules":
            for target in _imports(ast.parse(path.read_text())):
                assert target.split(".")[0] in {*known, "bagcert", "typing"}, f"{module} imports {target}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short_and_print_only_on_the_command_line(module: str) -> None:
    text = MODULES[module].read_text()
    assert len(text.splitlines()) <= 400
    if not module.startswith("bagcert.cli"):
        calls = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
        assert "print" not in [call.func.id for call in calls if isinstance(call.func, ast.Name)]
