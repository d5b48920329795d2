"""ImageSet: lazy reading, subsets, fixed splits, class weights."""

import threading
import time
from dataclasses import replace

import numpy as np
import pytest

from bagcert.data import ImageSet
from bagcert.data.image_set import QUICK, ArraySource, in_threads
from bagcert.data.photo import Photo
from bagcert.data.preprocess import Preprocessing
from bagcert.errors import UnreadableError, UsageError
from tests import refused, tiny


def _set(counts: tuple[int, ...] = (30, 20, 10)) -> ImageSet:
    labels = np.repeat(np.arange(len(counts)), counts)
    labels = np.random.default_rng(5).permutation(labels)
    pixels = np.random.default_rng(0).integers(0, 256, (len(labels), 4, 6, 3), dtype=np.uint8)
    return ImageSet("toy", "test", labels, tuple("abcdef"[: len(counts)]), ArraySource(pixels, "toy"))


def test_reading_follows_the_indices() -> None:
    images = _set()
    photos = images.read([3, 1, 3])
    np.testing.assert_array_equal([photo.pixels for photo in photos], images.array()[[3, 1, 3]])
    assert photos[0].source == "toy image 3"
    assert images.read([]) == []
    assert images.array() is images.array()


def test_subsets_keep_images_and_labels_together() -> None:
    images = _set()
    chosen = images.subset([7, 5, 50]).subset(np.array([2, 0]))
    np.testing.assert_array_equal(chosen.array(), images.array()[[50, 7]])
    np.testing.assert_array_equal(chosen.labels, images.labels[[50, 7]])
    assert chosen.class_names == images.class_names


def test_take_reads_no_more_than_it_takes() -> None:
    images, read = _set(), []

    def source(row: int) -> Photo:
        read.append(row)
        return images.source(row)

    few = ImageSet("toy", "test", images.labels, images.class_names, source).take(5)
    assert len(few) == 5
    assert few.array().shape == (5, 4, 6, 3)
    assert set(read) == set(range(5))
    assert images.take(None) is images
    assert len(images.take(10_000)) == 60
    refused(UsageError, "at least 1 image, got 0", images.take, 0)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.25, 1 / 3, 0.5, 0.9])
def test_splits_are_disjoint_complete_stratified_and_fixed(fraction: float) -> None:
    images = _set((301, 57, 10))
    rest, held = images.split_off(fraction, seed=3)
    assert len(held) == round(fraction * len(images))
    assert sorted([*rest.rows, *held.rows]) == list(range(len(images)))
    assert list(rest.rows) == sorted(rest.rows)
    assert (rest.split, held.split) == ("test", "validation")
    counts = np.bincount(held.labels, minlength=3)
    assert (np.abs(counts - fraction * np.array([301, 57, 10])) <= 1).all()
    again = images.split_off(fraction, seed=3)[1]
    np.testing.assert_array_equal(held.rows, again.rows)
    assert list(held.rows) != list(images.split_off(fraction, seed=4)[1].rows)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1, 1.5, 0.001, 0.999, float("nan")])
def test_a_split_leaves_no_part_empty(fraction: float) -> None:
    refused(UsageError, "leaves one part empty", _set().split_off, fraction)


def test_class_weights_are_inverse_frequencies_of_mean_one() -> None:
    weights = _set((30, 20, 10)).class_weights()
    np.testing.assert_allclose(weights * [30, 20, 10], (weights * [30, 20, 10])[0], rtol=1e-6)
    assert weights.mean() == pytest.approx(1)
    np.testing.assert_allclose(_set((10, 0, 10)).class_weights(), [1, 0, 1])


def test_arrays_need_one_size_or_a_preparation() -> None:
    sizes, labels = [(4, 4), (4, 4), (5, 4)], np.zeros(3, dtype=np.int64)
    images = ImageSet(
        "odd", "test", labels, ("a",), lambda row: Photo(np.full((*sizes[row], 3), row, np.uint8), source=f"f{row}")
    )
    refused(UsageError, "f2 has 5x4 px, f0 has 4x4 px", images.array)
    assert images.array(Preprocessing((3, 3)).apply)[:, 0, 0, 0].tolist() == [0, 1, 2]
    turned = ImageSet("odd", "test", labels[:1], ("a",), lambda row: Photo(np.zeros((4, 4, 3), np.uint8), 6, "f"))
    refused(UsageError, "EXIF orientation", turned.array)


def test_unreadable_images_are_raised_or_collected() -> None:
    def source(row: int) -> Photo:
        if row % 2:
            raise UnreadableError(f"f{row} is broken")
        return Photo(np.zeros((4, 4, 3), np.uint8))

    images = ImageSet("some", "test", np.zeros(200, dtype=np.int64), ("a",), source)
    refused(UnreadableError, "f1 is broken", images.read, range(200))
    refused(UnreadableError, "f1 is broken", images.array)
    found = images.read_each(range(200))
    assert sum(isinstance(each, UnreadableError) for each in found) == 100
    assert str(found[7]) == "f7 is broken"


def test_bad_sets_are_refused() -> None:
    images = _set()
    refused(UsageError, "images 0 to 59, got index 60", images.read, [0, 60])
    refused(UsageError, "got index -1", images.subset, [-1])
    refused(UnreadableError, "has no images", images.subset, [])
    with pytest.raises(UnreadableError, match=r"image 1 has label 3, but labels must be 0 to 1 \(1 of 2"):
        ImageSet("x", "test", np.array([0, 3]), ("a", "b"), images.source)
    with pytest.raises(UnreadableError, match="image 0 has label -1"):
        ImageSet("x", "test", np.array([-1, 0]), ("a", "b"), images.source)


def test_the_fingerprint_is_of_labels_classes_and_pixels() -> None:
    images = tiny.image_set(6)
    same = images.fingerprint()
    assert tiny.image_set(6).fingerprint() == same
    others = [
        tiny.image_set(6, seed=1),
        tiny.image_set(6, tint=61),
        tiny.image_set(7),
        replace(images, labels=images.labels[::-1].copy()),
        replace(images, class_names=("a", "b", "c")),
        images.subset([0, 1, 2, 3, 5, 4]),
    ]
    assert len({same, *(each.fingerprint() for each in others)}) == 1 + len(others)


def test_each_image_is_prepared_where_it_is_read() -> None:
    def source(row: int) -> Photo:
        if row == 3:
            raise UnreadableError("no image 3")
        return tiny.image_set(6).source(row)

    images = replace(tiny.image_set(6), source=source)
    found = images.prepare_each([5, 3, 0], lambda photo: photo.pixels.sum())
    expected = tiny.image_set(6).array().sum((1, 2, 3))
    assert [found[0], found[2]] == [expected[5], expected[0]]
    assert isinstance(found[1], UnreadableError)


@pytest.mark.parametrize("count", [1, 2, 7, 200])
@pytest.mark.parametrize("slow_from", [0, 3, 1000])
def test_what_is_slow_is_shared_among_threads_in_order(count, slow_from):
    threads = set()

    def work(index):
        threads.add(threading.current_thread())
        if index >= slow_from:
            time.sleep(2 * QUICK)
        return index

    assert in_threads(work, np.arange(count)) == list(range(count))
    if count > slow_from + 2:  # the first slow one is done here, and a last one needs no thread
        assert threads > {threading.main_thread()}
