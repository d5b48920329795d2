"""The benchmark commands run to their end on tiny sizes, and the page on scaling takes what they write."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bagcert
from benchmarks.flip_average import averaged_map, mirror_shift

ROOT = Path(__file__).resolve().parents[2]


def _ran(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / script), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)


def _run(script: str, *arguments: str) -> None:
    done = _ran(script, *arguments)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("results")
    _run("benchmarks/cost_growth.py", "--quick", "--out", str(folder / "speed" / "cost-growth.json"))
    sizes = ["--classes", "12", "--steps", "1", "--batch-size", "2", "3"]
    smaller = ["--set", "model.width=16", "model.depth=1", "--training-images", "7200", "--tflops", "1"]
    out = folder / "rehearsals" / "imagenet64-bagcert.json"
    _run("benchmarks/rehearse.py", "imagenet64-bagcert", *sizes, *smaller, "--device", "cpu", "--out", str(out))
    limit = ["--model", "digits", "--data", "digits", "--images", "20", "--patch", "2", "--repeat", "1", "--quick"]
    _run("benchmarks/speed_limit.py", *limit, "--out", str(folder / "speed" / "limit.json"))
    return folder


def test_growth_has_every_series_and_lines_that_fit(results: Path) -> None:
    run = json.loads((results / "speed" / "cost-growth.json").read_text())
    assert list(run["series"]) == ["images", "classes", "image size", "patch sizes", "threads", "workers"]
    for series in run["series"].values():
        for point in series["points"]:
            assert point["seconds"] == pytest.approx(point["forward_seconds"] + point["rule_seconds"])
            assert point["peak_memory_mib"] >= point["memory_before_mib"] > 0
    images = run["series"]["images"]
    assert [point["images"] for point in images["points"]] == [point["x"] for point in images["points"]]
    fit = images["lines"]["peak_memory_mib"]
    for point in images["points"]:
        away = abs(fit["intercept"] + fit["slope"] * point["x"] - point["peak_memory_mib"])
        assert away <= fit["largest_deviation"] * point["peak_memory_mib"] + 0.1
    assert run["series"]["patch sizes"]["points"][1]["patches"] == ["5", "3"]


def test_rehearsal(results: Path) -> None:
    run = json.loads((results / "rehearsals" / "imagenet64-bagcert.json").read_text())
    measured, assumed, beyond = run["measured"], run["assumed"], run["extrapolated"]
    assert [each["batch_size"] for each in measured["runs"]] == [2, 3]
    assert all(each["steps"] == 1 and each["peak_memory_mib"] > 0 for each in measured["runs"])
    # A convolution costs its forward pass once more for its input and once for its weights, save at the image.
    assert 2 < measured["training_flop_per_image"] / (2 * measured["multiply_adds_per_image"]) <= 3
    images = 7200 * assumed["epochs"]
    assert beyond["training_flop"] == images * measured["training_flop_per_image"]
    fastest = max(each["images_per_second"] for each in measured["runs"])
    assert beyond["hours_here"] == pytest.approx(images / fastest / 3600, abs=0.06)
    rate = 8 * 0.9 * 1e12 / measured["training_flop_per_image"]
    assert beyond["images_per_second_on_accelerators"] == pytest.approx(rate, rel=1e-3)
    assert "assumed" in beyond["accelerator_speed_from"]


def test_the_limit_is_what_the_layers_and_the_rate_say(results: Path) -> None:
    run = json.loads((results / "speed" / "limit.json").read_text())
    images, rate = run["layers"]["images"], run["rates"]["float32"]["multiply_adds_per_second"]
    assert sum(row["multiply_adds"] for row in run["layers"]["rows"]) == images * run["multiply_adds_per_image"]
    assert {row["kind"].split()[0] for row in run["layers"]["rows"]} >= {"Normalize", "Conv2d", "ReLU"}
    for row in (*run["ways"], *run["forward_and_rule"]):
        if row["dtype"] == "float32":
            bound = row["images"] * run["multiply_adds_per_image"] / rate
            assert row["arithmetic_bound_seconds"] == pytest.approx(bound)
            assert row["over_bound"] == pytest.approx(row["seconds"] / bound, abs=1e-3)
    assert {"torch", "onnxruntime"} <= {row["backend"] for row in run["forward_and_rule"]}
    assert {"read and decode", "forward", "rule", "evaluate"} <= run["stages"]["seconds"].keys()


def test_the_page_on_scaling_takes_them(results: Path, tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    page.write_text((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), encoding="utf-8")
    options = ["--results", str(results), "--page", str(page)]
    _run("tools/scaling_tables.py", *options)
    _run("tools/scaling_tables.py", "--check", *options)
    text = page.read_text(encoding="utf-8")
    run = json.loads((results / "speed" / "cost-growth.json").read_text())
    hours = run["series"]["images"]["lines"]["seconds"]["slope"] * 1e9 / 3600
    assert f"| 1,000,000,000 | {hours:,.0f} | {math.ceil(hours / 24):,} |" in text
    assert text.count("Not measured yet") == 1, "of many images on Ray, which tests/unit/bulk tries"
    assert text.count("*extrapolated*") >= 3
    page.write_text(text.replace("| 1,000,000 |", "| 1,000,001 |"), encoding="utf-8")
    done = _ran("tools/scaling_tables.py", "--check", *options)
    assert done.returncode == 1
    assert "do not match" in done.stdout


def test_without_results_the_page_says_so(tmp_path: Path) -> None:
    page = tmp_path / "scaling.md"
    page.write_text((ROOT / "docs" / "scaling.md").read_text(encoding="utf-8"), encoding="utf-8")
    _run("tools/scaling_tables.py", "--results", str(tmp_path / "none"), "--page", str(page))
    assert page.read_text(encoding="utf-8").count("Not measured yet") == 5


def test_flip_average(tmp_path: Path) -> None:
    """Changing a pixel of the image changes the averaged map only where the grid of the model allows it."""
    model = bagcert.load("digits", device="cpu")
    assert mirror_shift(np.eye(4, dtype=bool)) == 3
    with pytest.raises(ValueError, match="no mirror image"):
        mirror_shift(np.array([[1, 0, 1, 1], [0, 1, 0, 0]], dtype=bool))
    grid, random = model.scorer.grid(), np.random.default_rng(0)
    image = random.integers(0, 256, (1, *model.image_size, 3), dtype=np.uint8)
    shift = mirror_shift(grid.cols_seen)
    before = averaged_map(model, image, shift).scores
    for column in range(model.image_size[1]):
        changed = image.copy()
        changed[:, :, column] = 255 - changed[:, :, column]
        moved = (averaged_map(model, changed, shift).scores != before).flatten(0, 2).any(0)
        assert not (moved.numpy() & ~grid.cols_seen[:, column]).any()
    arguments = ["--model", "digits", "--data", "digits", "--patch", "2", "--limit", "20"]
    _run("benchmarks/flip_average.py", *arguments, "--out", str(tmp_path / "flip.json"))
    rows = json.loads((tmp_path / "flip.json").read_text())["rows"]
    assert rows["plain"]["clean_accuracy"] > 0.8
    assert rows["flip-averaged"]["forward_passes"] == 2
