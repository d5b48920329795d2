"""CIFAR-10 from the Hugging Face hub, or from its original pickles (Krizhevsky 2009)."""

import hashlib
import pickle
from pathlib import Path

import numpy as np

from bagcert.data.image_set import ArraySource, ImageSet
from bagcert.data.photo import Photo, read_image
from bagcert.errors import UnreadableError, UsageError, reason_of, sanitize
from bagcert.io.files import read_regular
from bagcert.io.optional import require

CLASS_NAMES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
HUB_ID = "uoft-cs/cifar10"
_FILES = {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
MD5 = {
    "data_batch_1": "c99cafc152244af753f735de768cd75f",
    "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
    "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
    "data_batch_4": "634d18415352ddfa80567beed471001a",
    "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
    "test_batch": "40351d587109b95175f43aff81a1287e",
}
"""Published checksums of the original files. No other pickle is read."""
_INNER_FOLDER = "cifar-10-batches-py"
MAX_FILE_BYTES = 1 << 28  # a batch has 31 MB; larger files are refused before they are read


def load_cifar10(split: str = "test") -> ImageSet:
    """Loads CIFAR-10 from the hub, 50,000 images in `train` and 10,000 in `test`. Downloads are cached.

    Raises:
        UsageError: another split, or `datasets` is not installed.
        UnreadableError: the hub cannot be reached and the set is not in the cache.
    """
    _check_split("cifar10", split)
    what = "cifar10 by that name (a folder with its Parquet files or its original pickles does without)"
    datasets = require("datasets", "hub", what)
    try:
        table = datasets.load_dataset(HUB_ID, split=split).cast_column("img", datasets.Image(decode=False))
        labels = np.asarray(table["label"], dtype=np.int64)
    except Exception as error:  # the hub's clients raise many kinds, none of them common to all
        raise UnreadableError(
            f"CIFAR-10 cannot be fetched from the hub ({HUB_ID}): {sanitize(reason_of(error))}; "
            "check the network, or give a folder with its Parquet files or its original pickles"
        ) from error

    def read(row: int) -> Photo:
        return read_image(table[row]["img"]["bytes"], f"cifar10 {split} image {row}")

    return ImageSet("cifar10", split, labels, CLASS_NAMES, read)


def is_pickles(path: Path) -> bool:
    """Returns whether a folder holds the original batches, directly or in the subfolder of the original archive."""
    return any((_batches(path) / file).is_file() for files in _FILES.values() for file in files)


def load_pickles(path: Path, split: str = "test") -> ImageSet:
    """Loads CIFAR-10 from `data_batch_1` to `data_batch_5` and `test_batch`, in `path` or `path/cifar-10-batches-py`.

    Raises:
        UsageError: a split other than train and test.
        UnreadableError: a file is missing, or is not the original one.
    """
    _check_split(str(path), split)
    pixels, labels = zip(*(_read_batch(_batches(path) / file) for file in _FILES[split]), strict=True)
    return ImageSet(
        str(path), split, np.concatenate(labels), CLASS_NAMES, ArraySource(np.concatenate(pixels), f"{path} {split}")
    )


def _batches(path: Path) -> Path:
    return path / _INNER_FOLDER if (path / _INNER_FOLDER).is_dir() else path


def _check_split(name: str, split: str) -> None:
    if split not in _FILES:
        raise UsageError(f"{name} has no split {split!r}; it has train and test")


def _read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    try:
        content = read_regular(path, MAX_FILE_BYTES)
    except FileNotFoundError:
        raise UnreadableError(f"there is no file {path}") from None
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None
    # Unpickling any other file could run code in it. Nobody knows how to forge a file with a given MD5 checksum.
    found, expected = hashlib.md5(content, usedforsecurity=False).hexdigest(), MD5[path.name]
    if found != expected:
        raise UnreadableError(
            f"{path} is not the original file of CIFAR-10: its MD5 checksum is {found}, expected {expected}; unpack "
            "the original archive again, or use Parquet files"
        )
    batch = pickle.loads(content, encoding="bytes")
    images = batch[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    return np.ascontiguousarray(images), np.asarray(batch[b"labels"], dtype=np.int64)
