"""Division of a data source into parts, in a fixed order. A part is the unit of work that is repeated after a failure.

Listing reads only the names of image files and the footers of Parquet files.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from bagcert.data.image_set import in_threads
from bagcert.data.parquet import FORM, LABEL_COLUMN, MAX_ROWS, class_names_of, image_column, read_group
from bagcert.data.photo import Photo, read_image
from bagcert.data.remote import is_address
from bagcert.data.shards import reading
from bagcert.data.storage import Stored, list_files, opened, read_photo, state_of
from bagcert.errors import BagcertError, UnreadableError, UsageError

PhotoOrError = Photo | UnreadableError


@dataclass(frozen=True)
class Part:
    """Consecutive images: either some files, or some rows of one Parquet file.

    Attributes:
        number: 0, 1, 2, ... within the run.
        first: the number of its first image within the run.
        files: image files; empty for rows of a Parquet file.
        shard: the Parquet file, as listed; None for image files.
    """

    number: int
    first: int
    files: tuple[str, ...] = ()
    shard: Stored | None = None
    start: int = 0
    stop: int = 0

    def __len__(self) -> int:
        """How many images."""
        return len(self.files) or self.stop - self.start

    @property
    def remote(self) -> bool:
        """Returns whether the part is read over a network."""
        return is_address(self.files[0] if self.shard is None else self.shard.path)

    def sources(self) -> list[str]:
        """Returns the name of each image: its file, or `file.parquet#row`."""
        if self.shard is None:
            return list(self.files)
        return [f"{self.shard.path}#{row}" for row in range(self.start, self.stop)]


@dataclass(frozen=True)
class Work:
    """All parts of a run.

    Attributes:
        fingerprint: a hash of the names and states of all files.
        class_names: class names in the Parquet files; empty if there are none.
    """

    parts: tuple[Part, ...]
    fingerprint: str
    class_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        """How many images."""
        return self.parts[-1].first + len(self.parts[-1])


def list_work(data: str, part_size: int, limit: int | None = None) -> Work:
    """Lists the parts of a data source.

    Args:
        data: as in `bagcert.data.storage.list_files`.
        limit: use the first `limit` images only; Parquet files beyond them are not opened.

    Raises:
        UnreadableError: no images, or a Parquet file that is invalid or has no images.
        UsageError: a part size or limit below 1, or Parquet files with different class names.
    """
    if part_size < 1 or (limit is not None and limit < 1):
        raise UsageError(f"a part size and a limit must be at least 1 image, got {part_size} and {limit}")
    digest, names = hashlib.sha256(), None
    parts: list[Part] = []
    files: list[str] = []
    left = float("inf") if limit is None else limit
    done = 0

    def close() -> None:
        nonlocal done
        if files:
            parts.append(Part(len(parts), done, tuple(files)))
            done += len(files)
            files.clear()

    for stored in list_files(data):
        if not left:
            break
        digest.update(repr((stored.path, stored.state)).encode())
        if not stored.is_shard:
            files.append(stored.path)
            left -= 1
            if len(files) == part_size:
                close()
            continue
        close()
        rows, named = _footer(stored)
        if names not in (None, named):
            raise UsageError(f"the labels in {stored.path} have other names than those of the files before it")
        names, rows = named, int(min(rows, left))
        left -= rows
        for start in range(0, rows, part_size):
            parts.append(Part(len(parts), done, (), stored, start, min(start + part_size, rows)))
            done += len(parts[-1])
    close()
    if not parts:
        raise UnreadableError(f"the Parquet files of {data} have no rows")
    return Work(tuple(parts), digest.hexdigest(), names or ())


class PartReader:
    """Reads parts. Caches the last row group, for consecutive parts that share it."""

    def __init__(self) -> None:
        self._kept: tuple[Stored, int, list[bytes | None], list[int | None]] | None = None
        self._sizes: tuple[Stored, list[int]] | None = None

    def read(self, part: Part, prepare: Callable[[PhotoOrError], object]) -> tuple[list, list[int | None]]:
        """Reads the images of a part in threads and applies `prepare` to each; returns them (or errors) and the labels.

        Raises:
            BagcertError: the store does not respond, or a Parquet file changed after it was listed.
        """
        if part.shard is None:

            def load(index: int) -> PhotoOrError:
                return _or_error(lambda: read_photo(part.files[index]))

            labels: list[int | None] = [None] * len(part)
        else:
            sources = part.sources()
            try:
                encoded, labels = self._rows(part.shard, part.start, part.stop)
            except UnreadableError as error:
                lost = error  # Python deletes `error` at the end of this clause
                # A missing or changed file ends the run; a broken one only gives its own rows an error.
                if state_of(part.shard.path) != part.shard.state:
                    raise BagcertError(f"{part.shard.path} was changed while it was in use") from None

                def load(index: int) -> PhotoOrError:
                    return lost

                labels = [None] * len(part)
            else:

                def load(index: int) -> PhotoOrError:
                    content = encoded[index]
                    if content is None:
                        return UnreadableError(f"{sources[index]} has no image bytes")
                    return _or_error(lambda: read_image(content, sources[index]))

        return in_threads(lambda index: prepare(load(index)), np.arange(len(part))), labels

    def _rows(self, shard: Stored, start: int, stop: int) -> tuple[list[bytes | None], list[int | None]]:
        images: list[bytes | None] = []
        labels: list[int | None] = []
        if self._sizes is None or self._sizes[0] != shard:
            with reading(shard.path, FORM), opened(shard.path) as raw, pq.ParquetFile(raw) as file:
                self._sizes = shard, _sizes(file, shard)
        for group, first, last in _groups(self._sizes[1], start, stop):
            if self._kept is None or self._kept[:2] != (shard, group):
                self._kept = None  # before the next takes its memory
                self._kept = (shard, group, *_read_rows(shard, group))
            images += self._kept[2][first:last]
            labels += self._kept[3][first:last]
        if len(images) != stop - start:
            raise UnreadableError(f"{shard.path} holds {len(images)} images in rows {start} to {stop - 1}")
        return images, labels


def _or_error(read: Callable[[], Photo]) -> PhotoOrError:
    try:
        return read()
    except UnreadableError as error:
        return error


def _footer(shard: Stored) -> tuple[int, tuple[str, ...]]:
    with reading(shard.path, FORM), opened(shard.path) as raw, pq.ParquetFile(raw) as file:
        image_column(file.schema_arrow, shard.path)
        sizes = _sizes(file, shard)
        return sum(sizes), class_names_of(file.schema_arrow.metadata)


def _sizes(file: pq.ParquetFile, shard: Stored) -> list[int]:
    sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    if min(sizes, default=0) < 0 or sum(sizes) > MAX_ROWS:
        raise UnreadableError(f"{shard.path} has {sum(sizes):,} rows, more than {MAX_ROWS:,} in one file")
    return sizes


def _groups(sizes: list[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Iterates over the row groups of rows start to stop, as (row group, first row, end row) within the group."""
    begin = 0
    for group, size in enumerate(sizes):
        if begin < stop and start < begin + size:
            yield group, max(start - begin, 0), min(stop - begin, size)
        begin += size


def _read_rows(shard: Stored, group: int) -> tuple[list[bytes | None], list[int | None]]:
    """Reads encoded images and labels of a row group. Repeated values are stored once."""
    with reading(shard.path, FORM), opened(shard.path) as raw:
        if state_of(shard.path) != shard.state:
            raise UnreadableError(f"{shard.path} was changed while it was in use")
        chunks = read_group(raw, shard.path, group).chunks
    images: list[bytes | None] = []
    for chunk in chunks:
        if isinstance(chunk, pa.DictionaryArray):
            distinct = chunk.dictionary.to_pylist()
            images += [None if index is None else distinct[index] for index in chunk.indices.to_pylist()]
        else:
            images += chunk.to_pylist()
    with reading(shard.path, FORM), opened(shard.path) as raw, pq.ParquetFile(raw) as file:
        schema = file.schema_arrow
        if LABEL_COLUMN not in schema.names or not pa.types.is_integer(schema.field(LABEL_COLUMN).type):
            return images, [None] * len(images)
        labels = file.read_row_group(group, columns=[LABEL_COLUMN])[LABEL_COLUMN].to_pylist()
    if len(labels) != len(images):
        raise UnreadableError(f"{shard.path}: row group {group} holds {len(images)} images and {len(labels)} labels")
    return images, labels
