"""`bagcert certify --data ... --out DIR` on a handful of small images."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from bagcert.bulk import run as many
from bagcert.bulk.run import run_here
from tests.command import check_mistake, run


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(5):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def command(photos: Path, *more: object) -> tuple[object, ...]:
    out = photos.parent / "out"
    return ("certify", "--data", photos, "--model", "digits", "--patch", "1", "--part-size", 2, "--out", out, *more)


def test_a_second_time_nothing_is_left_to_do(photos: Path) -> None:
    first = run(*command(photos, "--json"))
    assert (first.code, first.err) == (0, "")
    found = json.loads(first.out)
    assert (found["images"], found["certified_now"], found["errors"]) == (5, 5, 0)
    assert json.loads(run(*command(photos, "--json")).out)["certified_now"] == 0
    table = run(*command(photos))
    assert "5 images, 0 with errors" in table.out
    assert "0 certified now" in table.out


def test_a_bad_image_is_counted_and_the_exit_code_says_so(photos: Path) -> None:
    (photos / "2.png").write_bytes(b"no picture")
    done = run(*command(photos))
    assert done.code == 5
    assert "1 of 5 images could not be certified" in done.err
    assert "5 images, 1 with errors" in done.out


def test_what_an_engine_prints_is_no_result(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def noisy(*asked: object) -> Iterator[tuple[int, pa.Table]]:
        print("(raylet) a worker died")
        yield from run_here(*asked)  # type: ignore[arg-type]

    monkeypatch.setitem(many.ENGINES, "ray", noisy)
    done = run(*command(photos, "--engine", "ray", "--json"))
    assert json.loads(done.out)["images"] == 5
    assert "a worker died" in done.err


def test_mistakes(photos: Path) -> None:
    out = photos.parent / "out"
    check_mistake(run("certify", "--data", photos), 2, "--data and --out need each other")
    check_mistake(run("certify", photos / "0.png", "--out", out), 2, "--data and --out need each other")
    check_mistake(
        run("certify", photos / "0.png", "--data", photos, "--out", out), 2, "cannot be combined with single images"
    )
    check_mistake(
        run(*command(photos, "--resume")), 2, "--record, --resume and --explain cannot be combined with --data"
    )
    check_mistake(run(*command(photos, "--engine", "spark")), 2, "an engine is local or ray, got 'spark'")
    check_mistake(run("certify", photos / "0.png", "--limit", 3), 2, "--engine, --workers and --limit need --data")
    check_mistake(run("certify", "--data", photos.parent / "none", "--out", out), 5, "no file or folder")
    assert not out.exists()
