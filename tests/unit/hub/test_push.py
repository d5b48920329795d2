"""What is published, and what is not: known files alone, each checked, in one commit."""

import os
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import validate_repo_id

import bagcert
from bagcert.defenses.bagcert import shipped_models
from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.hub import push as hub
from tests import refused

DIGITS = shipped_models()["digits"]
NAMES = {"README.md", "config.json", "metrics.jsonl", "model.safetensors", "recipe.toml", "results.json"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of a shipped model, with files beside it that are nobody's business."""
    folder = tmp_path / "model"
    folder.mkdir()
    for file in DIGITS.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "secret.env").write_text("TOKEN=1")
    (folder / "checkpoint.pt").write_bytes(b"x")
    (folder / "README.md").write_text("# My notes")
    (folder / "photos").mkdir()
    (folder / "photos" / "me.jpg").write_bytes(b"x")
    return folder


class Hub:
    """The two methods of `HfApi` that are used, and what they were given."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, dict]] = []
        self.uploaded: dict[str, bytes] = {}

    def create_repo(self, api: object, repo_id: str, **options: object) -> str:
        self.calls.append((repo_id, options))
        return f"https://example.org/{repo_id}"

    def upload_folder(self, api: object, *, repo_id: str, folder_path: str, commit_message: str) -> None:
        self.calls.append((repo_id, {"commit_message": commit_message}))
        self.uploaded = {
            str(path.relative_to(folder_path)): path.read_bytes()
            for path in Path(folder_path).rglob("*")
            if path.is_file()
        }


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Hub:
    found = Hub()
    for name in ("create_repo", "upload_folder"):
        method = getattr(found, name)
        monkeypatch.setattr(huggingface_hub.HfApi, name, lambda *a, _method=method, **k: _method(*a, **k))
    return found


def test_known_files_are_published_and_no_others(folder: Path) -> None:
    files = hub.prepare(folder, "someone/digits")
    assert files.keys() == NAMES
    for name in NAMES - {"README.md"}:
        assert files[name] == (DIGITS / name).read_bytes()
    assert files["README.md"].startswith(b"---\n")
    assert b"My notes" not in files["README.md"]


def test_what_is_optional_may_be_absent(folder: Path) -> None:
    for name in ("metrics.jsonl", "recipe.toml", "results.json"):
        (folder / name).unlink()
    files = hub.prepare(folder, "someone/digits")
    assert files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert b"**This model has not been evaluated" in files["README.md"]


def test_push_uploads_what_a_dry_run_writes(folder: Path, tmp_path: Path, api: Hub) -> None:
    files = hub.prepare(folder, "someone/digits")
    hub.write(files, tmp_path / "dry")
    assert hub.push(files, "someone/digits", private=True) == "https://example.org/someone/digits"
    assert api.uploaded == {path.name: path.read_bytes() for path in (tmp_path / "dry").iterdir()} == files
    (created, options), (updated, _) = api.calls
    assert (created, updated) == ("someone/digits", "someone/digits")
    assert options == {"private": True, "exist_ok": True}


def test_what_was_published_loads_by_its_hub_id(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.write(hub.prepare(folder, "someone/digits"), tmp_path / "dry")
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **_: {"someone/digits": str(tmp_path / "dry")}[name]
    )
    loaded, own = bagcert.load("someone/digits", "cpu"), bagcert.load("digits", "cpu")
    assert loaded.weights_sha256 == own.weights_sha256
    assert (loaded.rule, loaded.patch, loaded.class_names) == (own.rule, own.patch, own.class_names)


def test_a_hub_that_refuses_is_one_sentence(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise OSError("401 Client Error\nlong story")

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", refuse)
    files = hub.prepare(folder, "someone/digits")
    said = refused(BagcertError, None, hub.push, files, "someone/digits")
    assert "someone/digits cannot be published: 401 Client Error; are you logged in" in said
    assert "long story" not in said


@pytest.mark.parametrize(
    "name",
    [
        "digits", "a/b/c", "/digits", "someone/", "some one/x", "a/..", "a/b--c", "a/b..c", "a/.b", "a/b.git", "a/b\n",
        'a/b"c', "a/" + "x" * 97,  # would break out of the card
    ],
)  # fmt: skip
def test_names_refused(name: str) -> None:
    for ask in (lambda: hub.prepare("digits", name), lambda: hub.push({}, name), lambda: hub.check_repo_id(name)):
        refused(UsageError, "owner/name", ask)


@pytest.mark.parametrize("name", ["a/b", "some-one/my_model.v1", "A1/x"])
def test_names_the_hub_takes_are_taken(name: str) -> None:
    hub.check_repo_id(name)
    validate_repo_id(name)


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("metrics.jsonl", b"root:x:0:0:root\n", "metrics.jsonl, line 1, is no training log"),
        ("metrics.jsonl", b'{"step": 1}\n{"step": "x"}\n', "line 2"),
        ("metrics.jsonl", b'{"step": NaN}', "line 1"),
        ("metrics.jsonl", b"[1]", "line 1"),
        ("recipe.toml", b"TOKEN = 'secret'", "recipe.toml is not a recipe"),
        ("recipe.toml", b"TOKEN=secret", "recipe.toml is not a recipe"),
        ("recipe.toml", b"#" * 70_000, "recipe.toml cannot be read"),
        ("results.json", b"[]", "results.json is not the JSON"),
        ("config.json", b"{}", "not a model config"),
        ("model.safetensors", b"", "safetensors"),
    ],
)
def test_files_of_another_kind_refused(folder: Path, file: str, content: bytes, reason: str) -> None:
    (folder / file).write_bytes(content)
    refused(UnreadableError, reason, hub.prepare, folder, "someone/digits")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_not_read(folder: Path) -> None:
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    refused(UnreadableError, "not a regular file", hub.prepare, folder, "someone/digits")


def test_a_dry_run_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").write_text("mine")
    for taken in (tmp_path, tmp_path / "there"):
        refused(UsageError, "new or empty folder", hub.write, {"README.md": b""}, taken)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]
