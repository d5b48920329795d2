"""Tar shards: read as they are written, here and behind an address, and refused where they lie."""

import io
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest

from bagcert.data import load_dataset, webdataset
from bagcert.errors import UnreadableError, UsageError
from tests import refused, tiny

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 6, 5, 3), dtype=np.uint8)
LABELS = [row % 3 for row in range(12)]


def write(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    """As `webdataset.TarWriter` does: with a time in fractions of seconds, which needs extended headers."""
    with tarfile.open(path, "w", format=kind) as file:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), time.time()  # type: ignore[assignment]
            file.addfile(info, io.BytesIO(content))
    return path


def samples(rows: range, folder: str = "") -> list[tuple[str, bytes]]:
    return [
        member
        for row in rows
        for member in (
            (f"{folder}{row:04}.json", b'{"caption": "no label here"}'),
            (f"{folder}{row:04}.png", tiny.png(PIXELS[row])),
            (f"{folder}{row:04}.cls", f"{LABELS[row]}\n".encode()),
        )
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "train-000.tar", samples(range(5)))
    write(tmp_path / "train-001.tar", samples(range(5, 9), "a/very/long/" + "name" * 30 + "/"))
    write(tmp_path / "test-000.tar", samples(range(9, 12), "x" * 120), tarfile.GNU_FORMAT)
    return tmp_path


@pytest.mark.parametrize("block_bytes", [1, 400, 1 << 24])
def test_shards_of_a_split_in_order(folder: Path, block_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webdataset, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(webdataset, "CACHE_BYTES", 1)
    train, test = (load_dataset(folder, split) for split in ("train", "test"))
    np.testing.assert_array_equal(train.array(), PIXELS[:9])
    np.testing.assert_array_equal(test.array(), PIXELS[9:])
    assert [*train.labels, *test.labels] == LABELS
    assert train.class_names == ("0", "1", "2")
    blocks = train.blocks()
    assert (np.diff(blocks) >= 0).all()
    assert len(set(blocks)) == (9 if block_bytes == 1 else 2 if block_bytes == 1 << 24 else len(set(blocks)))
    assert not set(blocks[:5]) & set(blocks[5:]), "a block lies in one shard"
    assert len(load_dataset(f"{folder}/t*.tar")) == 12
    assert len(load_dataset(folder / "test-000.tar")) == 3
    refused(UsageError, "no split 'val'; its shards are of the splits test, train", load_dataset, folder, "val")


def test_behind_an_address(folder: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    for path in folder.glob("*.tar"):
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    np.testing.assert_array_equal(load_dataset("memory://bucket", "train").array(), PIXELS[:9])
    np.testing.assert_array_equal(
        load_dataset("memory://bucket/t*-000.tar").array(), PIXELS[[9, 10, 11, 0, 1, 2, 3, 4]]
    )
    np.testing.assert_array_equal(load_dataset(f"file://{folder}/test-000.tar").array(), PIXELS[9:])
    refused(UsageError, "no split 'val'", load_dataset, "memory://bucket", "val")
    for nowhere in ("memory://bucket/none-*.tar", "memory://elsewhere"):
        refused(UnreadableError, f"{nowhere.split('*')[0].rstrip('-')}.* leads to no", load_dataset, nowhere)
    refused(UsageError, "nosuch://a cannot be opened", load_dataset, "nosuch://a")


def test_a_json_label_counts_where_there_is_no_cls(tmp_path: Path) -> None:
    members = [("a.JPG", tiny.png(PIXELS[0])), ("a.json", b'{"label": 2}'), ("b.json", b'{"label": 1}'), ("b.png", b"")]
    images = load_dataset(write(tmp_path / "some.tar", members))
    assert images.labels.tolist() == [2, 1]
    np.testing.assert_array_equal(images.read([0])[0].pixels, PIXELS[0])
    refused(UnreadableError, "is empty", images.read, [1])


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("a.png", b"x")], "sample /a has no label"),
        ([("a.cls", b"1"), ("b.png", b"x"), ("b.cls", b"1")], "sample /a has no image"),
        ([("a.png", b"x"), ("a.cls", b"-1")], "has no label from 0"),
        ([("a.png", b"x"), ("a.cls", b"99999999")], "has no label from 0"),
        ([("a.png", b"x"), ("a.cls", b"one")], "has no label from 0"),
        ([("a.png", b"x"), ("a.json", b'{"label": true}')], "has no label from 0"),
        ([("a.png", b"x"), ("a.cls", b"1" * 70_000)], "70,000 bytes is refused"),
        ([("n" * 70_000 + ".png", b"x")], "is refused"),
        ([("readme.txt", b"x")], "has no images"),
    ],
)
def test_samples_that_are_none_are_refused(members: list, reason: str, tmp_path: Path) -> None:
    refused(UnreadableError, reason, load_dataset, write(tmp_path / "some.tar", members))


def test_files_that_are_none_are_refused(folder: Path, tmp_path: Path) -> None:
    good = (folder / "train-000.tar").read_bytes()
    path = tmp_path / "bad.tar"
    flipped = bytearray(good)
    flipped[20] ^= 1
    path_header = good.index(b"path=") if b"path=" in good else good.index(b"mtime=")
    pax = bytearray(good)
    pax[path_header - 3 : path_header - 1] = b"zz"
    for content, reason in {
        b"not a tar file" * 100: "is no tar file",
        bytes(flipped): "is no tar file, or damaged at byte 0",
        bytes(pax): "damaged extended header",
        good[:3000]: "is cut short",
        good[:2048]: "is cut short",
        b"": "is cut short",
    }.items():
        path.write_bytes(content)
        refused(UnreadableError, reason, load_dataset, path)
    refused(UnreadableError, "there is no file", webdataset.load_webdataset, tmp_path / "gone.tar")


def test_a_link_in_a_shard_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret.png").write_bytes(tiny.png(PIXELS[0]))
    with tarfile.open(tmp_path / "some.tar", "w") as file:
        info = tarfile.TarInfo("a.png")
        info.type, info.linkname = tarfile.SYMTYPE, str(tmp_path / "secret.png")
        file.addfile(info)
        label = tarfile.TarInfo("a.cls")
        label.size = 1
        file.addfile(label, io.BytesIO(b"1"))
    refused(UnreadableError, "no image", load_dataset, tmp_path / "some.tar")


def test_a_shard_that_changes_is_noticed(folder: Path) -> None:
    images = load_dataset(folder, "train")
    write(folder / "train-000.tar", samples(range(4)))
    refused(UnreadableError, "was changed while it was in use", images.read, [0])


def test_an_image_too_large_is_refused_before_it_is_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = load_dataset(folder, "train")
    monkeypatch.setattr(webdataset, "MAX_IMAGE_BYTES", 10)
    refused(UnreadableError, "is refused; an image has at most 10", images.read, [0])
    assert not images.source._kept
