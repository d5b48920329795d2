"""Atomic writing: the old file, or the new one, and nothing beside it."""

import errno
import os
from pathlib import Path

import pytest

from bagcert import files
from bagcert.errors import BagcertError
from bagcert.files import require_writable, write_atomically


def test_it_writes_into_folders_that_do_not_exist_and_over_files_that_do(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    for content in (b"first", b"", bytes(range(256))):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_a_failure_at_any_step_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: str, number: int
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")

    def fail(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(files.os, function, fail)
    with pytest.raises(BagcertError) as error:
        write_atomically(path, b"new")
    assert str(error.value) == f"{path} cannot be written: {os.strerror(number)}"
    assert error.value.exit_code == 1
    assert [(each, each.read_bytes()) for each in tmp_path.iterdir()] == [(path, b"old")]


def test_an_interruption_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


def test_the_new_file_is_whole_before_it_takes_the_place_of_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    replace = os.replace

    def look(source: Path, target: Path) -> None:
        seen.append((Path(source).read_bytes(), Path(target).read_bytes(), Path(source).parent))
        replace(source, target)

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(files.os, "replace", look)
    write_atomically(tmp_path / "file", b"new")
    assert seen == [(b"new", b"old", tmp_path)]


def _blocked(tmp_path: Path, how: str) -> Path:
    """A path where no file can be written, whoever runs the tests."""
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    return {
        "below a file": tmp_path / "file" / "x.json",
        "far below a file": tmp_path / "file" / "a" / "x.json",
        "a folder": tmp_path / "folder",
        "a long name": tmp_path / ("x" * 300),
    }[how]


@pytest.mark.parametrize("how", ["below a file", "far below a file", "a folder", "a long name"])
def test_paths_that_cannot_be_written_are_named_in_one_sentence(tmp_path: Path, how: str) -> None:
    path = _blocked(tmp_path, how)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(BagcertError, match="cannot be written") as error:
        write_atomically(path, b"new")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        for write in (lambda path: write_atomically(path, b"new"), require_writable):
            with pytest.raises(BagcertError, match="cannot be written: Permission denied"):
                write(tmp_path / "file")
    finally:
        tmp_path.chmod(0o700)


def test_asking_first_leaves_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new" / "file")
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]
    (tmp_path / "file").write_bytes(b"old")
    require_writable(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    with pytest.raises(BagcertError, match="cannot be written"):
        require_writable(tmp_path / "file" / "below")
