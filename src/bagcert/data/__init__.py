"""Datasets: images, labels and class names. To add a dataset, add a module and an entry in one of the tables below."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bagcert.data.cifar10 import is_pickles, load_cifar10, load_pickles
from bagcert.data.digits import load_digits
from bagcert.data.folder import load_folder
from bagcert.data.image_set import ImageSet
from bagcert.data.parquet import is_parquet, load_parquet, parquet_images
from bagcert.data.remote import is_address
from bagcert.data.shards import find_addresses
from bagcert.data.torch_dataset import from_torch
from bagcert.data.webdataset import is_webdataset, load_webdataset, tar_images
from bagcert.errors import UsageError, nearest

__all__ = ["DATASETS", "LAYOUTS", "ImageSet", "from_torch", "load_dataset"]

DATASETS: dict[str, Callable[[str, int], ImageSet]] = {
    "digits": load_digits,
    "cifar10": lambda split, seed: load_cifar10(split),
}
"""Datasets with a name: (split, seed) -> ImageSet."""

LAYOUTS: dict[str, tuple[Callable[[Path], bool], Callable[[Path, str], ImageSet]]] = {
    "WebDataset shards": (is_webdataset, load_webdataset),
    "Parquet files": (is_parquet, load_parquet),
    "the pickles of CIFAR-10": (is_pickles, load_pickles),
    "class folders": (Path.is_dir, load_folder),
}
"""Layouts of data on disk: (test whether a path has it, loader (path, split) -> ImageSet). The first match wins."""


def load_dataset(spec: Any, split: str = "test", limit: int | None = None, seed: int = 0) -> ImageSet:
    """Loads a dataset by name, from a path, or around a torch dataset.

    Args:
        spec: a name in DATASETS; a path to a folder of class folders, a Parquet or WebDataset file, glob or folder, or
            a folder with the original pickles of CIFAR-10; an address of Parquet or WebDataset files that fsspec knows
            (`s3://bucket/train-*.tar`); or a torch dataset of (image, label). `./digits` is a path.
        split: which part; sources without parts have the one split "all" and ignore it.
        limit: maximum number of images, see `ImageSet.take`. The others are not decoded.
        seed: random seed of the split, for datasets without a predefined one.

    Raises:
        UsageError: an unknown name, a path that does not exist, no such split, limit < 1.
        UnreadableError: files that are missing, broken or of another form; no images; labels outside the classes.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"a limit must be at least 1 image, got {limit}")
    return _load(spec, split, seed).take(limit)


def _load(spec: Any, split: str, seed: int) -> ImageSet:
    if not isinstance(spec, str | Path):
        return from_torch(spec)
    if spec in DATASETS:
        return DATASETS[str(spec)](split, seed)
    if is_address(spec):
        return _load_address(str(spec), split)
    path = Path(spec).expanduser()
    for recognizes, load in LAYOUTS.values():
        if str(spec) and recognizes(path):
            return load(path, split)
    known = ", ".join(DATASETS)
    if str(spec) and os.path.exists(path):
        raise UsageError(f"{spec} is not a dataset: it must be {known}, or a path to {', '.join(LAYOUTS)}")
    raise UsageError(f"there is no dataset or path {str(spec)!r}{nearest(str(spec), DATASETS)}")


def _load_address(spec: str, split: str) -> ImageSet:
    files, split = find_addresses(spec, split)
    if len({str(file).rsplit(".", 1)[1] for file in files}) > 1:
        raise UsageError(f"{spec} leads to Parquet and tar files; name those of one kind")
    load = tar_images if str(files[0]).endswith(".tar") else parquet_images
    return load(spec, split, files)
