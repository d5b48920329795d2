"""VNN-LIB properties: what the files say, and a search for counter-examples in them with onnxruntime alone."""

import re

import numpy as np
import pytest
import torch

from bagcert.errors import UnsoundError, UsageError
from bagcert.exporting import vnnlib
from bagcert.exporting.vnnlib import property_lines, write_property
from bagcert.threat import PatchThreatModel
from tests import refused, tiny
from tests.vnnlib import BOUND, Property

pytestmark = pytest.mark.slow

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

SIZE = (4, 4)


MODELS = {
    "vote": tiny.color_model("vote", "2", SIZE),
    "double-masking": tiny.color_model("double-masking", "2", SIZE),
    "attention": tiny.attention_model("double-masking", "1", SIZE),
}


def binary(rule, patch):
    model = tiny.color_model(rule, patch, SIZE)
    model.scorer.head = "binary"
    model.scorer.net[0].bias = torch.nn.Parameter(torch.full((3,), -0.5))
    return model


MODELS["binary"] = binary("vote", "2")


@pytest.mark.parametrize("name", list(MODELS))
def test_counter_examples(name, tmp_path):
    model = MODELS[name]
    random = np.random.default_rng(1)
    pixels = random.integers(0, 256, (400, *SIZE, 3)).astype(np.uint8)
    pixels[::2, :, :, 0] |= 128
    pixels[::4, :, :, 1:] >>= 1
    found = model.certify(pixels)
    side = int(model.patch)
    path = tmp_path / "p.onnx"
    for image in found.certified.nonzero()[:3, 0].tolist():
        for top, left in ((0, 0), (SIZE[0] - side, SIZE[1] - side)):
            label = write_property(model, pixels[image], (top, left, side, side), path)
            assert label == int(found.prediction[image])
            assert not Property(path).counter_examples()
    image, top, left = broken(model, pixels, found, side)
    label = write_property(model, pixels[image], (top, left, side, side), path)
    examples = Property(path).counter_examples()
    assert examples
    attacked = torch.from_numpy(np.stack(examples))
    assert bool((model.predict(attacked) != label).all())
    outside = np.ones(SIZE, dtype=bool)
    outside[top : top + side, left : left + side] = False
    assert np.array_equal(examples[0][:, outside], pixels[image].transpose(2, 0, 1)[:, outside] / np.float32(255))


def broken(model, pixels, found, side):
    """An image and a place where one color changes the answer, found by trying."""
    for image in (~found.certified).nonzero()[:, 0].tolist():
        for top in range(SIZE[0] - side + 1):
            for left in range(SIZE[1] - side + 1):
                attacked = pixels[image][None].repeat(8, 0)
                colors = 255 * np.indices((2, 2, 2)).reshape(3, 8).T[:, None, None]
                attacked[:, top : top + side, left : left + side] = colors
                if bool((model.predict(attacked) != found.prediction[image]).any()):
                    return image, top, left
    raise AssertionError("no image can be attacked")


@pytest.mark.parametrize("color", [0, 1])
def test_equal_sums_rank_as_the_tie_rule_says(tmp_path, color):
    """The answer at a tie is the lowest class: a later class that only ties does not break a certificate."""
    model, path = tiny.color_model("vote", "1", SIZE), tmp_path / "p.onnx"
    image = np.zeros((*SIZE, 3), dtype=np.uint8)
    image[0, 0, color] = 255  # one pixel decides, and the patch can give another class as much
    assert write_property(model, image, (0, 1, 1, 1), path) == color
    read = Property(path)
    for other in range(3):
        attacked = image.transpose(2, 0, 1) / np.float32(255)
        attacked[other, 0, 1] = 1.0
        (scores,) = read.session.run(None, {read.name: attacked[None]})
        violated = any(scores[0, a] >= scores[0, b] for a, b in read.rivals)
        assert violated == (other < color)
        assert violated == (int(model.predict(torch.from_numpy(attacked)[None])) != color)


def test_every_pixel_outside_the_patch_is_fixed(tmp_path):
    image = np.random.default_rng(0).random((3, 4, 5)).astype(np.float32)
    lines = property_lines(image, (1, 2, 2, 3), 3, 1)
    (tmp_path / "p.vnnlib").write_text("\n".join(lines))
    low, high = np.full(60, np.nan), np.full(60, np.nan)
    for line in lines:
        for sign, place, value in BOUND.findall(line):
            (high if sign == "<" else low)[int(place)] = float(value)
    free = np.zeros((3, 4, 5), dtype=bool)
    free[:, 1:3, 2:5] = True
    assert np.array_equal(low.astype(np.float32).reshape(3, 4, 5), np.where(free, 0, image))
    assert np.array_equal(high.astype(np.float32).reshape(3, 4, 5), np.where(free, 1, image))
    assert lines[-1] == "(assert (or (and (>= Y_0 Y_1)) (and (>= Y_2 Y_1))))"
    assert not re.search(r"[0-9]e", "".join(property_lines(image * np.float32(1e-7), (0, 0, 1, 1), 3, 1)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rule": "detection"}, "the rule detection has no VNN-LIB property"),
        ({"rule": "votes"}, "did you mean vote"),
        ({"placement": (3, 0, 2, 2)}, "within the image"),
        ({"placement": (0, 0, 3, 3)}, "of the patch 2 "),
        ({"placement": (0, 0, 0, 2)}, "of the patch 2 "),
        ({"patch": "2*2"}, "about one patch"),
        ({"image": np.zeros((8, 8, 3), np.uint8)}, "the model's size, 4x4 px, got 8x8"),
        ({"image": np.zeros((1, 4, 4, 3), np.uint8)}, "about one image"),
        ({"image": "photo.png"}, "about one image"),
        ({"name": "p.txt"}, "must be a .onnx file"),
    ],
)
def test_a_mistake_is_a_sentence_and_no_file(tmp_path, change, message):
    name = change.pop("name", "p.onnx")
    given = {"image": np.zeros((*SIZE, 3), np.uint8), "placement": (0, 0, 2, 2), **change}
    refused(UsageError, message, write_property, MODELS["vote"], out=tmp_path / name, **given)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_answers_otherwise_is_not_written(tmp_path, monkeypatch):
    real = vnnlib.to_onnx
    other = tiny.color_model("vote", "2", SIZE)
    other.scorer.net[0].weight.data = other.scorer.net[0].weight.data.roll(1, 0)
    wrong = vnnlib.ClassSums(other, PatchThreatModel.parse("2", SIZE))
    monkeypatch.setattr(vnnlib, "to_onnx", lambda net, *given, **more: real(wrong, *given, **more))
    image = np.zeros((*SIZE, 3), np.uint8)
    image[..., 0] = 200
    refused(UnsoundError, "answers otherwise", write_property, MODELS["vote"], image, (0, 0, 2, 2), tmp_path / "p.onnx")
    assert list(tmp_path.iterdir()) == []
