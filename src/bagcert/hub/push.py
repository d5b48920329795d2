"""Publishing of a model on the Hugging Face hub: the known files of its folder, and a generated model card.

Published models can be loaded with `bagcert.load("owner/name")`.
"""

import json
import math
import re
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path

from bagcert.defenses.bagcert import model_folder
from bagcert.errors import BagcertError, UnreadableError, UsageError, reason_of, sanitize
from bagcert.evaluation.results_files import RESULTS
from bagcert.hub.card import MAX_RESULTS_BYTES, measured_results, model_card
from bagcert.io.files import read_regular, write_atomically
from bagcert.nets.saved_model import CONFIG, MAX_CONFIG_BYTES, MAX_WEIGHTS_BYTES, WEIGHTS, read_model, weights_sha256
from bagcert.training.checkpoint import METRICS, RECIPE
from bagcert.training.recipe import MAX_RECIPE_BYTES, parse_recipe

CARD = "README.md"
MAX_METRICS_BYTES = 1 << 26

_LIMITS = {
    WEIGHTS: MAX_WEIGHTS_BYTES,
    CONFIG: MAX_CONFIG_BYTES,
    RECIPE: MAX_RECIPE_BYTES,
    METRICS: MAX_METRICS_BYTES,
    RESULTS: MAX_RESULTS_BYTES,
}
_NEEDED = (WEIGHTS, CONFIG)
_PART = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPO_ID = re.compile(f"{_PART}/{_PART}")


def prepare(model: str | Path, repo_id: str) -> dict[str, bytes]:
    """Collects the files to upload, as contents by file name.

    These are weights and config, recipe, training log and results if present, and a card. Each file is validated. Other
    files of the folder are ignored.

    Args:
        model: a shipped model, a model folder, or a hub id.

    Raises:
        UsageError: no such model, or an invalid hub id.
        UnreadableError: a file is missing, damaged, too large, or belongs to another model.
    """
    check_repo_id(repo_id)
    folder = model_folder(model)
    _, config = read_model(folder)
    sha256 = weights_sha256(folder)
    results = measured_results(folder, sha256)
    files: dict[str, bytes] = {}
    for name, limit in _LIMITS.items():
        try:
            files[name] = read_regular(folder / name, limit)
        except FileNotFoundError:
            if name in _NEEDED:
                raise UnreadableError(f"the model folder {folder} has no {name}") from None
        except OSError as error:
            raise UnreadableError(f"{folder / name} cannot be read: {error.strerror or error}") from None
    _check_recipe(folder, files)
    _check_metrics(folder, files)
    files[CARD] = model_card(config, sha256, results, repo_id).encode()
    return files


def write(files: Mapping[str, bytes], folder: Path) -> None:
    """Writes the files to upload to a new or empty folder.

    Raises:
        UsageError: the folder is not empty.
        BagcertError: the folder cannot be written.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"{folder} is there already; what would be uploaded goes into a new or empty folder")
    for name, content in files.items():
        write_atomically(folder / name, content)


def push(files: Mapping[str, bytes], repo_id: str, private: bool = False) -> str:
    """Uploads files to a repository of the hub in one commit. Creates the repository if needed.

    Args:
        private: create a new repository as private. An existing repository is not changed.

    Returns:
        The URL of the repository.

    Raises:
        UsageError: invalid hub id.
        BagcertError: the hub refuses the upload or cannot be reached.
    """
    from huggingface_hub import HfApi

    check_repo_id(repo_id)
    api = HfApi()
    with tempfile.TemporaryDirectory(prefix="bagcert-push-") as staging:
        write(files, Path(staging))
        try:
            url = api.create_repo(repo_id, private=private, exist_ok=True)
            api.upload_folder(repo_id=repo_id, folder_path=staging, commit_message="Model published by bagcert")
        except Exception as error:  # the hub's own, the file system's, and those of whatever HTTP library it uses
            raise BagcertError(
                f"{repo_id} cannot be published: {sanitize(reason_of(error))}; are you logged in (hf auth login)?"
            ) from None
    return str(url)


def check_repo_id(repo_id: str) -> None:
    """Validates a hub id.

    Raises:
        UsageError: not `owner/name` of letters, digits, and single `-`, `_` and `.` inside.
    """
    if not _REPO_ID.fullmatch(repo_id) or "--" in repo_id or ".." in repo_id or repo_id.endswith(".git"):
        raise UsageError(
            f"a hub id is owner/name, of letters, digits, and single -, _ and . inside; got {sanitize(repo_id)!r}"
        )


def _check_recipe(folder: Path, files: Mapping[str, bytes]) -> None:
    if RECIPE in files:
        try:
            parse_recipe(tomllib.loads(files[RECIPE].decode()))
        except (ValueError, RecursionError) as error:
            raise UnreadableError(f"{folder / RECIPE} is not a recipe: {sanitize(error)}") from None


def _check_metrics(folder: Path, files: Mapping[str, bytes]) -> None:
    for number, line in enumerate(files.get(METRICS, b"").splitlines(), 1):
        try:
            values = json.loads(line)
            numbers = values.values() if isinstance(values, dict) else [None]
            if not all(isinstance(value, int | float) and math.isfinite(value) for value in numbers):
                raise ValueError("an object of numbers was expected")
        except (ValueError, RecursionError, OverflowError) as error:
            raise UnreadableError(f"{folder / METRICS}, line {number}, is no training log: {sanitize(error)}") from None
