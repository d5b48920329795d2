import hashlib
import io
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagcert.data import load_dataset
from bagcert.errors import UsageError
from bagcert.playground.samples import made_up, sample_pictures
from bagcert.playground.site import content_type, static_files
from tests import refused
from tests.tiny import color_model

STATIC = Path(__file__).parents[3] / "src" / "bagcert" / "playground" / "static"
VENDOR = STATIC / "vendor"
OWN = [path for path in sorted(STATIC.iterdir()) if path.is_file()]


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)))


def test_vendored_files_are_those_that_are_named():
    vendor = json.loads((VENDOR / "vendor.json").read_text())
    named = {*vendor["files"], *vendor["license_files"], "vendor.json"}
    assert named == {path.name for path in VENDOR.iterdir()}
    for name, said in vendor["files"].items():
        content = (VENDOR / name).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (said["bytes"], said["sha256"]), name
    assert f"v{vendor['version']}".encode() in (VENDOR / "ort.wasm.bundle.min.mjs").read_bytes()[:200]
    assert sum(path.stat().st_size for path in VENDOR.iterdir()) < 15_000_000


@pytest.mark.parametrize("path", OWN, ids=lambda path: path.name)
def test_the_page_names_nothing_outside_itself(path):
    text = path.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert not re.findall(r"(?:https?:)?//[\w-]+\.", text)
    assert not re.findall(r"<[^>]+\s(?:on\w+|style)=", text)  # the policy would block them


def test_files_served_with_a_type():
    files = dict(static_files())
    assert {"/index.html", *(f"/{path.name}" for path in OWN), "/vendor/LICENSE"} <= files.keys()
    assert all(content_type(path) for path in files)
    for path in OWN:
        for name in re.findall(r'(?:src=|href=|from )"(?:\./)?([^"]+)"', path.read_text()):
            assert f"/{name}" in files, (path.name, name)


def test_every_element_that_scripts_ask_for_is_on_the_page():
    script, page = (STATIC / "page.js").read_text(), (STATIC / "index.html").read_text()
    asked = set(re.findall(r'element\("([\w-]+)"\)', script))
    assert len(asked) > 10
    assert asked <= set(re.findall(r'id="([\w-]+)"', page))
    labeled = set(re.findall(r'for="([\w-]+)"', page))
    for name in re.findall(r'<(?:input|select) id="([\w-]+)"', page):
        assert name in labeled or re.search(rf'<label[^>]*>[^<]*<input id="{name}"', page), f"{name} has no label"


def test_samples_are_the_first_of_each_class_pixel_by_pixel():
    model = color_model(names=tuple("0123456789"[:3]), size=(8, 8))
    model.class_names = tuple("0123456789")
    digits = load_dataset("digits", "test")
    samples = sample_pictures(model)
    assert len(samples) == 8
    for digit, sample in enumerate(samples):
        first = int(np.flatnonzero(digits.labels == digit)[0])
        assert sample.name == f"{digit} (image {first} of digits)"
        np.testing.assert_array_equal(pixels(sample.png), digits.array()[first])


def test_samples_without_data_are_made_up_and_fit_the_model():
    samples = sample_pictures(color_model(size=(6, 9)))
    assert [pixels(sample.png).shape for sample in samples] == [(6, 9, 3)] * len(samples)
    assert all(sample.name.startswith("made-up") for sample in samples)
    assert all(len(np.unique(picture.reshape(-1, 3), axis=0)) > 1 for picture in made_up(32, 32).values())


def test_samples_of_no_data_set_are_refused():
    refused(UsageError, "no dataset", sample_pictures, color_model(), "no-such-data")
