"""What holds for everything `load_dataset` can load: each name that needs no network, and each layout of a path."""

import hashlib
import io
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bagcert.data import DATASETS, LAYOUTS, ImageSet, cifar10, load_dataset
from bagcert.errors import UsageError
from tests import refused, tiny

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)
LABELS = [row % 4 for row in range(20)]
NETWORK = {"cifar10"}


def _parquet(root: Path) -> str:
    for split in ("train", "test"):
        table = pa.table({"image": [tiny.png(pixels) for pixels in PIXELS], "label": LABELS})
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet", row_group_size=6)
    return str(root)


def _tars(root: Path) -> str:
    for split in ("train", "test"):
        with tarfile.open(root / f"{split}-000.tar", "w") as file:
            for row, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
                for name, content in ((f"{row:02}.png", tiny.png(pixels)), (f"{row:02}.cls", str(label).encode())):
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    file.addfile(info, io.BytesIO(content))
    return str(root)


BATCH = pickle.dumps({b"data": PIXELS.transpose(0, 3, 1, 2).reshape(20, -1), b"labels": LABELS}, 2)


def _pickles(root: Path) -> str:
    for name in cifar10.MD5:
        (root / name).write_bytes(BATCH)
    return str(root)


def _folders(root: Path) -> str:
    for split in ("train", "test"):
        for row, (pixels, label) in enumerate(zip(PIXELS, LABELS, strict=True)):
            path = root / split / f"class{label}" / f"{row:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(tiny.png(pixels))
    return str(root)


PATHS: dict[str, Callable[[Path], str]] = {
    "WebDataset shards": _tars,
    "Parquet files": _parquet,
    "the pickles of CIFAR-10": _pickles,
    "class folders": _folders,
}
SOURCES = sorted(set(DATASETS) - NETWORK) + list(LAYOUTS)


@pytest.fixture(autouse=True)
def _checksums(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the checksum of `BATCH` for those of the original files."""
    for name in cifar10.MD5:
        monkeypatch.setitem(cifar10.MD5, name, hashlib.md5(BATCH).hexdigest())


@pytest.fixture(params=SOURCES)
def spec(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return request.param if request.param in DATASETS else PATHS[request.param](tmp_path)


@pytest.mark.parametrize("split", ["train", "test"])
def test_images_labels_and_names_belong_together(spec: str, split: str) -> None:
    images = load_dataset(spec, split)
    assert isinstance(images, ImageSet)
    assert (images.name, images.split) == (spec, split)
    assert images.labels.dtype == np.int64
    assert images.labels.min() >= 0
    assert images.labels.max() < len(images.class_names)
    assert images.array().shape == (len(images), *images.array().shape[1:3], 3)
    assert images.array().dtype == np.uint8
    some = [len(images) - 1, 0, 3]
    for index, photo in zip(some, images.read(some), strict=True):
        np.testing.assert_array_equal(photo.pixels, images.array()[index])
        assert photo.source


def test_loading_twice_gives_the_same(spec: str) -> None:
    first, again = load_dataset(spec), load_dataset(spec)
    np.testing.assert_array_equal(first.array(), again.array())
    np.testing.assert_array_equal(first.labels, again.labels)


def test_limit_draws_distinct_images_and_keeps_their_labels(spec: str) -> None:
    images, few = load_dataset(spec), load_dataset(spec, limit=7)
    assert len(few) == 7
    whole = images.array()
    numbers = [int(np.flatnonzero((whole == image).all(axis=(1, 2, 3)))[0]) for image in few.array()]
    assert len(set(numbers)) == 7
    np.testing.assert_array_equal(few.labels, images.labels[numbers])
    for limit in (0, -3):
        refused(UsageError, f"at least 1 image, got {limit}", load_dataset, spec, limit=limit)


def test_validation_parts_are_fixed_by_the_seed(spec: str) -> None:
    rest, held = load_dataset(spec, "train").split_off(0.2, seed=1)
    again = load_dataset(spec, "train").split_off(0.2, seed=1)[1]
    assert len(rest) + len(held) == len(load_dataset(spec, "train"))
    np.testing.assert_array_equal(held.array(), again.array())


def test_another_split_is_refused_by_name(spec: str) -> None:
    with pytest.raises(UsageError, match=r"no split 'nonsense'.*test.*train|no split 'nonsense'.*train.*test"):
        load_dataset(spec, "nonsense")


def test_the_same_pixels_from_every_layout(tmp_path: Path) -> None:
    for number, (name, write) in enumerate(PATHS.items()):
        assert name in LAYOUTS
        root = tmp_path / str(number)
        root.mkdir()
        images = load_dataset(write(root))
        order = np.argsort(images.labels, kind="stable")
        np.testing.assert_array_equal(images.array()[order], PIXELS[np.argsort(LABELS, kind="stable")])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("digit", "no dataset or path 'digit'; did you mean digits"),
        ("/no/such/folder", "no dataset or path '/no/such/folder'; choose from digits, cifar10"),
        ("", "no dataset or path ''"),
    ],
)
def test_unknown_names_name_the_known(spec: str, message: str) -> None:
    refused(UsageError, message, load_dataset, spec)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(tiny.png(PIXELS[0]))
    refused(UsageError, r"image\.png is not a dataset", load_dataset, path)


def _real_cifar10() -> Path | None:
    named = os.environ.get("BAGCERT_CIFAR10")
    path = Path(named) if named else Path(__file__).resolve().parents[2].parent / "shared" / "data" / "cifar10"
    return path if path.is_dir() else None


@pytest.mark.skipif(_real_cifar10() is None, reason="needs CIFAR-10 as Parquet, in $BAGCERT_CIFAR10")
def test_real_cifar10_pixel_for_pixel() -> None:
    images = load_dataset(_real_cifar10(), "test")
    assert len(images) == 10_000
    assert images.labels[:8].tolist() == [3, 8, 8, 0, 6, 6, 1, 6]
    assert images.class_names[:2] == ("airplane", "automobile")
    digest = hashlib.sha256(images.array().tobytes() + images.labels.astype(np.uint8).tobytes()).hexdigest()
    assert digest == "8193b3fbce55bec361cd1b8fd4880cb1649832dc4d6de6da1e7a21847a4843aa"
