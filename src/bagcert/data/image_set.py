"""ImageSet: what every dataset is to the rest of the package. Images are decoded when they are asked for."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain
from typing import TypeVar

import numpy as np
from jaxtyping import Float, Int64, UInt8

from bagcert.data.photo import Photo
from bagcert.errors import UnreadableError, UsageError

Prepared = TypeVar("Prepared")

_CHUNK = 64
SAMPLE_SEED = 0
QUICK = 1e-3
"""Seconds: what takes longer is worth a thread."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, labels and class names of one split, in a fixed order.

    Attributes:
        name: the dataset, as the user wrote it.
        split: which part of it; "all" where it has no parts.
        labels: int64 [images], indices into `class_names`.
        class_names: one per class.
        source: image number -> Photo; called from several threads.
        rows: int64 [images], the number under which `source` knows each image; None for 0, 1, 2, ...
        notes: sentences that belong to every figure of these images, such as that they are a sample.

    Raises:
        UnreadableError: no image, or a label outside the classes.
    """

    name: str
    split: str
    labels: Int64[np.ndarray, " images"]
    class_names: tuple[str, ...]
    source: Callable[[int], Photo]
    rows: Int64[np.ndarray, " images"] | None = None
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.labels):
            raise UnreadableError(f"{self.name} has no images in split {self.split!r}")
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.class_names)))
        if len(outside):
            raise UnreadableError(
                f"{self.name}: image {outside[0]} has label {self.labels[outside[0]]}, but labels must be 0 to "
                f"{len(self.class_names) - 1} ({len(outside)} of {len(self.labels)} are not)"
            )

    def __len__(self) -> int:
        """How many images."""
        return len(self.labels)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Photo]:
        """The images with these indices, decoded in parallel.

        Raises:
            UnreadableError: the first image that cannot be read.
            UsageError: an index outside the set.
        """
        photos: list[Photo] = []
        for photo in self.read_each(indices):
            if isinstance(photo, UnreadableError):
                raise photo
            photos.append(photo)
        return photos

    def read_each(self, indices: Sequence[int] | np.ndarray) -> list[Photo | UnreadableError]:
        """Like `read`, with the error in place of each image that cannot be read."""
        return self.prepare_each(indices, lambda photo: photo)

    def prepare_each(
        self, indices: Sequence[int] | np.ndarray, prepare: Callable[[Photo], Prepared]
    ) -> list[Prepared | UnreadableError]:
        """What `prepare` makes of each image; no more images are held as they are stored than there are threads."""

        def one(index: int) -> Prepared | UnreadableError:
            photo = self._read_one(index)
            return photo if isinstance(photo, UnreadableError) else prepare(photo)

        return in_threads(one, self._checked(indices))

    def array(
        self, prepare: Callable[[Photo], np.ndarray] | None = None
    ) -> UInt8[np.ndarray, "images height width rgb"]:
        """All images in one array; without `prepare` the result is kept for the next call.

        Args:
            prepare: Photo -> uint8 [height, width, 3], such as `Preprocessing.apply`, for images of various sizes.

        Raises:
            UsageError: the images differ in size or are turned by EXIF, and there is no `prepare`.
            UnreadableError: the first image that cannot be read.
        """
        return self._array if prepare is None else self._stack(prepare)

    def require_classes(self) -> None:
        """Refuses what no classifier can be trained on.

        Raises:
            UnreadableError: there is only one class.
        """
        if len(self.class_names) < 2:
            raise UnreadableError(
                f"{self.name} has one class, {self.class_names[0]!r}, and a classifier needs at least two; images are "
                f"looked for in {self.name}/CLASS/ and {self.name}/SPLIT/CLASS/, so give the folder that holds the "
                "class folders, or sort the images into one folder for each class"
            )

    def named(self, photo: Photo) -> str:
        """What a photo is called within this set: the path of its file below the folder, or else its source."""
        return photo.source.removeprefix(self.name).lstrip("/\\ ") or photo.source

    def take(self, limit: int | None) -> "ImageSet":
        """A part of at most `limit` images, or all with None or a limit beyond the end.

        Where the images come one class after the other, as those of class folders do, these are drawn at random with
        seed 0: of each class its share, up to one image. Otherwise they are the first, as in CIFAR-10, whose order is
        random already. The part keeps the order of the set, and its notes say how it was chosen.

        Raises:
            UsageError: limit < 1.
        """
        if limit is None:
            return self
        if limit < 1:
            raise UsageError(f"a limit must be at least 1 image, got {limit}")
        if limit >= len(self):
            return self
        if not self.is_grouped:
            note = f"the first {limit:,} of {len(self):,} images"
            return replace(self.subset(np.arange(limit)), notes=(*self.notes, note))
        found = self.subset(np.flatnonzero(self._sampled(limit, SAMPLE_SEED)))
        classes = [len(np.unique(labels)) for labels in (found.labels, self.labels)]
        of_classes = "" if classes[0] == classes[1] else f", of {classes[0]:,} of {classes[1]:,} classes"
        note = (
            f"a sample: {limit:,} of {len(self):,} images{of_classes}, drawn in proportion to the classes "
            f"with seed {SAMPLE_SEED}"
        )
        return replace(found, notes=(*self.notes, note))

    @property
    def is_grouped(self) -> bool:
        """Whether there are several classes and the images of each follow one another."""
        changes = int(np.count_nonzero(np.diff(self.labels)))
        return changes > 0 and changes == len(np.unique(self.labels)) - 1

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """The images with these indices, in this order.

        Raises:
            UsageError: an index outside the set.
            UnreadableError: no index at all.
        """
        chosen = self._checked(indices)
        return replace(self, labels=self.labels[chosen], rows=self._rows[chosen])

    def split_off(self, fraction: float, seed: int = 0) -> "tuple[ImageSet, ImageSet]":
        """The set in two parts, (rest, validation), the same for the same seed.

        The validation part holds round(fraction * images) of the images, and of each class that share of its images
        up to one. Both parts keep the order of the set.

        Raises:
            UsageError: a fraction that leaves one part empty.
        """
        held = round(fraction * len(self)) if 0 < fraction < 1 else 0
        if not 0 < held < len(self):
            raise UsageError(f"a fraction of {fraction} of {len(self)} images leaves one part empty")
        validation = self._sampled(held, seed)
        rest = self.subset(np.flatnonzero(~validation))
        return rest, replace(self.subset(np.flatnonzero(validation)), split="validation")

    def _sampled(self, count: int, seed: int) -> np.ndarray:
        """Boolean [images]: `count` images drawn at random, of each class its share up to one."""
        random = np.random.default_rng(seed)
        order = random.permutation(len(self))
        # Spread every class evenly over (0, 1); the lowest share of the whole is then a share of every class.
        position = np.empty(len(self))
        for label in range(len(self.class_names)):
            members = order[self.labels[order] == label]
            position[members] = (np.arange(len(members)) + random.random()) / max(len(members), 1)
        chosen = np.zeros(len(self), dtype=bool)
        chosen[np.argsort(position, kind="stable")[:count]] = True
        return chosen

    def class_weights(self) -> Float[np.ndarray, " classes"]:
        """Float32 [classes]: inverse class frequencies with mean 1 over the classes present; 0 for those absent."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        inverse = np.divide(1.0, counts, out=np.zeros(len(counts)), where=counts > 0)
        return (inverse / inverse[counts > 0].mean()).astype(np.float32)

    def fingerprint(self) -> str:
        """A hash that changes when the images do: of labels, classes, and the files or pixels the source reads.

        Files count with name, size and time of change; they are not read. A source that does not say what it reads
        counts with nothing.
        """
        digest = hashlib.sha256(repr((self.class_names, self.labels.tolist(), self._rows.tolist())).encode())
        describe = getattr(self.source, "fingerprint", None)
        digest.update(describe() if describe else b"")
        return digest.hexdigest()

    def blocks(self) -> Int64[np.ndarray, " images"]:
        """For each image the number of the block it is read with; a block of its own where the source knows none."""
        block_of = getattr(self.source, "block_of", None)
        return self._rows if block_of is None else block_of(self._rows)

    @cached_property
    def _rows(self) -> np.ndarray:
        return np.arange(len(self)) if self.rows is None else self.rows

    @cached_property
    def _array(self) -> np.ndarray:
        return self._stack(as_stored)

    def _stack(self, prepare: Callable[[Photo], np.ndarray]) -> np.ndarray:
        first = self.read([0])[0]
        stack = np.empty((len(self), *prepare(first).shape), dtype=np.uint8)

        def fill(index: int) -> UnreadableError | None:
            photo = self._read_one(index)
            if isinstance(photo, UnreadableError):
                return photo
            pixels = prepare(photo)
            if pixels.shape != stack.shape[1:]:
                raise UsageError(
                    f"{self.name}: images differ in size: {photo.source} has {_size(pixels)} px, {first.source} has "
                    f"{_size(stack[0])} px; bring them to one size with `array(prepare)`"
                )
            stack[index] = pixels
            return None

        for error in in_threads(fill, np.arange(len(self))):
            if error is not None:
                raise error
        return stack

    def _read_one(self, index: int) -> Photo | UnreadableError:
        try:
            return self.source(int(self._rows[index]))
        except UnreadableError as error:
            return error

    def _checked(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        chosen = np.asarray(indices, dtype=np.int64).reshape(-1)
        outside = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(outside):
            raise UsageError(f"{self.name} has images 0 to {len(self) - 1}, got index {outside[0]}")
        return chosen


@dataclass(frozen=True, eq=False)
class ArraySource:
    """Images already decoded: uint8 [images, height, width, 3]."""

    pixels: UInt8[np.ndarray, "images height width rgb"]
    name: str

    def __call__(self, row: int) -> Photo:
        """The image of that number."""
        return Photo(self.pixels[row], source=f"{self.name} image {row}")

    def fingerprint(self) -> bytes:
        """A hash of the pixels."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels).data).digest()


def as_stored(photo: Photo) -> np.ndarray:
    """The pixels of a photo that is upright.

    Raises:
        UsageError: EXIF turns it.
    """
    if photo.orientation != 1:
        raise UsageError(f"{photo.source} is turned by its EXIF orientation; turn it upright with `array(prepare)`")
    return photo.pixels


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"


def in_threads(function: Callable, indices: np.ndarray) -> list:
    """[function(i) for i in indices], on all cores once it is slow; the decoders release the interpreter lock.

    What takes less than QUICK is done here: of small images two threads decode fewer than one, for they wait for the
    interpreter most of the time.
    """
    done: list = []
    for index in indices:
        start = time.perf_counter()
        done.append(function(int(index)))
        if time.perf_counter() - start > QUICK:
            break
    rest = indices[len(done) :]
    if len(rest) <= 1:
        return done + [function(int(index)) for index in rest]
    # Few are perhaps large: one task each.
    chunks = [rest[start : start + _CHUNK] for start in range(0, len(rest), _CHUNK)] if len(rest) > _CHUNK else rest
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        found = pool.map(lambda chunk: [function(int(i)) for i in np.atleast_1d(chunk)], chunks)
        return done + list(chain.from_iterable(found))
