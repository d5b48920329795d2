"""Images in Parquet shards, in the layout of the Hugging Face hub: an image column and a label column.

Read with pyarrow alone: 10,000 small images take about a second, and nothing is copied to a cache.
"""

import glob
import json
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bagcert.data.image_set import ImageSet
from bagcert.errors import UnreadableError, UsageError
from bagcert.images import Photo, read_image

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMN = "label"
CACHE_BYTES = 1 << 30
"""Encoded row groups are kept in memory up to this size; the one in use always is."""


def is_parquet(path: Path) -> bool:
    """A Parquet file, a glob, or a folder with Parquet files in it."""
    return _is_glob(path) or path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))


def load_parquet(path: Path, split: str = "test") -> ImageSet:
    """Images and labels of Parquet shards, in the order of the file names.

    Columns: `image` or `img`, a struct with `bytes` (as on the hub) or plain bytes, encoded in any common format;
    `label`, an integer. Class names come from the schema metadata of the hub, or are "0", "1", ...

    Args:
        path: a folder with `<split>-*.parquet` or `<split>.parquet`; or a file or a glob, all of whose images are
            taken, whatever the split.
        split: which part of a folder.

    Raises:
        UnreadableError: no such file, truncated, not Parquet, without these columns, without rows, or with labels
            that are missing or outside the classes.
        UsageError: the folder has no such split.
    """
    if path.is_dir():
        files = _files_of_split(path, split)
    elif _is_glob(path):
        files, split = sorted(Path(found) for found in glob.glob(str(path))), "all"
        if not files:
            raise UnreadableError(f"no file matches {path}")
    else:
        files, split = [path], "all"
    shards = _Shards(files)
    labels = np.concatenate(shards.labels)
    names = shards.class_names or tuple(str(label) for label in range(max(0, *labels) + 1 if len(labels) else 1))
    return ImageSet(str(path), split, labels, names, shards)


class _Shards:
    """Images by row number over several files. Row groups are read when needed and kept while they fit."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.labels: list[np.ndarray] = []
        self.class_names: tuple[str, ...] = ()
        self._groups: list[tuple[Path, int]] = []
        self._kept: OrderedDict[int, pa.ChunkedArray] = OrderedDict()
        self._lock = threading.Lock()
        sizes = []
        for path in files:
            with _reading(path), pq.ParquetFile(path) as file:
                schema = file.schema_arrow
                _image_column(schema, path)
                if LABEL_COLUMN not in schema.names or not pa.types.is_integer(schema.field(LABEL_COLUMN).type):
                    raise UnreadableError(
                        f"{path} has no integer column {LABEL_COLUMN!r}; its columns are "
                        + ", ".join(f"{field.name} ({field.type})" for field in schema)
                    )
                labels = file.read([LABEL_COLUMN])[LABEL_COLUMN]
                if labels.null_count:
                    raise UnreadableError(f"{path}: {labels.null_count} of {len(labels)} labels are missing")
                self.labels.append(labels.to_numpy().astype(np.int64))
                self.class_names = self.class_names or _class_names(schema.metadata)
                for group in range(file.num_row_groups):
                    self._groups.append((path, group))
                    sizes.append(file.metadata.row_group(group).num_rows)
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def __call__(self, row: int) -> Photo:
        """The image of that number."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        path, number = self._groups[group]
        row -= int(self._ends[group - 1]) if group else 0
        name = f"{path} row {row}" + (f" of row group {number}" if number else "")
        encoded = self._images(group)[row].as_py()
        if encoded is None:
            raise UnreadableError(f"{name} has no image bytes")
        return read_image(encoded, name)

    def _images(self, group: int) -> "pa.ChunkedArray":
        import pyarrow.parquet as pq

        with self._lock:
            if group not in self._kept:
                path, number = self._groups[group]
                with _reading(path), pq.ParquetFile(path) as file:
                    column, nested = _image_column(file.schema_arrow, path)
                    images = file.read_row_group(number, [f"{column}.bytes" if nested else column])
                    # A struct of one field comes back; flattening it leaves the bytes under one name.
                    self._kept[group] = (images.flatten() if nested else images).column(0)
                while len(self._kept) > 1 and sum(kept.nbytes for kept in self._kept.values()) > CACHE_BYTES:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(group)
            return self._kept[group]


def _files_of_split(folder: Path, split: str) -> list[Path]:
    files = sorted(path for path in folder.glob("*.parquet") if not path.name.startswith("."))
    splits = sorted({path.stem.split("-")[0] for path in files})
    if split not in splits:
        raise UsageError(f"{folder} has no split {split!r}; its Parquet files are of the splits {', '.join(splits)}")
    return [path for path in files if path.stem.split("-")[0] == split]


def _image_column(schema: "pa.Schema", path: Path) -> tuple[str, bool]:
    """The column that holds the images, and whether it is a struct with the bytes inside."""
    import pyarrow as pa

    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            kind = kind.field("bytes").type if nested else kind
            if not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
                raise UnreadableError(f"{path}: column {name!r} must hold encoded images as bytes, found {kind}")
            return name, nested
    raise UnreadableError(
        f"{path} has no image column ({' or '.join(IMAGE_COLUMNS)}); its columns are {', '.join(schema.names)}"
    )


def _class_names(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """The names the hub writes into the schema, or none if they are not there in the form it writes."""
    try:
        features: Any = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(str(name) for name in features[LABEL_COLUMN]["names"])
    except (KeyError, TypeError, ValueError):
        return ()


def _is_glob(path: Path) -> bool:
    return any(sign in str(path) for sign in "*?[") and not path.exists()


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise UnreadableError(f"there is no file {path}") from None
    except (pa.ArrowException, OSError, MemoryError) as error:
        raise UnreadableError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from error
