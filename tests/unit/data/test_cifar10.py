"""The original pickles of CIFAR-10, and the hub."""

import hashlib
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagcert.data import cifar10, load_dataset
from bagcert.data.cifar10 import CLASS_NAMES, load_cifar10, load_pickles
from bagcert.errors import UnreadableError, UsageError
from tests import refused

# A batch of one black image as Python 2 wrote the originals: protocol 2, byte strings, numpy.core.multiarray.
_PYTHON2 = (
    b"\x80\x02}q\x01(U\x06labelsq\x02]q\x03K\x06aU\x04dataq\x04cnumpy.core.multiarray\n_reconstruct\nq\x05cnumpy\n"
    b"ndarray\nq\x06K\x00\x85U\x01b\x87Rq\x07(K\x01K\x01M\x00\x0c\x86cnumpy\ndtype\nq\x08U\x02u1K\x00K\x01\x87Rq\t"
    b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89T\x00\x0c\x00\x00" + bytes(3072) + b"tbu."
)


def _batch(count: int = 4, seed: int = 0) -> dict[bytes, object]:
    random = np.random.default_rng(seed)
    data = random.integers(0, 256, (count, 3072), dtype=np.uint8)
    return {b"data": data, b"labels": [int(label) for label in random.integers(0, 10, count)]}


def _write(folder: Path, batches: dict[str, dict[bytes, object]], monkeypatch: pytest.MonkeyPatch) -> Path:
    """Writes batches and takes their checksums for those of the original files."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, batch in batches.items():
        content = pickle.dumps(batch, 2)
        (folder / name).write_bytes(content)
        monkeypatch.setitem(cifar10.MD5, name, hashlib.md5(content).hexdigest())
    return folder


def test_pickles_pixels_and_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = _batch()
    images = load_pickles(_write(tmp_path, {"test_batch": batch}, monkeypatch))
    np.testing.assert_array_equal(images.labels, batch[b"labels"])
    expected = np.asarray(batch[b"data"]).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    np.testing.assert_array_equal(images.array(), expected)
    assert images.class_names == CLASS_NAMES


def test_pickles_of_python_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_batch").write_bytes(_PYTHON2)
    monkeypatch.setitem(cifar10.MD5, "test_batch", hashlib.md5(_PYTHON2).hexdigest())
    images = load_pickles(tmp_path)
    assert images.labels.tolist() == [6]
    assert not images.array().any()


def test_pickles_five_batches_in_inner_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = {f"data_batch_{number}": _batch(3, number) for number in range(1, 6)}
    _write(tmp_path / "cifar-10-batches-py", {**batches, "test_batch": _batch()}, monkeypatch)
    images = load_dataset(tmp_path, "train")
    assert len(images) == 15
    assert images.labels.tolist() == [label for batch in batches.values() for label in batch[b"labels"]]
    assert len(load_dataset(str(tmp_path), "test", limit=2)) == 2
    (tmp_path / "cifar-10-batches-py" / "data_batch_4").unlink()
    refused(UnreadableError, r"there is no file .*data_batch_4", load_dataset, tmp_path, "train")
    refused(UsageError, "no split 'validation'; it has train and test", load_dataset, tmp_path, "validation")


def _refused(tmp_path: Path, content: bytes, reason: str | None) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    said = refused(UnreadableError, reason, load_pickles, tmp_path)
    assert str(tmp_path) in said


class _Runs:
    """Unpickled, this touches a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_pickles_other_than_the_original_not_unpickled(tmp_path: Path) -> None:
    proof = tmp_path / "proof"
    for content in (pickle.dumps(_Runs(proof)), pickle.dumps(_batch()), b"", b"junk"):
        (tmp_path / "test_batch").write_bytes(content)
        words = (
            "is not the original file of CIFAR-10: its MD5 checksum is .*, expected 40351d587109b95175f43aff81a1287e"
        )
        refused(UnreadableError, words, load_pickles, tmp_path)
    assert not proof.exists()


def _hub(monkeypatch: pytest.MonkeyPatch, load: object) -> None:
    fake = types.ModuleType("datasets")
    fake.load_dataset = load
    fake.Image = lambda decode: None
    monkeypatch.setitem(sys.modules, "datasets", fake)


def test_the_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host\nand a long story")

    _hub(monkeypatch, fail)
    with pytest.raises(UnreadableError, match=r"cannot be fetched from the hub \(uoft-cs/cifar10\): no route to host;"):
        load_cifar10("test")


def test_images_of_the_hub_keep_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pixels = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=list(CLASS_NAMES))})
    columns = {"img": [Image.fromarray(each) for each in pixels], "label": [3, 8, 0]}
    table = datasets.Dataset.from_dict(columns, features=features)
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: {"uoft-cs/cifar10/test": table}[f"{name}/{split}"]
    )
    images = load_dataset("cifar10")
    np.testing.assert_array_equal(images.array(), pixels)
    assert images.labels.tolist() == [3, 8, 0]
    assert images.class_names == CLASS_NAMES


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    refused(UsageError, r'pip install "bagcert\[hub\]"', load_dataset, "cifar10")
    refused(UsageError, "no split 'val'", load_dataset, "cifar10", "val")


def test_large_files_and_pipes_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "test_batch"
    path.write_bytes(b"x")
    os.truncate(path, cifar10.MAX_FILE_BYTES + 1)
    refused(UnreadableError, "more than the limit of 268,435,456", load_pickles, tmp_path)
    path.unlink()
    os.mkfifo(path)
    refused(UnreadableError, "not a regular file", load_pickles, tmp_path)
