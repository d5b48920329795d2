"""`bagcert push`: what it prints and writes; the hub itself is never asked."""

import hashlib
import json
from pathlib import Path

import huggingface_hub
import pytest

from bagcert.defenses.bagcert import shipped_models
from tests.command import check_mistake, run


def test_a_dry_run_writes_and_lists_the_files(tmp_path: Path) -> None:
    result = run("push", "digits", "someone/digits", "--dry-run", tmp_path / "dry", "--json")
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out)
    assert next(iter(found)) == "schema_version"
    assert (found["repo_id"], found["url"], found["dry_run"]) == ("someone/digits", None, str(tmp_path / "dry"))
    written = {path.name: path.read_bytes() for path in (tmp_path / "dry").iterdir()}
    assert {file["name"]: file["sha256"] for file in found["files"]} == {
        name: hashlib.sha256(content).hexdigest() for name, content in written.items()
    }
    assert {"README.md", "config.json", "model.safetensors"} <= written.keys()
    check_mistake(run("push", "digits", "someone/digits", "--dry-run", tmp_path / "dry"), 2, "new or empty folder")


def test_a_push_names_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((shipped_models()["digits"] / name).read_bytes())
    uploaded: list[str] = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda api, name, **_: f"https://example.org/{name}")
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda api, **options: uploaded.extend(path.name for path in Path(options["folder_path"]).iterdir()),
    )
    result = run("push", tmp_path, "someone/digits")
    assert result.code == 0, result
    assert sorted(uploaded) == ["README.md", "config.json", "model.safetensors"]
    assert result.out.splitlines()[-1] == "The model is at https://example.org/someone/digits"
    assert "The card has no results" in result.out


def test_mistakes_are_one_sentence(tmp_path: Path) -> None:
    check_mistake(run("push", "digits", "digits", "--dry-run", tmp_path / "dry"), 2, "owner/name")
    check_mistake(run("push", "digit", "a/b", "--dry-run", tmp_path / "dry"), 2, "did you mean digits")
    check_mistake(run("push", tmp_path, "a/b", "--dry-run", tmp_path / "dry"), 5, "config.json")
    assert not (tmp_path / "dry").exists()
