"""ImageSet: the common interface of all datasets. Images are decoded on access."""

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
"""Seconds. Images that take longer to read are read in threads."""


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, labels and class names of one split, in a fixed order.

    Attributes:
        name: the dataset, as the user wrote it.
        split: the split; "all" for data without splits.
        labels: int64 [images], indices into `class_names`.
        source: image number -> Photo; called from several threads.
        rows: int64 [images], the image number to pass to `source`; None for 0, 1, 2, ...
        notes: remarks to print with every result on these images, such as that they are a sample.

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
        """Returns the number of images."""
        return len(self.labels)

    def read(self, indices: Sequence[int] | np.ndarray) -> list[Photo]:
        """Reads the images with these indices in parallel.

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
        """Like `read`, but returns the error in place of each image that cannot be read."""
        return self.prepare_each(indices, lambda photo: photo)

    def prepare_each(
        self, indices: Sequence[int] | np.ndarray, prepare: Callable[[Photo], Prepared]
    ) -> list[Prepared | UnreadableError]:
        """Reads images and applies `prepare` to each. At most one unprepared image per thread is in memory."""

        def one(index: int) -> Prepared | UnreadableError:
            photo = self._read_one(index)
            return photo if isinstance(photo, UnreadableError) else prepare(photo)

        return in_threads(one, self._checked(indices))

    def array(
        self, prepare: Callable[[Photo], np.ndarray] | None = None
    ) -> UInt8[np.ndarray, "images height width rgb"]:
        """Reads all images into one array. Without `prepare`, the result is cached.

        Args:
            prepare: Photo -> uint8 [height, width, 3], such as `Preprocessing.apply`, for images of various sizes.

        Raises:
            UsageError: the images differ in size or have an EXIF rotation, and there is no `prepare`.
            UnreadableError: the first image that cannot be read.
        """
        return self._array if prepare is None else self._stack(prepare)

    def require_classes(self) -> None:
        """Checks that a classifier can be trained on the set.

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
        """Returns the name of a photo within this set: its path relative to the data folder, or its source."""
        return photo.source.removeprefix(self.name).lstrip("/\\ ") or photo.source

    def take(self, limit: int | None) -> "ImageSet":
        """Returns a subset of at most `limit` images; all images for None.

        If the images are sorted by class, as in class folders, the subset is a stratified random sample with seed 0.
        Otherwise it is the first images, as for CIFAR-10, whose order is already random. The order of the set is kept.
        The notes of the subset say how it was chosen.

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
        """Returns whether there are several classes and the images are sorted by class."""
        changes = int(np.count_nonzero(np.diff(self.labels)))
        return changes > 0 and changes == len(np.unique(self.labels)) - 1

    def subset(self, indices: Sequence[int] | np.ndarray) -> "ImageSet":
        """Returns the subset with these indices, in this order.

        Raises:
            UsageError: an index outside the set.
            UnreadableError: no indices.
        """
        chosen = self._checked(indices)
        return replace(self, labels=self.labels[chosen], rows=self._rows[chosen])

    def split_off(self, fraction: float, seed: int = 0) -> "tuple[ImageSet, ImageSet]":
        """Splits the set into (rest, validation), stratified and deterministic for a given seed.

        The validation part holds round(fraction * images) images. The number of images per class is proportional up to
        one image. Both parts keep the order of the set.

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
        """Draws a stratified random sample of `count` images, as a boolean mask [images]."""
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
        """Returns inverse class frequencies, float32 [classes], with mean 1 over present classes; 0 for absent ones."""
        counts = np.bincount(self.labels, minlength=len(self.class_names))
        inverse = np.divide(1.0, counts, out=np.zeros(len(counts)), where=counts > 0)
        return (inverse / inverse[counts > 0].mean()).astype(np.float32)

    def fingerprint(self) -> str:
        """Returns a hash of labels, classes and image files or pixels, which changes if the images do.

        Files contribute their name, size and modification time; they are not read. A source without a fingerprint
        contributes nothing.
        """
        digest = hashlib.sha256(repr((self.class_names, self.labels.tolist(), self._rows.tolist())).encode())
        describe = getattr(self.source, "fingerprint", None)
        digest.update(describe() if describe else b"")
        return digest.hexdigest()

    def blocks(self) -> Int64[np.ndarray, " images"]:
        """Returns for each image the number of the block it is stored in; one block per image if there are none."""
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
    """Image source over decoded images, uint8 [images, height, width, 3]."""

    pixels: UInt8[np.ndarray, "images height width rgb"]
    name: str

    def __call__(self, row: int) -> Photo:
        """Returns the image with this number."""
        return Photo(self.pixels[row], source=f"{self.name} image {row}")

    def fingerprint(self) -> bytes:
        """Returns a hash of the pixels."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels).data).digest()


def as_stored(photo: Photo) -> np.ndarray:
    """Returns the pixels of an upright photo.

    Raises:
        UsageError: the photo has an EXIF rotation.
    """
    if photo.orientation != 1:
        raise UsageError(f"{photo.source} is turned by its EXIF orientation; turn it upright with `array(prepare)`")
    return photo.pixels


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[0]}x{pixels.shape[1]}"


def in_threads(function: Callable, indices: np.ndarray) -> list:
    """Maps a function over indices, in threads if it is slow. The image decoders release the GIL.

    Functions that take less than QUICK run in the calling thread: for small images, threads mostly wait for the GIL.
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
    # Few images may be large images: one task each.
    chunks = [rest[start : start + _CHUNK] for start in range(0, len(rest), _CHUNK)] if len(rest) > _CHUNK else rest
    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        found = pool.map(lambda chunk: [function(int(i)) for i in np.atleast_1d(chunk)], chunks)
        return done + list(chain.from_iterable(found))
