"""Recipes: what ships is whole, what is wrong is named."""

import os
import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.nets import get_architecture
from bagcert.rules import get_rule
from bagcert.threat import PatchThreatModel
from bagcert.training.optimizers import OPTIMIZERS
from bagcert.training.recipe import OptimizerSection, Recipe, load_recipe, parse_recipe, shipped_recipes
from tests import refused


def _refused(words: list[str], name: object, overrides: tuple[str, ...] = (), error=UsageError) -> None:
    with pytest.raises(error) as raised:
        load_recipe(str(name), overrides)
    for word in words:
        assert word in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", shipped_recipes())
def test_shipped_recipes(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    architecture = get_architecture(recipe.model.architecture)
    assert get_rule(recipe.defense.rule)
    assert PatchThreatModel.parse(recipe.defense.patch, recipe.model.image_size or architecture.image_size).patch


@pytest.mark.parametrize("name", shipped_recipes())
def test_round_trip(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(name, ["model.image_size=[16,24]", "optimizer.learning_rate=1e-5", "model.padded=false"])
    path = tmp_path / "written.toml"
    path.write_text(recipe.to_toml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe
    assert load_recipe(str(path)).to_toml() == recipe.to_toml()
    written = tomllib.loads(recipe.to_toml())
    for section, values in recipe.model_dump(exclude_none=True, mode="json").items():
        assert written[section] == values


@pytest.mark.parametrize(
    "text", ['with "quotes"', "back\\slash", "line\nbreak", "tab\t", "ünïcödé 🙂", "\x7f\x01", "#"]
)
def test_round_trip_of_texts(text: str) -> None:
    recipe = parse_recipe({"name": "r", "data": {"name": text}})
    assert parse_recipe(tomllib.loads(recipe.to_toml())) == recipe


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("name=other-1.10", "other-1.10"),
        ("name=1.10", "1.10"),
        ("train.epochs=3", 3),
        ("optimizer.learning_rate=1e-4", 1e-4),
        ("optimizer.learning_rate=1", 1.0),
        ("train.compile=true", True),
        ("model.padded=false", False),
        ("model.image_size=[16,16]", (16, 16)),
        ("model.image_size=16", (16, 16)),
        ("model.image_size = [16, 24]", (16, 24)),
        ("defense.patch=5", "5"),
        ("defense.patch=2x8", "2x8"),
        ("defense.patch=0x8", "0x8"),
        ("defense.patch='2%'", "2%"),
        ("defense.patch=5+2x8", "5+2x8"),
        ('defense.rule="vote"', "vote"),
        ("loss.name=margin", "margin"),
        ("data.name=some/path=with equals", "some/path=with equals"),
    ],
)
def test_override_types(override: str, value: object) -> None:
    recipe = load_recipe("digits", [override])
    found: object = recipe
    for part in override.partition("=")[0].strip().split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


def test_override_order() -> None:
    plain = load_recipe("digits")
    changed = load_recipe("digits", ["train.epochs=3", "augment.cutout=2", "train.epochs=4"])
    assert changed.train == plain.train.model_copy(update={"epochs": 4})
    assert changed.augment.cutout == 2
    assert changed.model_copy(update={"train": plain.train, "augment": plain.augment}) == plain


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.epoch=3", ["'train.epoch'", "did you mean train.epochs"]),
        ("trian.epochs=3", ["'trian.epochs'", "did you mean train.epochs"]),
        ("train.deep.epochs=3", ["'train.deep.epochs'", "did you mean train.epochs"]),
        ("nothing.like.this.at.all=3", ["'nothing.like.this.at.all'"]),
        ("train=3", ["'train'"]),
        ("train.epochs", ["section.key=value", "'train.epochs'"]),
        ("=3", ["section.key=value", "'=3'"]),
        ("", ["section.key=value", "''"]),
        ("train.epochs=many", ["train.epochs", "integer", "'many'"]),
        ("train.epochs=0", ["train.epochs", "greater than or equal to 1", "got 0"]),
        ("train.epochs=1.5", ["train.epochs", "integer", "1.5"]),
        ("train.seed=-1", ["train.seed", "-1"]),
        ("model.width=4", ["model.width", "greater than or equal to 8"]),
        ("model.image_size=0", ["model.image_size", "greater than or equal to 1"]),
        ("model.image_size=[16]", ["model.image_size"]),
        ("optimizer.name=adam", ["optimizer.name", "'adamw', 'muon' or 'sgd'", "'adam'"]),
        ("optimizer.learning_rate=0", ["optimizer.learning_rate", "greater than 0"]),
        ("optimizer.learning_rate=nan", ["optimizer.learning_rate", "nan"]),
        ("optimizer.learning_rate=inf", ["optimizer.learning_rate", "inf"]),
        ("data.validation=1", ["data.validation", "less than 1"]),
        ("name=no/slashes", ["name", "'no/slashes'"]),
        ("name=", ["name", "''"]),
        ("train.compile=perhaps", ["train.compile", "'perhaps'"]),
        ("augment.resized_crop=0", ["augment.resized_crop", "greater than 0"]),
        ("augment.resize=256", ["augment.resize needs augment.resized_crop and model.image_size"]),
    ],
)
def test_wrong_override_refused(override: str, words: list[str]) -> None:
    _refused(words, "digits", (override,))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["needs the key 'name'"]),
        ("name = 'r'\nepochs = 3", ["'epochs'"]),
        ("name = 'r'\n[trian]\nepochs = 3", ["'trian'", "did you mean train"]),
        ("name = 'r'\n[train]\nepoch = 3", ["'train.epoch'", "did you mean train.epochs"]),
        ("name = 'r'\ntrain = 3", ["train", "got 3"]),
        ("name = 'r'\n[defense]\npatch = 5", ["defense.patch", "string", "got 5"]),
        ("name = 3", ["name", "string", "got 3"]),
    ],
)
def test_wrong_file_refused(text: str, words: list[str], tmp_path: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(text)
    _refused(words, path)


def test_override_of_no_section_refused(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text("name = 'r'\ntrain = 3")
    _refused(["train: it should be a section [train], got 3"], tmp_path / "r.toml", ("train.epochs=3",))


@pytest.mark.parametrize(("name", "near"), [("digit", "did you mean digits"), ("zzz", "choose from")])
def test_unknown_recipe_names_the_nearest(name: str, near: str) -> None:
    _refused([f"no recipe {name!r}; {near}"], name)


@pytest.mark.parametrize("content", [b"name = ", b"name: r", b"\xff\xfe", b"\x89PNG\r\n", b"a = 1\na = 2"])
def test_not_toml_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_bytes(content)
    _refused(["not valid TOML", str(path)], path, error=UnreadableError)


def test_missing_files_folders_and_pipes_refused(tmp_path: Path) -> None:
    (tmp_path / "folder.toml").mkdir()
    for name in ("missing.toml", "folder.toml"):
        _refused(["cannot be read", name], tmp_path / name, error=UnreadableError)
    os.mkfifo(tmp_path / "r.toml")
    _refused(["not a regular file"], tmp_path / "r.toml", error=UnreadableError)


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_recipe("digits").train.epochs = 3
    assert isinstance(load_recipe("digits"), Recipe)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"x = " + b"[" * 30_000, "is not valid TOML"),
        (b"x = " + b"{a=" * 15_000, "is not valid TOML"),
        (b"x = " + b"9" * 5000, "is not valid TOML"),
        (b"#" * (1 << 16) + b"\n", "more than the limit of 65,536"),
        (b".".join([b"a"] * 20_000) + b" = 1", "needs the key 'name'"),
        (b'name = "x"\ndata.' + b".".join([b"a"] * 20_000) + b" = 1", "no key 'data.a'"),
        (b'name = "x"\ntrain.epochs.' + b".".join([b"a"] * 20_000) + b" = 1", "recipe key train.epochs"),
        (b'name = "x"\n"a\\u001b[2J\\nb" = 1', "no key"),
        (b'name = "x"\nmodel.image_size = [1000000000, 1000000000]', "recipe key model.image_size.0"),
        (b'name = "x"\nmodel.width = 1000000000', "recipe key model.width"),
        (b'name = "x"\naugment.crop = 1000000000', "recipe key augment.crop"),
        (b'name = "' + b"x" * 300 + b'"', "recipe key name"),
    ],
)
@pytest.mark.timeout(60)
def test_hostile_files_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_bytes(content)
    said = refused(BagcertError, re.escape(reason), load_recipe, str(tmp_path / "r.toml"))
    assert len(said) < 700


def test_hostile_overrides_refused() -> None:
    for text in ("[" * 30_000, "9" * 5000):
        said = refused(UsageError, r"recipe key train\.epochs", load_recipe, "digits", [f"train.epochs={text}"])
        assert len(said) < 500


def test_keys_documented() -> None:
    page = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text(encoding="utf-8")
    for section, values in load_recipe("digits").model_dump().items():
        for key in values if isinstance(values, dict) else ():
            (line,) = re.findall(rf"^\| `{section}\.{key}` \|.*\| ([^|]*) \|$", page, re.MULTILINE)
            assert line.strip(), f"{section}.{key} has no meaning"


def test_every_optimizer_has_a_function():
    names = get_args(OptimizerSection.model_fields["name"].annotation)
    assert sorted(names) == sorted(OPTIMIZERS)
