"""Kills, signals and full disks, on the command line: results are whole or absent, and runs go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bagcert.evaluation.journal import log_path

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a system with signals and forks"),
]

EVALUATE = "evaluate digits --data digits --limit 200 --batch-size 4 --rule vote --rule double-masking --device cpu"


def _start(out: Path, *more: str, before: str = "") -> subprocess.Popen:
    code = f"{before}\nfrom bagcert.cli import main; main()"
    arguments = [*EVALUATE.split(), "--out", str(out), *more]
    return subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE, text=True)


def test_killed_runs_end_alike() -> None:
    run = [sys.executable, "-m", "tests.faults.run", "--kills", "3", "--json"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=280)
    found = json.loads(done.stdout)
    assert found["details"] == []
    assert found["kills"] == {"train": 1, "evaluate": 1, "certify": 1}
    assert (found["incomplete"], found["differing"], found["half_written_accepted"]) == (0, 0, 0)
    assert done.returncode == 0


def test_request_to_end_leaves_whole_batches(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    process = _start(out)
    while not log_path(out).exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=200)[1]
    assert process.returncode == 1
    assert message.splitlines() == [f"Error: interrupted; add --resume to continue from {log_path(out)}"]
    assert [path.name for path in tmp_path.iterdir()] == [log_path(out).name]
    for line in log_path(out).read_bytes().splitlines():
        json.loads(line)
    process = _start(out, "--resume")
    assert process.communicate(timeout=200)[1] == ""
    assert process.returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.gallery.npz", "r.json", "r.records.jsonl"]
    assert json.loads(out.read_text())["images"] == len((tmp_path / "r.records.jsonl").read_text().splitlines()) == 200


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))"
    process = _start(out, before=limit)
    message = process.communicate(timeout=200)[1]
    assert process.returncode == 1
    assert message.splitlines() == [f"Error: {log_path(out)} cannot be written: File too large"]
    assert [path.name for path in tmp_path.iterdir()] == [log_path(out).name]
