"""The documentation builds without a warning, says what the commands say, and its examples run as they stand."""

import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main
from PIL import Image

import bagcert
from bagcert.cli import app
from bagcert.data import load_dataset
from tests.command import run

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
OTHERS = ("publishing", "many_devices", "results")  # show options of other programs
RUN = ("tutorial", "checking", "publishing", "fail_safe", "adding_a_defense", "bring_your_network")
BUILDERS = ("sphinx", "furo", "myst_parser")
KNOWN: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def blocks(page: str) -> list[tuple[str, str]]:
    """(language, text) of the fenced blocks of a page, in order."""
    return re.findall(r"^```(\w+)\n(.*?)^```", (DOCS / f"{page}.md").read_text(encoding="utf-8"), re.S | re.M)


def commands(text: str) -> list[str]:
    """The lines of a shell block without their comments; each must be one of ours, so that none is left out."""
    lines = [line.partition(" # ")[0].strip() for line in text.splitlines()]
    lines = [line for line in lines if line]
    assert all(line.startswith("bagcert ") for line in lines), lines
    return lines


def test_the_tutorial_goes_from_a_folder_to_a_certificate() -> None:
    lines = [line for language, text in blocks("tutorial") if language == "sh" for line in commands(text)]
    verbs = [line.split()[1] for line in lines]
    order = ["train", "evaluate", "certify", "verify"]
    assert [verb for verb in verbs if verb in order] == order


@pytest.mark.parametrize("page", RUN)
def test_every_example_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    if page == "checking":
        (tmp_path / "frames").mkdir()
        for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)):
            Image.fromarray(image).save(tmp_path / "frames" / f"{number}.png")
    names: dict = {}
    ran = 0
    for language, text in blocks(page):
        if language == "toml":
            file = re.match(r"# (\S+\.toml)\n", text)
            assert file, "a TOML block begins with a comment that names its file"
            (tmp_path / file[1]).write_text(text)
        elif language == "python":
            exec(compile(text, f"docs/{page}.md", "exec"), names)
            ran += 1
        else:
            assert language == "sh"
            for line in commands(text):
                done = run(*shlex.split(line)[1:])
                assert done.code == 0, f"{line}: {done.err}"
                assert done.out.strip(), line
                ran += 1
    assert ran
    if page == "bring_your_network":
        held_out = load_dataset("digits")
        certificate = bagcert.load("runs/small-fields").certify(held_out.array())
        right = certificate.prediction.numpy() == held_out.labels
        assert right.mean() > 0.8
        assert (right & certificate.certified.numpy()).mean() > 0.15
    if page == "tutorial":
        photos = list((tmp_path / "photos").rglob("*.png"))
        assert len(photos) > 500
        assert len({Image.open(photo).size for photo in photos[:20]}) > 10  # of mixed sizes, as is said
        certificate = names["certificate"]
        right = [label for label, name in enumerate(bagcert.load("runs/signs").class_names) if name == "zero"]
        assert certificate.certified.float().mean() > 0.3  # it did learn
        assert (certificate.prediction == right[0]).any()


def test_the_command_reference_holds_every_command_and_option() -> None:
    page = (DOCS / "commands.md").read_text(encoding="utf-8")
    for name, command in KNOWN.items():
        assert f"\n## {name}\n" in page
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for parameter in command.params:
            if parameter.param_type_name == "option":
                assert all(option in section for option in parameter.opts)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_commands_shown_anywhere_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for verb in re.findall(r"(?:^|`|    )bagcert ([a-z]+)\b", text, re.M):
        assert verb in KNOWN, f"{page.name} shows bagcert {verb}"
    for option in re.findall(r"(?<![\w-])(--[a-z][a-z0-9-]+)", text) if page.stem not in OTHERS else ():
        spoken = {"--help", "--version", "--fail-under"}
        assert option in spoken or any(option in parameter.opts for c in KNOWN.values() for parameter in c.params)


def test_every_page_is_reached_from_the_first() -> None:
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    listed = {name for tree in re.findall(r"```\{toctree\}\n(.*?)```", index, re.S) for name in tree.split()}
    assert {page.stem for page in PAGES} - {"index"} <= listed


def test_the_container_file_copies_what_is_there() -> None:
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    copied = [words[1:-1] for line in text.splitlines() if (words := line.split()) and words[0] == "COPY"]
    assert copied
    for sources in copied:
        for source in sources:
            assert (ROOT / source).exists(), source
    assert 'ENTRYPOINT ["bagcert"]' in text
    assert "://" not in text


@pytest.mark.skipif(any(find_spec(name) is None for name in BUILDERS), reason="needs the extra docs")
def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "-d", str(tmp_path / "trees")]
    done = subprocess.run([*command, DOCS, tmp_path / "html"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = tmp_path / "html"
    assert {f"{page.stem}.html" for page in PAGES} <= {path.name for path in built.glob("*.html")}
    method = (built / "method.html").read_text(encoding="utf-8")
    assert method.count("<math") > 30
    api = (built / "api.html").read_text(encoding="utf-8")
    for thing in ("defenses.bagcert.load", "certificate.Certificate", "proofs.verify.verify_record"):
        assert f'id="bagcert.{thing}"' in api
    for page in built.glob("*.html"):  # a page asks no other server for anything
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r'<(?:script|link|img)\b[^>]*(?:src|href)="(?:https?:)?//', text), page.name
