"""Grouped validation split: keeps correlated images, such as frames of a video, on the same side."""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int64

from bagcert.data.image_set import ImageSet
from bagcert.errors import UsageError, sanitize
from bagcert.io.files import read_lines

PREFIX = "prefix"
MAX_BYTES = 1 << 28
_BEFORE_LAST_SEPARATOR = re.compile(r"(.+)[_. -]")


def groups_of(images: ImageSet, how: str) -> Int64[np.ndarray, " images"]:
    """Returns the group number of each image.

    Args:
        how: "prefix": files of one class folder whose names (without extension) agree up to the last `_`, `-`, `.` or
            space form a group; a name without any of these is its own group. Otherwise a text file with a line
            `class folder/file,group` for each image; a tab or space may replace the comma.
    """
    files: tuple[Path, ...] | None = getattr(images.source, "files", None)
    if files is None:
        raise UsageError(f"groups need images in class folders, whose files have names; {images.name} has none")
    rows = range(len(files)) if images.rows is None else images.rows.tolist()
    names = [f"{files[row].parent.name}/{files[row].name}" for row in rows]
    if how == PREFIX:
        groups = [_prefix(name) for name in names]
    else:
        listed = _read(Path(how))
        lacking = next((name for name in names if name not in listed), None)
        if lacking is not None:
            raise UsageError(f"the groups {how} have no line for the image {sanitize(lacking)!r}")
        groups = [listed[name] for name in names]
    return np.unique(np.array(groups), return_inverse=True)[1].astype(np.int64).reshape(-1)


def split_by_group(
    labels: Int64[np.ndarray, " images"], groups: Int64[np.ndarray, " images"], fraction: float, seed: int
) -> Bool[np.ndarray, " images"]:
    """Chooses whole groups to hold out, as close to `fraction` of the images of each class as groups allow.

    A group counts for the most frequent class of its images. Every class keeps at least one training image.

    Raises:
        UsageError: no group is small enough to be held out.
    """
    random = np.random.default_rng(seed)
    size = np.bincount(groups)
    counts = np.zeros((len(size), int(labels.max()) + 1), dtype=np.int64)
    np.add.at(counts, (groups, labels), 1)
    class_of = counts.argmax(1)
    held = np.zeros(len(size), dtype=bool)
    for label in range(counts.shape[1]):
        members = random.permutation(np.flatnonzero(class_of == label))
        target, taken = fraction * int(size[members].sum()), 0
        for group in members[:-1]:
            if abs(taken + size[group] - target) <= abs(taken - target):
                held[group] = True
                taken += int(size[group])
    # A class may also have images in groups of other classes; none may lose all of them.
    trained_on = counts[~held].sum(0)
    for lost in np.flatnonzero((trained_on == 0) & (counts.sum(0) > 0)):
        held[counts[:, lost].argmax()] = False
    if not held.any():
        raise UsageError(
            f"no group of images can be held out as a share of {fraction:g}: every class needs at least two groups, "
            "and small ones; set a larger data.validation, or give a folder val/"
        )
    return held[groups]


def _prefix(name: str) -> str:
    folder, _, file = name.partition("/")
    stem = Path(file).stem
    found = _BEFORE_LAST_SEPARATOR.match(stem)
    return f"{folder}/{found[1]}" if found else f"{folder}//{stem}"


def _read(path: Path) -> dict[str, str]:
    lines = read_lines(path, MAX_BYTES, f"the groups {path}")
    listed = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        parts = next((parts for separator in ",\t " if (parts := line.rsplit(separator, 1))[1:]), None)
        if parts is None:
            if line:
                raise UsageError(
                    f"line {number} of {path} must be 'class folder/file,group'; got {sanitize(line, 60)!r}"
                )
            continue
        listed[parts[0].strip()] = parts[1].strip()
    return listed
