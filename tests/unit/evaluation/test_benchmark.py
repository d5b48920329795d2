"""The benchmark: what it writes, what it keeps, and what it refuses."""

import json
from pathlib import Path

import pytest

from bagcert.errors import UnreadableError, UsageError
from bagcert.evaluation import benchmark as benchmarking
from bagcert.evaluation.benchmark import LARGE, SMALL, benchmark, width_for
from bagcert.evaluation.compare import compare
from bagcert.evaluation.results_files import read_image_records
from bagcert.nets import get_architecture
from bagcert.nets.saved_model import WEIGHTS, weights_sha256
from bagcert.training.loop import train
from tests import tiny
from tests.command import check_mistake, run

pytestmark = pytest.mark.slow

NAMES = ["undefended", "bagcert-double-masking", "column-smoothing", "patchguard++"]
QUICK = {"limit": 30, "train_limit": 300, "epochs": 1, "multiply_adds": 200_000, "device": "cpu"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("benchmark")
    benchmark("digits", out, ["1"], NAMES, **QUICK)
    return out


def test_every_defense_has_its_row_and_records(folder: Path):
    for name in NAMES:
        row = json.loads((folder / f"{name}-1.json").read_text())
        assert next(iter(row)) == "schema_version"
        assert (row["defense"], row["patch"], row["images"], row["epochs"]) == (name, "1", 30, 1)
        assert 0 <= row["certified_accuracy"] <= row["clean_accuracy"] <= 1
        records = read_image_records(folder / f"{name}-1.records.jsonl")
        assert len(records) == 30
        proved = [r.results[0].certified and r.results[0].prediction == r.label for r in records]
        assert sum(proved) / 30 == pytest.approx(row["certified_accuracy"])
        assert row["images_per_second"]["certify"] > 0
        assert row["peak_memory_mib"] > 10
    assert json.loads((folder / "undefended-1.json").read_text())["guarantee"] == "none"
    assert json.loads((folder / "patchguard++-1.json").read_text())["guarantee"] == "detection"
    passes = json.loads((folder / "column-smoothing-1.json").read_text())["forward_passes"]
    assert passes == {"predict": 8, "certify": 8}


def test_networks_cost_the_same_and_see_the_same(folder: Path):
    rows = [json.loads((folder / f"{name}-1.json").read_text()) for name in NAMES]
    costs = [row["multiply_adds"] for row in rows]
    assert max(costs) < 1.7 * min(costs)  # widths come in steps of 4, which is coarse for networks this small
    assert len({row["epochs"] for row in rows}) == 1


def test_two_defenses_can_be_compared(folder: Path):
    first, second = (read_image_records(folder / f"{name}-1.records.jsonl") for name in NAMES[1:3])
    assert compare(first, second).images == 30


def test_what_is_there_is_kept(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = {path.name: path.read_bytes() for path in folder.glob("*.json*")}

    def refuse(*arguments, **options):
        raise AssertionError("trained again")

    monkeypatch.setattr(benchmarking, "train", refuse)
    (folder / "undefended-1.json").unlink()
    rows = benchmark("digits", folder, ["1"], NAMES, **QUICK)
    assert [row.defense for row in rows] == NAMES
    after = {path.name: path.read_bytes() for path in folder.glob("*.json*")}
    assert after.keys() == before.keys()
    assert all(after[name] == before[name] for name in before if not name.startswith("undefended"))


def test_unfinished_training_goes_on_though_there_is_a_model(tmp_path: Path):
    """A training writes its model whenever it validates, here after 6 of 12 steps."""

    class Killed(Exception):
        pass

    def kill(what: str, step: int, steps: int):
        if step == 7:
            raise Killed

    recipe, images = tiny.recipe(), tiny.image_set()
    with pytest.raises(Killed):
        benchmarking._trained(recipe, tmp_path / "run", images, "cpu", kill)
    assert (tmp_path / "run" / WEIGHTS).exists()
    seen = []
    benchmarking._trained(recipe, tmp_path / "run", images, "cpu", lambda what, step, steps: seen.append(step))
    assert seen[-1] == 12
    whole = train(recipe, tmp_path / "whole", images, device="cpu")
    assert weights_sha256(tmp_path / "run") == weights_sha256(whole)


def test_other_questions_refused(folder: Path, tmp_path: Path):
    (tmp_path / "undefended-2.json").write_text("{}")
    for out, patch, name, changes, error, message in (
        (folder, "1", "undefended", {"limit": 20}, UsageError, "was measured with limit 30, now 20"),
        (tmp_path, "1", "patchcleaner", {}, UsageError, "unknown defense 'patchcleaner'; did you mean patchcleanser"),
        (tmp_path, "9", "undefended", {}, UsageError, "does not fit"),
        (tmp_path, "2", "undefended", {}, UnreadableError, "not a row of a benchmark"),
    ):
        with pytest.raises(error, match=message):
            benchmark("digits", out, [patch], [name], **{**QUICK, **changes})


@pytest.mark.parametrize("networks", [SMALL, LARGE])
def test_widths_come_near_the_cost_asked_for(networks):
    size = (8, 8) if networks is SMALL else (32, 32)
    for architecture, depth in (networks.regions, networks.whole, networks.plain):
        width = width_for(architecture, depth, 10, 3, size, networks.multiply_adds)
        assert width % 4 == 0
        assert get_architecture(architecture).build(10, width, depth, True)
        gaps = [
            abs(benchmarking.cost_of(architecture, depth, 10, 3, size, w) - networks.multiply_adds)
            for w in (width, width + 4, max(8, width - 4))
        ]
        assert gaps[0] == min(gaps)


def test_the_command(folder: Path):
    asked = ["--data", "digits", "--defenses", ",".join(NAMES), "--patch", "1", "--limit", "30"]
    asked += ["--train-limit", "300", "--epochs", "1", "--multiply-adds", "200000", "--device", "cpu", "--out", folder]
    result = run("benchmark", *asked)
    assert (result.code, result.err) == (0, "")
    for name in NAMES:
        assert name in result.out
    plots = {path.name for path in folder.glob("*.png")}
    assert plots == {"certified-clean.png", "certified-speed.png", "certified-patch.png"}
    assert [row["defense"] for row in json.loads(run("benchmark", *asked, "--json").out)] == NAMES
    check_mistake(run("benchmark", "--out", folder), 2, "a benchmark needs --data or --quick")
    check_mistake(run("benchmark", "--quick", "--data", "cifar10", "--out", folder), 2, "--quick uses digits")
