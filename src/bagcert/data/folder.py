"""Images in class folders: `root/class/image.jpg`, or `root/split/class/image.jpg`."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bagcert.data.class_names import names_beside
from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo, read_image
from bagcert.errors import CONTROL, UnreadableError, UsageError

_JPEG = (".jpg", ".jpeg", ".jpe", ".jp2", ".mpo")
SPLITS = ("train", "test", "val", "valid", "validation")
"""Common split names. Another folder of class folders is more likely a data folder that is one level too deep."""
EXTENSIONS = (*_JPEG, ".avif", ".bmp", ".gif", ".ico", ".pbm", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


def load_folder(path: Path, split: str = "test") -> ImageSet:
    """Loads images from class folders, sorted by class name, then by file name.

    `root/class/*.jpg` has a single split, "all", which is returned for any requested split. For
    `root/split/class/*.jpg`, the classes are the union over all splits, so that labels agree between splits. Files are
    recognized by their extension. Hidden files and folders, and folders inside class folders, are skipped. An optional
    file `classes.txt` in `root` sets display names of the classes, see `bagcert.data.class_names`.

    Raises:
        UnreadableError: not a folder, no class folders, no images, or a folder that cannot be listed.
        UsageError: unknown split.
    """
    if not path.is_dir():
        raise UnreadableError(f"{path} is neither a folder of class folders nor a Parquet file")
    folders = _folders(path)
    flat = any(_images(path / folder) for folder in folders)
    splits = {} if flat else {folder: classes for folder in folders if (classes := _folders(path / folder))}
    if splits:
        if split not in splits:
            inner = ", ".join(splits)
            hint = f"; did you mean {path / inner}?" if len(splits) == 1 and inner not in SPLITS else ""
            raise UsageError(f"{path} has no split {split!r}; it has {inner}{hint}")
        class_names = sorted(set().union(*splits.values()))
        root = path / split
    elif folders:
        class_names, root, split = folders, path, "all"
    else:
        inside = "images but no class folders" if _images(path) else "no class folders"
        raise UnreadableError(f"{path} has {inside}; images are looked for in {path}/CLASS/ and {path}/SPLIT/CLASS/")
    for name in class_names:
        if CONTROL.search(name):
            raise UnreadableError(f"{path} has a class folder whose name is no text: {name!r}")
    files, labels = [], []
    for label, name in enumerate(class_names):
        found = _images(root / name)
        files += [root / name / file for file in found]
        labels += [label] * len(found)
    if not files:
        raise UnreadableError(f"the class folders of {root} ({', '.join(class_names)[:100]}) hold no images")
    shown = names_beside(path, class_names)
    return ImageSet(
        str(path), split, np.asarray(labels, dtype=np.int64), shown, _Files(tuple(files), tuple(class_names))
    )


@dataclass(frozen=True, eq=False)
class _Files:
    files: tuple[Path, ...]
    folders: tuple[str, ...]

    def __call__(self, row: int) -> Photo:
        return read_image(self.files[row])

    def fingerprint(self) -> bytes:
        """Returns a hash of the names, sizes and modification times of all files."""
        digest = hashlib.sha256()
        for file in self.files:
            try:
                found = os.stat(file)
                state = (found.st_size, found.st_mtime_ns)
            except OSError:  # it is told when it is read
                state = (-1, -1)
            digest.update(repr((os.fsencode(file.name), state)).encode())
        return digest.digest()


def images_below(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[Path]:
    """Lists image files anywhere below a folder, sorted. Skips hidden files and links to folders."""
    found: list[Path] = []
    waiting = [folder]
    while waiting:  # not recursive: folders can be nested deeper than the recursion limit
        folder = waiting.pop()
        found += [folder / name for name in _images(folder, extensions) if not (folder / name).is_dir()]
        waiting += [folder / name for name in reversed(_folders(folder)) if not (folder / name).is_symlink()]
    return found


def _names(folder: Path) -> list[str]:
    try:
        return sorted(name for name in os.listdir(folder) if not name.startswith("."))
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UnreadableError(f"the folder {folder} cannot be listed: {error.strerror}") from error


def _folders(folder: Path) -> list[str]:
    return [name for name in _names(folder) if os.path.isdir(folder / name)]


def _images(folder: Path, extensions: tuple[str, ...] = EXTENSIONS) -> list[str]:
    return [name for name in _names(folder) if name.lower().endswith(extensions)]
