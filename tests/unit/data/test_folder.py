"""Class folders: both layouts, class order over splits, and folders that are none."""

import os
import subprocess
from pathlib import Path

import numpy as np
from PIL import Image

from bagcert.data import load_dataset
from bagcert.data.folder import images_below
from bagcert.errors import UnreadableError, UsageError
from tests import refused


def _image(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((4, 6, 3), value, np.uint8)).save(path)
    return path


def test_class_folders(tmp_path: Path) -> None:
    for number, name in enumerate(["dog/b.png", "dog/a.PNG", "cat/x.bmp", "cat/.hidden.png", ".git/z.png"]):
        _image(tmp_path / name, number)
    (tmp_path / "dog" / "notes.txt").write_text("no image")
    (tmp_path / "readme.md").write_text("no image")
    images = load_dataset(tmp_path, "test")
    assert images.class_names == ("cat", "dog")
    assert images.split == "all"
    assert images.labels.tolist() == [0, 1, 1]
    assert images.array()[:, 0, 0, 0].tolist() == [2, 1, 0]
    assert images.read([0])[0].source == str(tmp_path / "cat" / "x.bmp")


def test_classes_are_those_of_all_splits(tmp_path: Path) -> None:
    for name in ("train/ant/1.png", "train/bee/1.png", "train/cow/1.png", "test/bee/1.png", "test/cow/2.png"):
        _image(tmp_path / name)
    test = load_dataset(str(tmp_path), "test")
    assert test.class_names == ("ant", "bee", "cow")
    assert test.labels.tolist() == [1, 2]
    assert load_dataset(str(tmp_path), "train").labels.tolist() == [0, 1, 2]
    refused(UsageError, "no split 'val'; it has test, train", load_dataset, tmp_path, "val")


def test_a_broken_image_is_named_and_the_limit_can_spare_it(tmp_path: Path) -> None:
    _image(tmp_path / "a" / "1.png")
    broken = tmp_path / "a" / "2.png"
    broken.write_bytes(b"broken")
    loop = tmp_path / "a" / "3.png"
    loop.symlink_to(loop)
    images = load_dataset(tmp_path)
    refused(UnreadableError, r"a/2\.png is not an image", images.read, range(3))
    found = images.read_each(range(3))
    assert [isinstance(each, UnreadableError) for each in found] == [False, True, True]
    assert load_dataset(tmp_path, limit=1).array().shape == (1, 4, 6, 3)


def test_folders_without_classes(tmp_path: Path) -> None:
    refused(UnreadableError, "has no class folders", load_dataset, tmp_path)
    image = _image(tmp_path / "1.png")
    refused(UnreadableError, "has images but no class folders", load_dataset, tmp_path)
    image.unlink()
    (tmp_path / "cat").mkdir()
    refused(UnreadableError, r"\(cat\) hold no images", load_dataset, tmp_path)


def test_loops_of_links_are_not_followed(tmp_path: Path) -> None:
    _image(tmp_path / "cat" / "1.png")
    (tmp_path / "cat" / "again").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert len(load_dataset(tmp_path)) == 1


def test_folders_may_lie_deeper_than_functions_may(tmp_path: Path) -> None:
    deep = tmp_path
    for _ in range(1100):
        deep = deep / "d"
        os.mkdir(deep)
    _image(tmp_path / "1.png")
    os.link(tmp_path / "1.png", deep / "2.png")
    try:
        assert images_below(tmp_path) == [tmp_path / "1.png", deep / "2.png"]
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "d"], check=True)  # shutil does not go that deep


def test_names_of_classes_hold_no_control_characters(tmp_path: Path) -> None:
    _image(tmp_path / "a\x1b[2J" / "1.png")
    refused(UnreadableError, "whose name is no text", load_dataset, tmp_path)


def test_a_pipe_among_the_images_is_not_waited_for(tmp_path: Path) -> None:
    _image(tmp_path / "a" / "1.png")
    os.mkfifo(tmp_path / "a" / "2.png")
    found = load_dataset(tmp_path).read_each([0, 1])
    assert "2.png is not a regular file" in str(found[1]) or "it is not a regular file" in str(found[1])


def test_the_fingerprint_changes_with_the_files(tmp_path: Path) -> None:
    for name in ("1", "2"):
        _image(tmp_path / "a" / f"{name}.png")
    same = load_dataset(tmp_path).fingerprint()
    assert load_dataset(tmp_path).fingerprint() == same
    images = load_dataset(tmp_path)
    os.utime(tmp_path / "a" / "1.png", ns=(5, 5))
    assert load_dataset(tmp_path).fingerprint() != same
    (tmp_path / "a" / "2.png").rename(tmp_path / "a" / "3.png")
    assert "there is no file" in str(images.read_each([1])[0])
    assert images.fingerprint() != load_dataset(tmp_path).fingerprint()
