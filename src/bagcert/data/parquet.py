"""Images in Parquet shards, in the layout of the Hugging Face hub: an image column and a label column.

Reads with pyarrow, without a cache: 10,000 small images take about a second.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Int64

from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo, read_image
from bagcert.data.shards import CachingSource, Shard, find_shards, is_glob, open_shard, reading, state_of
from bagcert.errors import CONTROL, UnreadableError, sanitize

if TYPE_CHECKING:
    import pyarrow as pa

IMAGE_COLUMNS = ("image", "img")
FORM = "Parquet"
LABEL_COLUMN = "label"
CACHE_BYTES = 1 << 30  # encoded row groups are cached in memory up to this size. The row group in use is always kept.
MAX_ROWS = 50_000_000
"""Limit on the number of rows, checked before the labels are read: equal labels compress to almost nothing."""
MAX_ROW_GROUP_BYTES = 1 << 32
"""Limit on the encoded images of a row group, which is read as a whole and may be compressed to almost nothing."""
MAX_CLASSES = 100_000  # limit on the number of classes: each label up to the largest one gets a class name
MAX_NAME_LENGTH = 1000
READ_ROWS = 256  # number of rows to read between checks of a row group's size


def is_parquet(path: Path) -> bool:
    """Returns whether a path is a Parquet file, a glob, or a folder with Parquet files."""
    return is_glob(path) or path.suffix == ".parquet" or (path.is_dir() and any(path.glob("*.parquet")))


def load_parquet(path: Path, split: str = "test") -> ImageSet:
    """Loads images and labels of Parquet shards, in the order of the file names.

    Columns: `image` or `img`, a struct with `bytes` (as on the hub) or plain bytes, encoded in any common format;
    `label`, an integer. Class names come from the schema metadata of the hub, or are "0", "1", ...

    Args:
        path: a folder with `<split>-*.parquet` or `<split>.parquet`; or a file or a glob, whose images are all used
            for any split.

    Raises:
        UnreadableError: no such file, or a file that is truncated, not Parquet, or has missing columns, no rows, or
            labels that are missing or outside the classes.
        UsageError: the folder has no such split.
    """
    files, split = find_shards(path, split, ".parquet")
    return parquet_images(str(path), split, files)


def parquet_images(name: str, split: str, files: Sequence[Shard]) -> ImageSet:
    """Loads the images of local or remote Parquet shards, see `load_parquet`."""
    shards = _Shards(files)
    labels = np.concatenate(shards.labels)
    largest = int(labels.max(initial=0))
    if largest >= MAX_CLASSES:
        raise UnreadableError(f"{name} has the label {largest}; labels must be 0 to {MAX_CLASSES - 1:,}")
    names = shards.class_names or tuple(str(label) for label in range(largest + 1))
    return ImageSet(name, split, labels, names, shards)


class _Shards(CachingSource):
    """Image source over several Parquet files. Row groups are read on demand and cached."""

    def __init__(self, files: Sequence[Shard]) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        super().__init__(CACHE_BYTES)
        self.labels: list[np.ndarray] = []
        self.class_names: tuple[str, ...] = ()
        self._groups: list[tuple[Shard, int]] = []
        self._state: dict[Shard, tuple[int, int | str]] = {}
        sizes = []
        for path in files:
            with reading(path, FORM), open_shard(path) as raw, pq.ParquetFile(raw) as file:
                self._state[path] = state_of(raw)
                schema = file.schema_arrow
                image_column(schema, path)
                if LABEL_COLUMN not in schema.names or not pa.types.is_integer(schema.field(LABEL_COLUMN).type):
                    raise UnreadableError(
                        f"{path} has no integer column {LABEL_COLUMN!r}; its columns are "
                        + sanitize(", ".join(f"{field.name} ({field.type})" for field in schema))
                    )
                rows = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                sizes += rows
                if min(rows, default=0) < 0 or sum(sizes) > MAX_ROWS:
                    raise UnreadableError(f"{path} makes the data {sum(sizes):,} rows long, more than {MAX_ROWS:,}")
                labels = file.read([LABEL_COLUMN])[LABEL_COLUMN]
                if labels.null_count or len(labels) != sum(rows):
                    missing = labels.null_count + sum(rows) - len(labels)
                    raise UnreadableError(f"{path}: {missing} of {sum(rows)} labels are missing")
                self.labels.append(labels.to_numpy().astype(np.int64))
                self.class_names = self.class_names or class_names_of(schema.metadata)
                self._groups += [(path, group) for group in range(file.num_row_groups)]
        self._ends = np.cumsum(sizes, dtype=np.int64)

    def __call__(self, row: int) -> Photo:
        """Returns the image with this number."""
        group = int(np.searchsorted(self._ends, row, side="right"))
        path, number = self._groups[group]
        row -= int(self._ends[group - 1]) if group else 0
        name = f"{path} row {row}" + (f" of row group {number}" if number else "")
        encoded = self.cached_block(group)[row].as_py()
        if not isinstance(encoded, bytes):
            raise UnreadableError(f"{name} has no image bytes")
        return read_image(encoded, name)

    def block_of(self, rows: Int64[np.ndarray, " images"]) -> Int64[np.ndarray, " images"]:
        """Returns the row group of each image, numbered over all files."""
        return np.searchsorted(self._ends, rows, side="right").astype(np.int64)

    def read_block(self, block: int) -> "pa.ChunkedArray":
        """Reads the encoded images of a row group."""
        path, number = self._groups[block]
        with reading(path, FORM), open_shard(path) as raw:
            if state_of(raw) != self._state[path]:
                raise UnreadableError(f"{path} was changed while it was in use")
            images = read_group(raw, path, number)
            if len(images) != self._ends[block] - (self._ends[block - 1] if block else 0):
                raise UnreadableError(f"{path}: row group {number} holds {len(images)} images, not one per row")
        return images

    def size_of(self, content: "pa.ChunkedArray") -> int:
        """Returns the size of a row group in bytes, in which repeated images count once."""
        return content.nbytes

    def fingerprint(self) -> bytes:
        """Returns a hash of the names, sizes and modification times of the files when they were opened."""
        return repr([(str(path).rsplit("/", 1)[-1], *state) for path, state in self._state.items()]).encode()


def read_group(raw: Any, path: Shard, number: int) -> "pa.ChunkedArray":
    """Reads the encoded images of a row group.

    Reads a dictionary of distinct values, so that a value repeated a million times is stored once.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    with pq.ParquetFile(raw) as file:
        column, nested = image_column(file.schema_arrow, path)
        name = f"{column}.bytes" if nested else column
    chunks, size = [], 0
    with pq.ParquetFile(raw, read_dictionary=[name]) as file:
        for batch in file.iter_batches(READ_ROWS, [number], [name]):
            # pyarrow returns a struct with a single field, which holds the bytes.
            images = batch.column(0).field(0) if nested else batch.column(0)
            chunks.append(images)
            size += images.nbytes
            if size > MAX_ROW_GROUP_BYTES:
                raise UnreadableError(
                    f"{path}: row group {number} holds more than {MAX_ROW_GROUP_BYTES:,} bytes of images"
                )
    found = pa.chunked_array(chunks, chunks[0].type if chunks else pa.binary())
    found.validate(full=True)  # the file's dictionary indices are untrusted
    return found


def image_column(schema: "pa.Schema", path: Shard) -> tuple[str, bool]:
    """Returns the name of the image column, and whether it is a struct that contains the bytes."""
    import pyarrow as pa

    for name in IMAGE_COLUMNS:
        if name in schema.names:
            kind = schema.field(name).type
            nested = pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            kind = kind.field("bytes").type if nested else kind
            if not pa.types.is_binary(kind) and not pa.types.is_large_binary(kind):
                raise UnreadableError(
                    f"{path}: column {name!r} must hold encoded images as bytes, found {sanitize(kind)}"
                )
            return name, nested
    raise UnreadableError(
        f"{path} has no image column ({' or '.join(IMAGE_COLUMNS)}); its columns are "
        f"{sanitize(', '.join(schema.names))}"
    )


def class_names_of(metadata: dict[bytes, bytes] | None) -> tuple[str, ...]:
    """Reads the class names that the hub writes into the schema. Empty if they are absent or of another format."""
    try:
        features: Any = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        names = features[LABEL_COLUMN]["names"]
    except (LookupError, TypeError, ValueError, RecursionError):
        return ()
    usable = isinstance(names, list) and len(names) <= MAX_CLASSES
    if not usable or not all(map(_is_name, names)):
        return ()
    return tuple(names)


def _is_name(name: object) -> bool:
    return isinstance(name, str) and len(name) <= MAX_NAME_LENGTH and not CONTROL.search(name)
