"""Adapter for a `torch.utils.data.Dataset` of (image, label) pairs."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo, as_batch
from bagcert.errors import UnreadableError, UsageError


def from_torch(
    dataset: Any, class_names: Sequence[str] | None = None, name: str = "torch dataset", split: str = "all"
) -> ImageSet:
    """Wraps a map-style dataset whose items are (image, label).

    Images may be PIL, uint8 [height, width, 3], or float [3, height, width] in [0, 1], which is rounded to 8 bits. The
    dataset must not normalize or augment images. The EXIF orientation of PIL images is not applied. Labels are taken
    from `dataset.targets` if present; otherwise every item is read once.

    Args:
        class_names: by default `dataset.classes`, or "0", "1", ... up to the largest label.
        name: name of the dataset in messages and records.

    Raises:
        UsageError: not a map-style dataset, or items of another format.
        UnreadableError: no items, or labels outside the classes.
    """
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise UsageError(f"a torch dataset must have a length and items by number, got {type(dataset).__name__}")
    targets = getattr(dataset, "targets", None)
    found = [_pair(dataset, i, name)[1] for i in range(len(dataset))] if targets is None else targets
    try:
        labels = np.asarray([int(label) for label in found], dtype=np.int64)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{name}: labels must be integers: {error}") from error
    if len(labels) != len(dataset):
        raise UsageError(f"{name}: it has {len(dataset)} items and {len(labels)} targets")
    names = class_names if class_names is not None else getattr(dataset, "classes", None)
    if names is None:
        names = range(int(labels.max(initial=0)) + 1)
    lock = threading.Lock()

    def read(row: int) -> Photo:
        with lock:  # a user's dataset may not be thread-safe
            image = _pair(dataset, row, name)[0]
        return _photo(image, f"{name} item {row}")

    return ImageSet(name, split, labels, tuple(str(each) for each in names), read)


def _pair(dataset: Any, row: int, name: str) -> tuple[Any, Any]:
    try:
        item = dataset[row]
    except (OSError, SyntaxError) as error:  # what a decoder raises for a broken file
        raise UnreadableError(f"{name} item {row} cannot be read: {error}") from error
    if not isinstance(item, tuple | list) or len(item) < 2:
        raise UsageError(f"{name}: items must be (image, label), item {row} is {type(item).__name__}")
    return item[0], item[1]


def _photo(image: Any, source: str) -> Photo:
    from PIL import Image

    if isinstance(image, Image.Image):
        return Photo(np.array(image.convert("RGB")), source=source)
    if not isinstance(image, np.ndarray | torch.Tensor) or image.ndim != 3:
        raise UsageError(f"{source}: images must be PIL, uint8 [height, width, 3] or float [3, height, width]")
    try:
        batch = as_batch(image)
    except UsageError as error:
        raise UsageError(f"{source}: {error}") from None
    return Photo((batch[0] * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy(), source=source)
