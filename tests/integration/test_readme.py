"""What README shows is run: its Python as it stands, its commands where they need no download."""

import contextlib
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagcert.training.recipe import shipped_recipes

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", README, re.S)
MOST_BYTES, MOST_PICTURE_BYTES = 7000, 1_000_000
BLOCKS = [
    [line.split(" # ")[0].strip() for line in block.splitlines() if line.startswith("bagcert ")]
    for block in re.findall(r"```sh\n(.*?)```", README, re.S)
]
COMMANDS = [command for block in BLOCKS for command in block]
OFFLINE = [[command for command in block if "--data cifar10" not in command] for block in BLOCKS]


def test_readme_has_examples():
    assert len(PYTHON) >= 2
    assert sum(map(len, OFFLINE)) >= 3


@pytest.mark.parametrize(("example", "output"), PYTHON, ids=[text.strip().splitlines()[-1][:40] for text, _ in PYTHON])
def test_python_example_runs_and_prints_what_is_shown(example, output):
    names = {}
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(example, "README.md", "exec"), names)
    assert printed.getvalue() == output
    if "certificate" in names:
        assert names["certificate"].certified.any()
        assert names["certificate"].worst_placement.shape[1:] == (2, 4)


def test_readme_shows_the_output_of_an_example():
    assert any(output for _, output in PYTHON)


def test_readme_is_short_and_its_files_exist():
    assert len(README.encode()) <= MOST_BYTES
    links = re.findall(r"\]\(([^)#]+)[#)]", README)
    local = [ROOT / link for link in links if "://" not in link]
    assert local
    assert not [path for path in local if not path.exists()]


def test_pictures_are_small():
    pictures = [path for path in (ROOT / "docs" / "images").iterdir() if path.is_file()]
    assert {path.suffix for path in pictures} >= {".gif", ".svg"}
    assert all(path.stat().st_size <= MOST_PICTURE_BYTES for path in pictures)


def test_the_recording_moves():
    with Image.open(ROOT / "docs" / "images" / "playground.gif") as recording:
        assert recording.n_frames >= 20


@pytest.mark.parametrize("commands", list(filter(None, OFFLINE)), ids=lambda commands: commands[0])
def test_commands_of_a_block_run_one_after_the_other(commands, tmp_path):
    photo = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    for command in commands:
        words = [sys.executable, "-m", *shlex.split(command)]
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{command}: {done.stderr}"
        assert done.stdout.strip()


def test_commands_that_download_name_shipped_recipes():
    for command in COMMANDS:
        if command.startswith("bagcert train "):
            assert shlex.split(command)[2] in shipped_recipes()


def test_every_defense_is_listed():
    from bagcert.defenses.table import DEFENSES

    table = README.partition("## Defenses")[2].partition("\n## ")[0]
    listed = set(re.findall(r"`([a-z+-]+)`", table))
    others = {"undefended", "column-smoothing-levine-feizi"}
    assert listed - {"--defenses"} == set(DEFENSES) - others
