"""`bagcert benchmark --quick`: every defense is trained, measured and drawn."""

import json
from pathlib import Path

import pytest

from bagcert.defenses.table import DEFENSES
from tests.command import run


@pytest.mark.timeout(900)  # minutes of training, on a machine that other tests share
def test_quick_runs_every_defense(tmp_path: Path):
    result = run("benchmark", "--quick", "--device", "cpu", "--out", tmp_path, "--json")
    assert (result.code, result.err) == (0, "")
    rows = json.loads(result.out)
    assert {(row["defense"], row["patch"]) for row in rows} == {(name, patch) for name in DEFENSES for patch in "12"}
    for row in rows:
        assert 0 <= row["certified_accuracy"] <= row["clean_accuracy"] <= 1
        assert min(row["images_per_second"].values()) > 0
        saved = json.loads((tmp_path / f"{row['defense']}-{row['patch']}.json").read_text())
        assert saved == row
    found = {(row["defense"], row["patch"]): row for row in rows}
    assert found["bagcert-double-masking", "1"]["certified_accuracy"] > 0
    assert found["column-smoothing", "1"]["certified_accuracy"] > 0
    assert found["undefended", "1"]["clean_accuracy"] > 0.7
    assert found["undefended", "1"]["certified_accuracy"] == 0
    assert (tmp_path / "certified-clean.png").stat().st_size > 10_000
