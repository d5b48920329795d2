"""Display names of class folders, from a text file with lines `folder: name`."""

from collections.abc import Sequence
from pathlib import Path

from bagcert.errors import CONTROL, UnreadableError, UsageError, sanitize
from bagcert.io.files import read_lines

CLASS_NAMES = "classes.txt"
"""The file that `load_folder` looks for next to the class folders or next to the split folders."""
MAX_BYTES = 1 << 24
SEPARATORS = " \t:,="


def read_class_names(path: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Reads the display name of each class folder. Folders that the file does not mention keep their folder name.

    A line is the name of a folder, a separator (a space, tab, colon, comma or equals sign) and the display name. Empty
    lines are skipped.
    """
    lines = read_lines(path, MAX_BYTES, f"the class names {path}")
    known = sorted(folders, key=len, reverse=True)  # the longest matching folder name wins
    names: dict[str, str] = {}
    for number, line in enumerate(map(str.strip, lines), start=1):
        if not line:
            continue
        folder = next((each for each in known if line.startswith(each) and line[len(each) :][:1] in SEPARATORS), None)
        name = "" if folder is None else line[len(folder) :].lstrip(SEPARATORS)
        if folder is None or not name or CONTROL.search(name):
            raise UsageError(
                f"line {number} of {path} must be a class folder and its name, such as '{sanitize(folders[0], 60)}: "
                f"stop sign'; got {sanitize(repr(line), 60)}"
            )
        if folder in names:
            raise UsageError(f"{path} names the class folder {sanitize(folder, 60)!r} twice")
        names[folder] = name
    result = tuple(names.get(folder, folder) for folder in folders)
    twice = next((name for name in result if result.count(name) > 1), None) if len(set(result)) < len(result) else None
    if twice is not None:
        raise UsageError(f"{path} leads to two classes with the name {sanitize(twice, 60)!r}")
    return result


def names_beside(root: Path, folders: Sequence[str]) -> tuple[str, ...]:
    """Reads display names from `classes.txt` in a data folder. A file of another format is ignored."""
    path = root / CLASS_NAMES
    if not path.is_file():
        return tuple(folders)
    try:
        return read_class_names(path, folders)
    except (UsageError, UnreadableError):
        return tuple(folders)
