"""Parquet shards: layouts, splits, row groups, and broken files."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bagcert.data import load_dataset, parquet
from bagcert.errors import UnreadableError, UsageError
from tests import refused, tiny


def _pixels(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 5, 4, 3), dtype=np.uint8)


def _write(
    path: Path,
    pixels: np.ndarray,
    labels: list,
    column: str = "img",
    nested: bool = True,
    names: list[str] | None = None,
    encode: Callable[[np.ndarray], bytes] = tiny.png,
    **options: object,
) -> Path:
    encoded = [encode(image) for image in pixels]
    images = [{"bytes": each, "path": None} for each in encoded] if nested else encoded
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if nested else pa.binary()
    table = pa.table({column: pa.array(images, kind), "label": pa.array(labels)})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("column", ["img", "image"])
@pytest.mark.parametrize("nested", [True, False])
def test_columns_of_the_hub_and_plain_bytes(column: str, nested: bool, tmp_path: Path) -> None:
    pixels = _pixels(7)
    path = _write(tmp_path / "some.parquet", pixels, [0, 1, 2, 2, 1, 0, 3], column, nested, row_group_size=3)
    images = load_dataset(path)
    np.testing.assert_array_equal(images.array(), pixels)
    assert images.labels.tolist() == [0, 1, 2, 2, 1, 0, 3]
    assert images.class_names == ("0", "1", "2", "3")
    assert images.split == "all"
    assert images.read([4])[0].source == f"{path} row 1 of row group 1"


def test_shards_of_a_split_in_order_with_names_from_the_schema(tmp_path: Path) -> None:
    names = ["cat", "dog", "owl"]
    _write(tmp_path / "test-00001-of-00002.parquet", _pixels(2, 1), [1, 1], names=names)
    _write(tmp_path / "test-00000-of-00002.parquet", _pixels(3, 0), [0, 0, 1], names=names)
    _write(tmp_path / "train.parquet", _pixels(1, 2), [0], names=names)
    images = load_dataset(tmp_path, "test")
    np.testing.assert_array_equal(images.array(), np.concatenate([_pixels(3, 0), _pixels(2, 1)]))
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.class_names == ("cat", "dog", "owl")
    assert len(load_dataset(tmp_path, "train")) == 1
    assert len(load_dataset(f"{tmp_path}/test-*.parquet")) == 5
    with pytest.raises(UsageError, match="no split 'validation'; its shards are of the splits test, train"):
        load_dataset(tmp_path, "validation")
    refused(UnreadableError, "no file matches", load_dataset, f"{tmp_path}/val-*.parquet")


def test_row_groups_are_dropped_when_they_do_not_fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "CACHE_BYTES", 1)
    pixels = _pixels(9)
    images = load_dataset(_write(tmp_path / "some.parquet", pixels, [0] * 9, row_group_size=2))
    np.testing.assert_array_equal(images.array(), pixels)
    assert len(images.source._kept) == 1
    np.testing.assert_array_equal(images.read([8])[0].pixels, pixels[8])


def test_a_limit_leaves_later_row_groups_unread(tmp_path: Path) -> None:
    path = _write(tmp_path / "some.parquet", _pixels(9), [0] * 9, row_group_size=2)
    images = load_dataset(path, limit=3)
    assert images.array().shape[0] == 3
    assert set(images.source._kept) == {0, 1}


def test_a_broken_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "some.parquet"
    pq.write_table(pa.table({"image": pa.array([b"no image", None, b""]), "label": [0, 0, 0]}), path)
    found = load_dataset(path).read_each([0, 1, 2])
    for row, message in enumerate(["is not an image", "has no image bytes", "is empty"]):
        assert str(found[row]).startswith(f"{path} row {row} {message}")


def _tables() -> dict[str, tuple[pa.Table, str]]:
    png = tiny.png(_pixels(1)[0])
    return {
        "no label": (pa.table({"image": [png]}), "no integer column 'label'; its columns are image"),
        "text label": (pa.table({"image": [png], "label": ["cat"]}), r"no integer column.*label \(string\)"),
        "no image": (pa.table({"picture": [png], "label": [0]}), r"no image column \(image or img\).*picture, label"),
        "list image": (pa.table({"image": [[1, 2]], "label": [0]}), "must hold encoded images as bytes"),
        "null label": (pa.table({"image": [png, png], "label": [0, None]}), "1 of 2 labels are missing"),
        "negative label": (pa.table({"image": [png, png], "label": [0, -1]}), "image 1 has label -1"),
        "no rows": (pa.table({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}), "no images"),
        "hostile column": (pa.table({"a\nb\x1b[2J" + "c" * 5000: [1]}), "no image column"),
    }


@pytest.mark.parametrize("case", _tables())
def test_other_tables_refused(case: str, tmp_path: Path) -> None:
    table, message = _tables()[case]
    pq.write_table(table, tmp_path / "test-0.parquet")
    said = refused(UnreadableError, message, load_dataset, tmp_path)
    assert len(said) < 500


def test_labels_outside_the_classes_refused(tmp_path: Path) -> None:
    _write(tmp_path / "test.parquet", _pixels(2), [0, 2], names=["a", "b"])
    refused(UnreadableError, "image 1 has label 2, but labels must be 0 to 1", load_dataset, tmp_path)


def test_broken_files_are_named(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole.parquet", _pixels(5), [0] * 5).read_bytes()
    damaged = bytearray(whole)
    damaged[4:200] = bytes(196)
    for content in (b"", b"PAR1", whole[: len(whole) // 2], whole[:-4], b"no parquet at all, but long enough"):
        path = tmp_path / "broken.parquet"
        path.write_bytes(content)
        refused(UnreadableError, r"broken\.parquet cannot be read as Parquet", load_dataset, path)
    path.write_bytes(damaged)  # the footer is whole, so only reading the pages finds out
    refused(UnreadableError, r"broken\.parquet", load_dataset(path).array)
    (tmp_path / "loop.parquet").symlink_to(tmp_path / "loop.parquet")
    os.mkfifo(tmp_path / "pipe.parquet")
    for name, message in (
        ("missing.parquet", "there is no file"),
        ("loop.parquet", r"loop\.parquet"),
        ("pipe.parquet", "not a regular file"),
    ):
        refused(UnreadableError, message, load_dataset, tmp_path / name)


def test_an_image_repeated_a_thousand_times_is_held_once(tmp_path: Path) -> None:
    image = tiny.png(np.random.default_rng(0).integers(0, 256, (200, 200, 3), dtype=np.uint8))
    for nested in (True, False):
        images = pa.array([{"bytes": image}] * 1000) if nested else pa.array([image] * 1000)
        table = pa.table({"image": images, "label": [0] * 1000})
        path = tmp_path / f"{nested}.parquet"
        pq.write_table(table, path, dictionary_pagesize_limit=1 << 24)
        assert path.stat().st_size < 2 * len(image)
        found = load_dataset(path)
        assert [photo.stored_size for photo in found.read([0, 500, 999])] == [(200, 200)] * 3
        (kept,) = found.source._kept.values()
        assert kept.nbytes < 10 * len(image)


def test_more_rows_or_bytes_than_the_limits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _write(tmp_path / "a.parquet", _pixels(6), [0] * 6, row_group_size=3)
    monkeypatch.setattr(parquet, "MAX_ROWS", 5)
    refused(UnreadableError, "6 rows long, more than 5", load_dataset, path)
    monkeypatch.setattr(parquet, "MAX_ROWS", 6)
    monkeypatch.setattr(parquet, "MAX_ROW_GROUP_BYTES", 100)
    found = load_dataset(path).read_each([5])
    assert "row group 1 holds more than 100 bytes of images" in str(found[0])


def test_a_label_does_not_make_a_trillion_classes(tmp_path: Path) -> None:
    for label in (10**12, parquet.MAX_CLASSES):
        with pytest.raises(UnreadableError, match=f"has the label {label}; labels must be 0 to 99,999"):
            load_dataset(_write(tmp_path / "a.parquet", _pixels(2), [0, label]))


@pytest.mark.parametrize(
    "metadata",
    [
        b"[" * 100_000,
        b"{",
        b'{"info": {"features": {"label": {"names": "ab"}}}}',
        b'{"info": {"features": {"label": {"names": {"a": 1, "b": 2}}}}}',
        b'{"info": {"features": {"label": {"names": ["a", "\\u001b[2J"]}}}}',
        b'{"info": {"features": {"label": {"names": ["a", "\\ud800"]}}}}',
        b'{"info": {"features": {"label": {"names": ["a", 1]}}}}',
        b'{"info": {"features": [[]]}}',
    ],
)
def test_names_in_another_form(metadata: bytes, tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", _pixels(2), [0, 1])
    pq.write_table(pq.read_table(path).replace_schema_metadata({"huggingface": metadata}), path)
    assert load_dataset(path).class_names == ("0", "1")


def test_a_file_that_changes_or_vanishes_in_use_is_told(tmp_path: Path) -> None:
    path = _write(tmp_path / "a.parquet", _pixels(6), [0] * 6, row_group_size=3)
    images = load_dataset(path)
    same = images.fingerprint()
    images.read([0])
    _write(path, _pixels(6, seed=1), [0] * 6, row_group_size=3)
    os.utime(path, ns=(0, 0))
    assert load_dataset(path).fingerprint() != same
    found = images.read_each([0, 3])
    assert not isinstance(found[0], UnreadableError)
    assert "a.parquet was changed while it was in use" in str(found[1])
    path.unlink()
    assert f"there is no file {path}" in str(images.read_each([3])[0])


def test_a_column_whose_name_is_no_text_is_told(tmp_path: Path) -> None:
    table = pa.table({"image": [tiny.png(_pixels(1)[0])], "label": [0], "zzzz": [1]})
    file = io.BytesIO()
    pq.write_table(table, file, store_schema=False)
    (tmp_path / "a.parquet").write_bytes(file.getvalue().replace(b"zzzz", b"\x8d" * 4))
    refused(UnreadableError, "cannot be read as Parquet: 'utf-8' codec", load_dataset, tmp_path / "a.parquet")
