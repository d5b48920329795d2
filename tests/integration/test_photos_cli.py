"""Own photos on the command line: many sizes, samples, held-out images, attacks, whose pixels, and names."""

import csv
import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tests import tiny
from tests.command import check_mistake, run
from tests.integration.test_cli import RECIPE


def _photos(folder: Path, counts: dict[str, int], sizes: bool = True, seed: int = 0) -> Path:
    """Class folders of tinted photos of 5 to 40 px, or all of 8x8 px."""
    random = np.random.default_rng(seed)
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        label = tiny.COLORS.index(name)
        for i in range(count):
            size = tuple(random.integers(5, 41, 2)) if sizes else (8, 8)
            pixels = tiny.pixels(np.array([label]), size, tint=150, seed=int(random.integers(1 << 30)))[0]
            Image.fromarray(pixels).save(folder / name / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`nosplit`: 90 photos of 8x8 px in three classes, and `model`, trained on them; `mixed`: photos of many sizes."""
    folder = tmp_path_factory.mktemp("photos")
    _photos(folder / "nosplit", dict.fromkeys(tiny.COLORS, 30), sizes=False)
    _photos(folder / "mixed" / "test", {"red": 30, "green": 15, "blue": 9}, seed=1)
    (folder / "tiny.toml").write_text(RECIPE.replace('rule = "vote"', 'rule = "double-masking"'))
    for name, options in (("model", ()), ("limited", ("--limit", 30))):
        data = ("--data", folder / "nosplit", "--out", folder / name, "--device", "cpu", *options)
        trained = run("train", folder / "tiny.toml", *data)
        assert trained.code == 0, trained
    return folder


def _evaluated(home: Path, out: Path, *options: object, model: str = "model") -> tuple[dict, list[dict], str]:
    done = run("evaluate", home / model, "--device", "cpu", "--out", out, *options)
    assert done.code == 0, done
    records = [json.loads(line) for line in out.with_suffix(".records.jsonl").read_text().splitlines()]
    return json.loads(out.read_text()), records, done.out


def test_photos_of_many_sizes(home: Path, tmp_path: Path) -> None:
    asked = ("--patch", "2", "--patch", "5%", "--rule", "double-masking", "--rule", "vote")
    _, records, _ = _evaluated(home, tmp_path / "r.json", "--data", home / "mixed", *asked)
    assert len({record["source"] for record in records}) == 54
    bulk = run("certify", "--model", home / "model", "--data", home / "mixed", "--out", tmp_path / "rows", *asked)
    assert bulk.code == 0, bulk
    rows = {row["source"]: row for row in pq.read_table(tmp_path / "rows").to_pylist()}
    keys = ("rule", "threat", "prediction", "certified", "margin")
    for record in records:
        photo = home / "mixed" / record["source"]
        alone = run("certify", photo, "--model", home / "model", "--json", "--device", "cpu", *asked)
        (expected,) = json.loads(alone.out)["results"]
        by_rule = {(row["rule"], row["threat"]): row for row in record["results"]}
        assert len(by_rule) == 4
        many = {(row["rule"], row["threat"]): row for row in rows[str(photo)]["results"]}
        for row in expected["results"]:
            found, other = by_rule[row["rule"], row["threat"]], many[row["rule"], row["threat"]]
            assert [found[key] for key in keys] == [other[key] for key in keys] == [row[key] for key in keys]
            places = [np.reshape(each["worst_placement"], (-1, 4)).tolist() for each in (found, other, row)]
            assert places[0] == places[1] == places[2]


def test_limit_of_class_folders_is_a_sample(home: Path, tmp_path: Path) -> None:
    asked = ("--data", home / "mixed", "--limit", 18)
    info, records, out = _evaluated(home, tmp_path / "r.json", *asked)
    assert np.bincount([record["label"] for record in records]).tolist() == [3, 5, 10]  # blue, green, red
    sentence = "a sample: 18 of 54 images, drawn in proportion to the classes with seed 0"
    assert info["notes"][0] == sentence
    assert f"note: {sentence}" in out
    _, same, _ = _evaluated(home, tmp_path / "s.json", *asked)
    assert [record["source"] for record in same] == [record["source"] for record in records]
    page = run("report", tmp_path / "r.json", "--out", tmp_path / "r.html")
    assert page.code == 0, page
    assert sentence in (tmp_path / "r.html").read_text()
    few, _, _ = _evaluated(home, tmp_path / "t.json", "--data", home / "mixed", "--limit", 2)
    assert ", of 2 of 3 classes," in few["notes"][0]


def test_the_doctor_and_attacks_say_so_too(home: Path) -> None:
    options = ("--device", "cpu", "--data", home / "mixed")
    assert "a sample: 18 of 54 images" in run("doctor", home / "model", *options, "--images", 18).out
    quick = ("--limit", 3, "--steps", 1, "--restarts", 1, "--attacked-placements", 1, "--resize")
    done = run("attack", home / "model", *options, *quick)
    assert done.code == 0, done
    assert "a sample: 3 of 54 images" in done.out


def test_a_limit_of_data_in_random_order_is_the_first(tmp_path: Path) -> None:
    done = run("evaluate", "digits", "--data", "digits", "--limit", 20, "--patch", "1", "--json", "--device", "cpu")
    assert json.loads(done.out)["notes"] == ["the first 20 of 360 images"]


def test_images_without_splits_are_those_not_trained_on(home: Path, tmp_path: Path) -> None:
    info, records, out = _evaluated(home, tmp_path / "r.json", "--data", home / "nosplit")
    assert (info["images"], info["split"]) == (9, "held-out")
    assert "the 9 images that were held out when tiny was trained on the other 81 images" in out
    # The same part as training held out, found by an independent route.
    from bagcert.data import load_dataset

    data = load_dataset(str(home / "nosplit"), "train")
    _, held = data.split_off(0.1, 0)
    expected = [Path(held.source(int(row)).source).relative_to(home / "nosplit") for row in held.rows]
    assert [record["source"] for record in records] == list(map(str, expected))


def test_split_that_was_trained_on(home: Path, tmp_path: Path) -> None:
    done = run("evaluate", "digits", "--data", "digits", "--split", "train", "--limit", 9, "--patch", "1")
    assert "digits was trained on 1,293 of these 1,437 images" in done.out
    done = run("evaluate", "digits", "--data", "digits", "--split", "held-out", "--patch", "1", "--json")
    assert (json.loads(done.out)["images"], json.loads(done.out)["split"]) == (144, "held-out")
    check_mistake(run("evaluate", "digits", "--data", home / "mixed", "--split", "held-out"), 2, "train")


def test_training_set_that_cannot_be_divided_again(home: Path, tmp_path: Path) -> None:
    info, _, out = _evaluated(home, tmp_path / "r.json", "--data", home / "nosplit", model="limited")
    assert info["images"] == 90
    assert "may have been trained on some of these images" in out
    moved = tmp_path / "moved"
    moved.symlink_to(home / "nosplit")
    assert "may have been trained on some" in _evaluated(home, tmp_path / "s.json", "--data", moved)[2]


def test_one_class_is_a_sentence_with_a_way_out(home: Path, tmp_path: Path) -> None:
    _photos(tmp_path / "one", {"red": 12}, sizes=False)
    done = run("train", home / "tiny.toml", "--data", tmp_path / "one", "--out", tmp_path / "run", "--device", "cpu")
    check_mistake(done, 5, "one class, 'red'", "at least two", "one folder for each class")
    (tmp_path / "flat" / "Images").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "Images" / "0.ppm")
    done = run("evaluate", home / "model", "--data", tmp_path / "flat", "--device", "cpu")
    check_mistake(done, 2, "'Images'", "must be the folder of a class")


def test_a_folder_one_level_too_high_names_the_one_below(home: Path, tmp_path: Path) -> None:
    _photos(tmp_path / "high" / "own", dict.fromkeys(tiny.COLORS, 2))
    done = run("evaluate", home / "model", "--data", tmp_path / "high", "--device", "cpu")
    check_mistake(done, 2, "has no split 'test'", f"did you mean {tmp_path / 'high' / 'own'}?")


def test_photos_attacked_at_the_networks_size(home: Path, tmp_path: Path) -> None:
    quick = ("--limit", 4, "--steps", 2, "--restarts", 1, "--attacked-placements", 1, "--device", "cpu")
    asked = ("attack", home / "model", "--data", home / "mixed", *quick)
    check_mistake(run(*asked), 2, "--resize")
    done = run(*asked, "--resize", "--out", tmp_path / "a.json", "--records", tmp_path / "a.jsonl")
    assert done.code == 0, done
    assert "resized to 8x8 px" in done.out
    assert "2 px at 8x8" in done.out
    assert json.loads((tmp_path / "a.json").read_text())["pixels"] == "at 8x8"
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert all((home / "mixed" / line["source"]).is_file() for line in lines)
    both = run("evaluate", home / "model", "--data", home / "mixed", "--limit", 2, "--resize", "--attack", "--json")
    assert both.code == 0, both
    found = json.loads(both.out)
    (row,) = found["results"]
    assert row["certified_accuracy"] <= row["attacked_accuracy"] <= row["clean_accuracy"]
    assert found["pixels"] == "at 8x8"


def test_it_is_said_whose_pixels_they_are(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    patches = ("--patch", "2", "--patch", "2%")
    mixed, _, out = _evaluated(home, tmp_path / "r.json", "--data", home / "mixed", *patches)
    assert "2 px of the photo" in out
    assert "2% of the image" in out
    assert mixed["pixels"] == "of the photo"
    same, _, out = _evaluated(home, tmp_path / "s.json", "--data", home / "nosplit", *patches)
    assert "2 px at 8x8" in out
    assert same["pixels"] == "at 8x8"
    photo = home / "mixed" / "test" / "red" / "00.png"
    monkeypatch.setenv("COLUMNS", "200")
    assert "2 px of the photo" in run("certify", photo, "--model", home / "model", "--device", "cpu").out
    for path, unit in ((tmp_path / "r.json", "2 px of the photo"), (tmp_path / "s.json", "2 px at 8x8")):
        assert run("report", path, "--out", path.with_suffix(".html")).code == 0
        text = path.with_suffix(".html").read_text()
        assert f"<td>{unit}</td>" in text
        assert f"one patch of {unit}, anywhere" in text


def test_it_is_said_why_a_vote_certifies_nothing() -> None:
    asked = ("evaluate", "digits", "--data", "digits", "--limit", 30, "--patch", "4", "--device", "cpu")
    assert "vote certified no image: scores of the fixed-point head" in run(*asked, "--rule", "vote").out
    assert "certified no image" not in run(*asked, "--rule", "double-masking").out


def test_the_report_is_about_the_deployed_patch(home: Path, tmp_path: Path) -> None:
    patches = ("--patch", "1", "--patch", "2", "--patch", "3")
    info, records, _ = _evaluated(home, tmp_path / "r.json", "--data", home / "mixed", *patches)
    assert info["deployed"] == ["double-masking", "2"]
    assert run("report", tmp_path / "r.json", "--out", tmp_path / "r.html").code == 0
    text = (tmp_path / "r.html").read_text()
    headline = re.search(r'<p class="headline">.*?</p>', text)
    assert headline is not None
    assert "one patch of 2 px of the photo" in headline[0]
    certified = info["results"][1]["certified_accuracy"]
    assert f"<b>{certified:.1%}</b>" in headline[0]
    assert all("2 px of the photo" in part for part in re.findall(r"<h3>Margins <small>(.*?)</small>", text))
    shown = re.findall(r"<small>(test/[^<]*)</small>", text)
    assert shown
    assert set(shown) <= {record["source"] for record in records}


def test_a_table_of_rows_lies_beside_the_json(home: Path, tmp_path: Path) -> None:
    info, _, _ = _evaluated(home, tmp_path / "r.json", "--data", home / "mixed", "--patch", "1", "--patch", "2")
    with (tmp_path / "r.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["threat"] for row in rows] == ["1", "2"]
    assert [float(row["certified_accuracy"]) for row in rows] == [row["certified_accuracy"] for row in info["results"]]


def test_a_folder_of_rows_is_one_table(home: Path, tmp_path: Path) -> None:
    asked = ("certify", "--model", home / "model", "--data", home / "mixed", "--out", tmp_path / "rows")
    assert run(*asked, "--part-size", 20).code == 0
    assert pq.read_table(tmp_path / "rows").num_rows == 54
    assert len(pandas.read_parquet(tmp_path / "rows")) == 54
    # A folder of an older version goes on under the new name.
    (tmp_path / "rows" / "_run.json").rename(tmp_path / "rows" / "run.json")
    done = run(*asked, "--part-size", 20, "--json")
    assert (json.loads(done.out)["certified_now"], json.loads(done.out)["images"]) == (0, 54)
    assert (tmp_path / "rows" / "_run.json").exists()


@pytest.mark.parametrize("columns", ["60", "200"])
def test_tables_follow_the_width(columns: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a folder with a long name" / "00013"
    folder.mkdir(parents=True)
    names = [folder / f"photo_{i:040}.png" for i in range(2)]
    for name in names:
        Image.new("RGB", (12, 12)).save(name)
    monkeypatch.setenv("COLUMNS", columns)
    done = run("certify", *names, "--model", home / "model", "--device", "cpu")
    for name in names:
        assert str(name) in done.out
    assert max(len(line) for line in done.out.splitlines() if line[:1] in "┏│└┃") <= int(columns)
    info = run("evaluate", home / "model", "--data", home / "mixed", "--device", "cpu").out
    table = [line for line in info.splitlines() if line[:1] in "┏│└┃"]
    assert max(map(len, table)) <= int(columns)


def test_the_largest_patches_are_a_distribution(home: Path, tmp_path: Path) -> None:
    info, records, out = _evaluated(home, tmp_path / "r.json", "--data", home / "nosplit", "--largest")
    (line,) = [line for line in out.splitlines() if line.startswith("largest certifiable square, px at 8x8")]
    for record in records:
        photo = home / "nosplit" / record["source"]
        alone = json.loads(run("certify", photo, "--model", home / "model", "--json", "--device", "cpu").out)
        assert record["largest_px"] == alone["results"][0]["largest_certifiable_px"]
    right = [record["largest_px"] for record in records if record["results"][0]["prediction"] == record["label"]]
    assert f"largest {max(right, default=0)};" in line
    assert line.endswith(f"{sum(side > 0 for side in right) / info['images']:.1%} above 0")
    assert run("report", tmp_path / "r.json", "--out", tmp_path / "r.html").code == 0
    assert line in (tmp_path / "r.html").read_text()


def test_names_of_axes_and_numbers_do_not_overlap() -> None:
    """In a chart of many images the number ends before the name of the axis begins, and no two names meet."""
    from bagcert.report import svg

    chart = svg.histogram([0.0, 1.0], {"a": [90_000]}, ["k0"], "margin")
    ends = [float(x) - 7 * len(text) for x, text in re.findall(r'<text x="([0-9.]+)" [^>]*end">([^<]+)<', chart)]
    assert min(ends) > 18  # the name is drawn around 12
    names = [f"2x{i}+{i}x2+area:{i}00" for i in range(12)]
    chart = svg.lines({"a": [(float(i), 1.0) for i in range(12)]}, "patch", "share", 1.0, names)
    found = re.findall(r'<text x="([0-9.]+)" y="275" text-anchor="middle">([^<]+)<', chart)
    assert len(found) > 1
    spans = [(float(x) - 3.5 * len(name), float(x) + 3.5 * len(name)) for x, name in found]
    assert all(left[1] < right[0] for left, right in pairwise(spans))
    assert all(f"<title>a, {name}: 1</title>" in chart for name in names)


def test_runs_on_other_samples_are_not_compared(home: Path, tmp_path: Path) -> None:
    for name, limit in (("a", 10), ("b", 20)):
        _evaluated(home, tmp_path / f"{name}.json", "--data", home / "mixed", "--limit", limit)
    done = run("compare", tmp_path / "a.records.jsonl", tmp_path / "b.records.jsonl")
    check_mistake(done, 2, "not the same images")


def test_a_benchmark_says_that_its_images_are_a_sample(home: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for split, seed in (("train", 3), ("test", 4)):
        _photos(data / split, dict.fromkeys(tiny.COLORS, 12), sizes=False, seed=seed)
    asked = ("benchmark", "--data", data, "--defenses", "undefended", "--patch", "2", "--epochs", 1, "--limit", 6)
    done = run(*asked, "--multiply-adds", 100_000, "--device", "cpu", "--out", tmp_path / "out")
    assert done.code == 0, done
    assert "tested on a sample: 6 of 36 images" in done.out
    row = json.loads((tmp_path / "out" / "undefended-2.json").read_text())
    assert row["notes"] == ["tested on a sample: 6 of 36 images, drawn in proportion to the classes with seed 0"]
    lines = (tmp_path / "out" / "undefended-2.records.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["label"] for line in lines) == [0, 0, 1, 1, 2, 2]
