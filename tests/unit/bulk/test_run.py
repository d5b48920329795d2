"""Whole data sources: every image a row, restarts that do what is missing, the same rows from every engine."""

import hashlib
import io
import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from bagcert.bulk.files import FileVerdict, certify_files
from bagcert.bulk.parts import list_work
from bagcert.bulk.results import read_rows, summarize
from bagcert.bulk.run import certify_many
from bagcert.data.photo import read_image
from bagcert.defenses.bagcert import load
from bagcert.errors import UnreadableError, UsageError
from tests import refused

pytestmark = pytest.mark.slow

ASKED = {"model": "digits", "patches": ["2", "1x3"], "rules": ["double-masking", "vote"], "part_size": 4}


def _encoded(seed: int, size: tuple[int, int] = (8, 8), orientation: int = 1) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    image, file = Image.fromarray(pixels), io.BytesIO()
    exif = image.getexif()
    exif[0x0112] = orientation
    image.save(file, "PNG", exif=exif)
    return file.getvalue()


def _shard(path: Path, images: list[bytes | None], labels: list[int | None], rows: int = 3) -> Path:
    table = pa.table({"image": [{"bytes": image} for image in images], "label": pa.array(labels, pa.int64())})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)
    return path


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five good images in three sizes, two bad ones, one too small for the patches, a shard of seven rows, one bad."""
    folder = tmp_path_factory.mktemp("mixed")
    for name, content in {
        "a.png": _encoded(0),
        "b.png": _encoded(1, (20, 12), 6),
        "c.png": _encoded(2)[:60],
        "d.png": b"",
        "e.png": _encoded(3, (1, 9)),
        "f.png": _encoded(4),
        ".hidden.png": _encoded(5),
        "sub/g.png": _encoded(6, (30, 9)),
        "sub/h.png": _encoded(7),
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    images = [*(_encoded(seed) for seed in range(8, 14)), None]
    _shard(folder / "shard.parquet", images, [1, 2, None, 3, 4, 5, 6])
    return folder


@pytest.fixture(scope="module")
def done(mixed: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    out = tmp_path_factory.mktemp("out") / "run"
    return out, certify_many(str(mixed), out, **ASKED)


def _rows(out: Path) -> list[dict]:
    return pa.concat_tables(read_rows(out)).to_pylist()


def _same(one: Path, other: Path) -> bool:
    first, second = (pa.concat_tables(read_rows(out)).drop_columns("worker") for out in (one, other))
    return first.equals(second)


def test_every_image_is_one_row_and_a_bad_one_says_why(mixed: Path, done: tuple[Path, dict]) -> None:
    rows = _rows(done[0])
    names = ["a.png", "b.png", "c.png", "d.png", "e.png", "f.png"]
    names += [f"shard.parquet#{row}" for row in range(7)] + ["sub/g.png", "sub/h.png"]
    assert [row["source"] for row in rows] == [str(mixed / name) for name in names]
    assert [row["number"] for row in rows] == list(range(15))
    bad = {Path(row["source"]).name: row["error"] for row in rows if row["error"] is not None}
    assert bad.keys() == {"c.png", "d.png", "e.png", "shard.parquet#6"}
    assert "empty" in bad["d.png"]
    assert "does not fit" in bad["e.png"]
    assert "no image bytes" in bad["shard.parquet#6"]
    assert [row["label"] for row in rows[6:13]] == [1, 2, None, 3, 4, 5, 6]
    assert (done[1]["images"], done[1]["missing"], done[1]["errors"], done[1]["certified_now"]) == (15, 0, 4, 15)


def test_rows_say_what_the_command_for_single_images_says(done: tuple[Path, dict]) -> None:
    model, compared = load("digits"), 0
    for row in _rows(done[0]):
        if row["error"] is not None or "#" in row["source"]:
            continue
        (verdict,) = certify_files(model, [Path(row["source"])], ASKED["patches"], ASKED["rules"])
        assert isinstance(verdict, FileVerdict)
        photo = read_image(row["source"])
        assert row["pixels_sha256"] == hashlib.sha256(photo.pixels.tobytes()).hexdigest()
        assert [row["height_px"], row["width_px"]] == verdict.size_px
        assert (row["prediction"], row["class_name"]) == (verdict.prediction, verdict.class_name)
        for said, result in zip(row["results"], verdict.results, strict=True):
            assert (said["rule"], said["threat"], said["certified"]) == (result.rule, result.threat, result.certified)
            assert said["prediction"] == result.prediction
            assert abs(said["margin"] - result.margin) <= 8, "rounding in another batch size moves single levels"
        compared += 1
    assert compared == 5


def test_a_restart_does_what_is_missing_and_nothing_else(mixed: Path, done: tuple[Path, dict], tmp_path: Path) -> None:
    out = tmp_path / "run"
    seen: list[int] = []

    def stop(count: int, total: int) -> None:
        seen.append(count)
        if count >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        certify_many(str(mixed), out, on_progress=stop, **ASKED)
    whole = sorted(out.glob("part-*.parquet"))
    assert 0 < len(whole) < len(list_work(str(mixed), 4).parts)
    before = [path.stat().st_mtime_ns for path in whole[1:]]
    whole[0].write_bytes(whole[0].read_bytes()[:-20])
    found = certify_many(str(mixed), out, **ASKED)
    assert [path.stat().st_mtime_ns for path in whole[1:]] == before
    assert 0 < found["certified_now"] < 15
    assert found["images"] == 15
    assert _same(out, done[0])
    assert certify_many(str(mixed), out, **ASKED)["certified_now"] == 0


def test_other_files_not_counted(mixed: Path, done: tuple[Path, dict], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(done[0], out)
    first = out / "part-00000000.parquet"
    unmarked = pq.read_table(first).replace_schema_metadata(None)
    for name in ("part-00000000.old.parquet", "part-00000099.parquet", "part-0.parquet", "part-00000000 (1).parquet"):
        shutil.copyfile(first, out / name)
    (out / "part-x.parquet").write_bytes(b"no Parquet file")
    assert _same(out, done[0])
    figures = ("images", "missing", "errors", "results")
    assert {name: summarize(out)[name] for name in figures} == {name: done[1][name] for name in figures}
    again = certify_many(str(mixed), out, **ASKED)
    assert [again[name] for name in figures] == [done[1][name] for name in figures]
    assert again["certified_now"] == 0
    pq.write_table(unmarked, first)
    assert summarize(out)["missing"] == len(unmarked)
    assert certify_many(str(mixed), out, **ASKED)["certified_now"] == len(unmarked)
    assert _same(out, done[0])


def test_a_part_under_the_name_of_another_is_done_again(mixed: Path, done: tuple[Path, dict], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(done[0], out)
    shutil.copyfile(out / "part-00000000.parquet", out / "part-00000001.parquet")
    refused(UnreadableError, r"part-00000001\.parquet holds images that do not follow", summarize, out)
    assert certify_many(str(mixed), out, **ASKED)["missing"] == 0
    assert _same(out, done[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"patches": ["1"]}, "patches is 2, 1x3, here 1"),
        ({"rules": ["vote"]}, "rules is double-masking, vote, here vote"),
        ({"model": "default"}, "weights sha256 is"),
        ({"limit": 3}, "limit is None, here 3"),
        ({"part_size": 5}, "part size is 4, here 5"),
    ],
)
def test_a_folder_of_another_run_is_refused(change: dict, words: str, mixed: Path, done: tuple[Path, dict]) -> None:
    before = sorted((path.name, path.stat().st_mtime_ns) for path in done[0].iterdir())
    said = refused(UsageError, None, certify_many, str(mixed), done[0], **{**ASKED, **change})
    if "model" not in change:
        assert words in said
    assert "choose another --out" in said
    assert sorted((path.name, path.stat().st_mtime_ns) for path in done[0].iterdir()) == before


def test_changed_data_and_other_folders_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "a.png").write_bytes(_encoded(0))
    certify_many(str(tmp_path / "data"), tmp_path / "out", **ASKED)
    os.utime(tmp_path / "data" / "a.png", (1, 1))
    refused(UsageError, "data has the hash", certify_many, str(tmp_path / "data"), tmp_path / "out", **ASKED)
    with pytest.raises(UsageError, match=r"other files and no _run\.json"):
        certify_many(str(tmp_path / "data"), tmp_path / "data", **ASKED)
    (tmp_path / "out" / "_run.json").write_text("{")
    refused(UnreadableError, "damaged", certify_many, str(tmp_path / "data"), tmp_path / "out", **ASKED)


def test_what_cannot_be_listed_is_one_sentence(tmp_path: Path) -> None:
    refused(UnreadableError, "no file or folder", list_work, str(tmp_path / "missing"), 4)
    refused(UnreadableError, "holds no images", list_work, str(tmp_path), 4)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 and nothing else")
    refused(UnreadableError, "cannot be read as Parquet", list_work, str(tmp_path), 4)
    refused(UsageError, "an engine is local or ray", certify_many, str(tmp_path), tmp_path / "out", engine="spark")
    assert not (tmp_path / "out").exists()


def test_a_broken_row_group_costs_its_own_rows(tmp_path: Path) -> None:
    path = _shard(tmp_path / "s.parquet", [_encoded(seed) for seed in range(6)], list(range(6)))
    group = pq.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    content[group.data_page_offset : group.data_page_offset + 40] = b"\xff" * 40
    path.write_bytes(bytes(content))
    certify_many(str(path), tmp_path / "out", **{**ASKED, "part_size": 3})
    rows = _rows(tmp_path / "out")
    assert [row["error"] is None for row in rows] == [True] * 3 + [False] * 3


def test_limit_and_parts_by_rows(tmp_path: Path) -> None:
    path = _shard(tmp_path / "s.parquet", [_encoded(seed) for seed in range(10)], list(range(10)), rows=3)
    work = list_work(str(path), 4, limit=9)
    assert [(part.first, part.start, part.stop) for part in work.parts] == [(0, 0, 4), (4, 4, 8), (8, 8, 9)]
    found = certify_many(str(path), tmp_path / "out", limit=9, **ASKED)
    assert [row["label"] for row in _rows(tmp_path / "out")] == list(range(9))
    assert found["results"][0]["clean_accuracy"] == np.mean(
        [row["prediction"] == row["label"] for row in _rows(tmp_path / "out")]
    )


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The address of an S3 server of moto on the loopback, in the environment as s3fs reads it."""
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(name, value)
    yield f"http://{host}:{port}"
    server.stop()


def test_objects_in_s3_give_the_rows_of_files(store: str, mixed: Path, done: tuple[Path, dict], tmp_path: Path) -> None:
    import s3fs

    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("photos")
    files.put(str(mixed) + "/", "photos/mixed/", recursive=True)
    found = certify_many("s3://photos/mixed", tmp_path / "out", **ASKED)
    here = {row["source"].removeprefix(str(mixed)): row for row in _rows(done[0])}
    there = {row["source"].removeprefix("s3://photos/mixed"): row for row in _rows(tmp_path / "out")}
    assert here.keys() == there.keys()
    for name, row in there.items():
        for field in ("label", "pixels_sha256", "prediction", "results"):
            assert row[field] == here[name][field]
        assert (row["error"] is None) == (here[name]["error"] is None)
    assert found["errors"] == 4
    refused(UnreadableError, None, certify_many, "s3://photos/nothing", tmp_path / "other", **ASKED)


@pytest.mark.timeout(600)  # workers import torch three times
def test_killed_worker_loses_and_doubles_nothing(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    path = _shard(tmp_path / "s.parquet", [_encoded(seed) for seed in range(60)], list(range(60)), rows=20)
    asked = {**ASKED, "part_size": 2}
    certify_many(str(path), tmp_path / "local", **asked)
    killed: list[int] = []
    out = tmp_path / "ray"

    def kill(count: int, total: int) -> None:
        if count and not killed:
            worker = next(iter(read_rows(out, ["worker"])))["worker"][0].as_py()
            killed.append(int(worker.rpartition(":")[2]))
            os.kill(killed[0], signal.SIGKILL)

    try:
        found = certify_many(str(path), out, engine="ray", workers=2, on_progress=kill, **asked)
    finally:
        assert not ray.is_initialized()
    assert killed
    assert (found["images"], found["missing"], found["certified_now"]) == (60, 0, 60)
    assert [row["number"] for row in _rows(out)] == list(range(60))
    assert _same(out, tmp_path / "local")
    assert json.loads((out / "_run.json").read_text()) == json.loads((tmp_path / "local" / "_run.json").read_text())


def test_a_rule_that_refuses_is_an_error_in_every_row(tmp_path: Path) -> None:
    for i, size in enumerate(((8, 8), (8, 9), (20, 12))):
        (tmp_path / "data").mkdir(exist_ok=True)
        (tmp_path / "data" / f"{i}.png").write_bytes(_encoded(i, size))
    asked = {**ASKED, "patches": ["9*1"], "rules": ["vote", "double-masking"]}
    assert certify_many(str(tmp_path / "data"), tmp_path / "out", **asked)["errors"] == 3
    for row in _rows(tmp_path / "out"):
        assert "more than 20,000" in row["error"]
        assert row["results"] is None
