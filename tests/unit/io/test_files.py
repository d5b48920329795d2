"""Atomic writing: the old file, or the new one, and nothing beside it."""

import errno
import io
import os
from pathlib import Path

import pytest

from bagcert.errors import BagcertError
from bagcert.io import files
from bagcert.io.files import (
    open_regular,
    read_regular,
    remove_leftovers,
    require_writable,
    write_atomically,
    write_together,
)
from tests import refused


def test_write_makes_folders_and_replaces_files(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    for content in (b"first", b"", bytes(range(256))):
        write_atomically(path, content)
        assert path.read_bytes() == content
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("function", ["fsync", "replace", "chmod"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EROFS])
def test_write_failure_leaves_the_old_file(
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


def test_write_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(files.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", b"new")
    assert not list(tmp_path.iterdir())


def test_write_is_whole_before_it_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    replace = os.replace

    def look(source: Path, target: Path) -> None:
        seen.append((Path(source).read_bytes(), Path(target).read_bytes(), Path(source).parent))
        replace(source, target)

    (tmp_path / "file").write_bytes(b"old")
    monkeypatch.setattr(files.os, "replace", look)
    write_atomically(tmp_path / "file", b"new")
    assert seen == [(b"new", b"old", tmp_path)]


BLOCKED = {  # where no file can be written, whoever runs the tests
    "below a file": "file/x.json",
    "far below a file": "file/a/x.json",
    "a folder": "folder",
    "a long name": "x" * 300,
}


@pytest.mark.parametrize("name", BLOCKED.values(), ids=BLOCKED)
def test_path_not_writable_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("a file")
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    said = refused(BagcertError, "cannot be written", write_atomically, tmp_path / name, b"new")
    assert str(tmp_path / name) in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        for write in (lambda path: write_atomically(path, b"new"), require_writable):
            refused(BagcertError, "cannot be written: Permission denied", write, tmp_path / "file")
    finally:
        tmp_path.chmod(0o700)


def test_asking_first_leaves_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / "file")
    require_writable(tmp_path / "new" / "file")
    assert [path.name for path in tmp_path.rglob("*")] == ["new"]
    (tmp_path / "file").write_bytes(b"old")
    require_writable(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"old"
    refused(BagcertError, "cannot be written", require_writable, tmp_path / "file" / "below")


def test_a_regular_file_within_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(path)
    for each in (path, str(path), tmp_path / "link"):
        assert read_regular(each, 5) == b"12345"
    with pytest.raises(OSError, match="it has 5 bytes, more than the limit of 4"):
        read_regular(path, 4)


def test_pipes_devices_and_folders_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    for name in ("pipe", "zeros"):
        with pytest.raises(OSError, match="it is not a regular file"):
            open_regular(tmp_path / name)
    with pytest.raises(IsADirectoryError):
        open_regular(tmp_path)
    with pytest.raises(OSError, match="its name is no file name"):
        open_regular("a\0b")


def test_read_of_a_growing_file_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"1234")
    opened = files.open_regular

    def grow(path: Path, limit: int) -> io.BufferedReader:
        file = opened(path, limit)
        with open(path, "ab") as more:
            more.write(b"x" * 100)
        return file

    monkeypatch.setattr(files, "open_regular", grow)
    with pytest.raises(OSError, match="it grew beyond the limit of 10 bytes"):
        read_regular(path, 10)


@pytest.mark.parametrize("moment", range(4))
def test_write_together_survives_a_kill(tmp_path: Path, moment: int) -> None:
    first, last = tmp_path / "weights", tmp_path / "config"
    write_together({first: b"old weights", last: b"old config"})
    process = os.fork()
    if not process:  # a process that is killed before its next renaming: nothing is tidied up
        renamed, replace = 0, os.replace

        def die(source: Path, target: Path) -> None:
            nonlocal renamed
            if renamed == moment:
                os._exit(9)
            renamed += 1
            replace(source, target)

        os.replace = die
        write_together({first: b"new weights", last: b"new config"})
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == (9 if moment < 3 else 0)
    if last.exists():
        assert first.read_bytes()[:3] == last.read_bytes()[:3] == (b"old" if moment == 0 else b"new")
    else:
        assert moment in (1, 2)
    for path in (first, last):
        remove_leftovers(path)
    assert {path.name for path in tmp_path.iterdir()} <= {"weights", "config"}


def test_write_together_failure_leaves_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, last = tmp_path / "weights", tmp_path / "config"
    write_together({first: b"old", last: b"old"})
    calls = []

    def second_fails(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        os.rename(source, target)

    monkeypatch.setattr(files.os, "replace", second_fails)
    refused(BagcertError, "weights cannot be written", write_together, {first: b"new", last: b"new"})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"weights": b"old", "config": b"old"}


def test_only_leftovers_of_that_file_are_removed(tmp_path: Path) -> None:
    for name in (".r.json.abcd1234", ".r.json.abc", "r.json", ".r.jsonl.abcd1234", "other"):
        (tmp_path / name).write_text("")
    remove_leftovers(tmp_path / "r.json")
    assert {path.name for path in tmp_path.iterdir()} == {".r.json.abc", "r.json", ".r.jsonl.abcd1234", "other"}
    remove_leftovers(tmp_path / "no folder" / "r.json")
