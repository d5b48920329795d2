"""The files of the page for one model, in memory: static files, the exported model, and its description."""

import json
import tempfile
from collections.abc import Callable, Iterator
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path, PurePosixPath
from typing import Any

from bagcert.defenses.bagcert import BagCert
from bagcert.errors import BagcertError
from bagcert.exporting.writer import export
from bagcert.playground.samples import sample_pictures
from bagcert.playground.server import Resource

CONTENT_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".txt": "text/plain; charset=utf-8",
    "": "text/plain; charset=utf-8",
    ".wasm": "application/wasm",
    ".onnx": "application/octet-stream",
}
"""Content types by file extension. Browsers refuse scripts and WebAssembly of another type."""


def build_site(
    model: BagCert,
    patch: str | None = None,
    rule: str | None = None,
    data: str | None = None,
    on_step: Callable[[str], None] = lambda step: None,
) -> dict[str, Resource]:
    """Creates the resources of `PageServer` for a model.

    Exports the model, which also compares the exported file with the package's rules.

    Args:
        patch, rule: what to deploy; by default those of the model.
        data: source of the sample images, as for `load_dataset`; by default the digits for a model trained on digits,
            and generated images for any other.
    """
    samples = sample_pictures(model, data)
    with tempfile.TemporaryDirectory(prefix="bagcert-page-") as folder:
        file = Path(folder) / "model.onnx"
        found = export(model, file, patch=patch, rule=rule, on_step=on_step)
        exported = file.read_bytes()
    about = {
        **page_facts(found.metadata),
        "channels": model.scorer.channels,
        "samples": [{"name": sample.name, "file": f"samples/{i}.png"} for i, sample in enumerate(samples)],
    }
    contents = dict(static_files())
    contents["/"] = contents["/index.html"]
    contents["/model.onnx"] = exported
    contents["/model.json"] = json.dumps(about, ensure_ascii=False).encode()
    contents |= {f"/samples/{i}.png": sample.png for i, sample in enumerate(samples)}
    return {
        path: Resource(content_type("/index.html" if path == "/" else path), body) for path, body in contents.items()
    }


def page_facts(metadata: dict[str, str]) -> dict[str, Any]:
    """Converts the metadata of an exported file to the description that the page reads."""
    structured = ("threat", "class_names", "image_size", "geometry", "readout")
    plain = ("model", "rule", "patch", "weights_sha256", "bagcert_version")
    return {name: metadata[name] for name in plain} | {name: json.loads(metadata[name]) for name in structured}


def content_type(path: str) -> str:
    """Returns the content type of a path by its extension.

    >>> content_type("/page.js")
    'text/javascript; charset=utf-8'
    """
    return CONTENT_TYPES[PurePosixPath(path).suffix]


def static_files() -> Iterator[tuple[str, bytes]]:
    """Reads the static files of the page, as path and content."""
    root = resources.files("bagcert.playground") / "static"
    if not root.is_dir():
        raise BagcertError("the files of the page are missing from this installation of bagcert; install it again")
    yield from _files(root, "/")


def _files(folder: Traversable, prefix: str) -> Iterator[tuple[str, bytes]]:
    for entry in sorted(folder.iterdir(), key=lambda entry: entry.name):
        if entry.is_dir():
            yield from _files(entry, f"{prefix}{entry.name}/")
        elif PurePosixPath(entry.name).suffix in CONTENT_TYPES and not entry.name.startswith("."):
            yield prefix + entry.name, entry.read_bytes()
