"""`bagcert export`: the files it writes, the examples that run them, and how it refuses."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagcert.data import load_dataset
from bagcert.defenses.bagcert import load
from bagcert.training.loop import train
from tests import tiny
from tests.command import check_error, check_mistake, run
from tests.unit.exporting.files import session
from tests.vnnlib import Property

EXAMPLES = Path(__file__).parents[2] / "examples"
NODE = shutil.which("node")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The digits model, in 8 bits beside it, and what the command printed."""
    for library in ("onnxscript", "onnxruntime"):
        pytest.importorskip(library)
    folder = tmp_path_factory.mktemp("exported")
    code, out, err = run("export", "digits", "-o", folder / "digits.onnx", "--data", "digits", "--json")
    assert (code, err) == (0, "")
    more = ("--int8", "--calibration", "digits", "--calibration-images", 200, "--rule", "vote", "--patch", "2")
    small, text, err = run("export", "digits", "-o", folder / "int8.onnx", *more)
    assert (small, err) == (0, "")
    return folder, json.loads(out), text


@pytest.fixture(scope="module")
def photos(exported):
    """Some digits as image files, and the model's certificates for them."""
    images = load_dataset("digits", "test", 12).array()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(exported[0] / f"{number}.png")
    return images, load("digits", device="cpu").certify(images)


def test_the_file_is_the_model(exported, photos):
    found = exported[1]
    assert next(iter(found)) == "schema_version"
    assert found["metadata"]["weights_sha256"] == load("digits", device="cpu", checked=False).weights_sha256
    assert found["check"]["images"] == 48 + 16
    assert found["check"]["same_verdicts"] >= 60
    batch = (photos[0].transpose(0, 3, 1, 2) / 255).astype(np.float32)
    label, certified, margin, scores = session(exported[0] / "digits.onnx").run(None, {"images": batch})
    assert label.tolist() == photos[1].prediction.tolist()
    assert certified.tolist() == photos[1].certified.tolist()
    assert np.abs(margin - photos[1].margin.numpy()).max() <= 8  # a few scores may be one integer beside torch's
    assert scores.shape == (12, 10, 8, 8)
    assert 0 < certified.sum() < 12


def test_static_quantization_says_what_it_costs(exported):
    import onnx

    text = " ".join(exported[2].split())
    assert "int8.onnx: digits, vote against 2 px at 8x8" in text
    assert "on 100 images (calibrated on 100 others)" in text
    model = onnx.load(exported[0] / "int8.onnx")
    kinds = [node.op_type for node in model.graph.node]
    assert "QuantizeLinear" in kinds
    assert "DynamicQuantizeLinear" not in kinds
    # Nothing behind the network is in 8 bits.
    behind, rule = set(), []
    for node in model.graph.node:
        if node.op_type == "IsNaN" or behind & set(node.input):
            behind |= set(node.output)
            rule.append(node.op_type)
    assert len(rule) > 10
    assert not {"QuantizeLinear", "DequantizeLinear"} & set(rule)
    assert {entry.key: entry.value for entry in model.metadata_props}["quantization"] == "int8, static"


def test_the_doctor_finds_it_local(exported):
    code, out, _ = run("doctor", "digits", "--device", "cpu", "--onnx", exported[0] / "digits.onnx", "--json")
    assert (code, json.loads(out)["consequence"]) == (0, "exact")


def test_the_python_example(exported, photos):
    command = [sys.executable, EXAMPLES / "onnx_python.py", "digits.onnx", *[f"{k}.png" for k in range(12)]]
    found = subprocess.run(command, cwd=exported[0], capture_output=True, text=True, check=True).stdout.splitlines()
    for number, line in enumerate(found):
        label, certified = int(photos[1].prediction[number]), bool(photos[1].certified[number])
        proof = "no 2 px patch changes that" if certified else "not certified"
        assert line.startswith(f"{number}.png: {label}, {proof} (margin ")
    assert len(found) == 12


@pytest.mark.skipif(NODE is None, reason="the JavaScript example needs node, which is not on the path")
def test_the_javascript_example(exported, photos):
    folder, names = exported[0], [f"{number}.rgb" for number in range(12)]
    for name, pixels in zip(names, photos[0], strict=True):
        (folder / name).write_bytes(pixels.tobytes())
    code, out, _ = run("certify", *[folder / f"{number}.png" for number in range(12)], "--model", "digits", "--json")
    assert code == 0
    command = [NODE, EXAMPLES / "onnx_javascript.mjs", "digits.onnx", *names]
    lines = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, name, verdict in zip(lines, names, json.loads(out)["results"], strict=True):
        result = verdict["results"][0]
        proof = "certified" if result["certified"] else "not certified"
        found = re.fullmatch(rf"{name}: class {result['prediction']}, {proof} \(margin (-?\d+)\)", line)
        assert found, (line, result)
        assert abs(int(found[1]) - result["margin"]) <= 8  # a few scores may be one integer beside torch's

    (folder / "short.rgb").write_bytes(b"\0" * 5)
    refused = subprocess.run([*command[:3], "short.rgb"], cwd=folder, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "short.rgb: expected 3 x 64 bytes" in refused.stderr


def test_vnnlib_of_a_photo(photos, tmp_path):
    """A certified image has no counterexample at the worst placement, and the files belong to that placement."""
    pixels, found = photos
    number = int(found.certified.nonzero()[0, 0])
    Image.fromarray(pixels[number]).save(tmp_path / "photo.png")
    out = tmp_path / "p.onnx"
    code, text, err = run("export", "digits", "--vnnlib", tmp_path / "photo.png", "-o", out, "--json")
    assert (code, err) == (0, "")
    facts = json.loads(text)
    assert facts["label"] == int(found.prediction[number])
    assert facts["placement"] == found.worst_placement[number, 0].tolist()
    read = Property(out)
    top, left, height, width = facts["placement"]
    free = np.zeros((3, *pixels.shape[1:3]), dtype=bool)
    free[:, top : top + height, left : left + width] = True
    assert np.array_equal(read.high > read.low, free.ravel())
    assert not read.counter_examples()


def test_vnnlib_at_a_given_placement(photos, tmp_path):
    Image.fromarray(photos[0][0]).resize((16, 16)).save(tmp_path / "photo.png")
    arguments = ("--vnnlib", tmp_path / "photo.png", "--patch", "1", "--rule", "vote", "--at", "2,3,1,1")
    code, text, err = run("export", "digits", *arguments, "-o", tmp_path / "p.onnx")
    assert (code, err) == (0, "")
    assert "patch 1x1 at 2,3, in px of the 8x8 input" in text
    assert (tmp_path / "p.vnnlib").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--at", "2,3,1,1"), 2, "--at needs --vnnlib"),
        (("--vnnlib", "PHOTO", "--at", "2,3"), 2, "TOP,LEFT,HEIGHT,WIDTH"),
        (("--vnnlib", "PHOTO", "--at", "7,7,2,2"), 2, "within the image"),
        (("--vnnlib", "PHOTO", "--int8"), 2, "cannot be combined"),
        (("--vnnlib", "missing.png"), 5, "there is no file"),
    ],
)
def test_vnnlib_refused(photos, tmp_path, arguments, code, message):
    photo = tmp_path / "photo.png"
    Image.fromarray(photos[0][0]).save(photo)
    given = [photo if part == "PHOTO" else part for part in arguments]
    check_error(run("export", "digits", *given, "-o", tmp_path / "p.onnx"), code, message)
    assert list(tmp_path.iterdir()) == [photo]


@pytest.fixture(scope="module")
def pooling(tmp_path_factory):
    """A model that pools regions by attention, trained for a moment."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    return train(tiny.attention_recipe(), tmp_path_factory.mktemp("runs") / "run", tiny.image_set(), device="cpu")


def test_attention_pooling_is_exported(pooling, tmp_path):
    code, out, err = run("export", pooling, "-o", tmp_path / "m.onnx", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert json.loads(found["metadata"]["readout"]) == {"classes": 3, "values": 8, "heads": 2}
    assert found["check"]["maps"] > 50
    model, images = load(pooling, device="cpu"), tiny.pixels(np.arange(60) % 3, tint=120)
    expected = model.certify(images)
    batch = (images.transpose(0, 3, 1, 2) / 255).astype(np.float32)
    label, certified, margin, scores = session(tmp_path / "m.onnx").run(None, {"images": batch})
    evidence = model.score_map(images).scores.numpy()
    same = (scores == evidence).all((1, 2, 3))  # other kernels sum in another order, next to a rounding boundary
    assert same.mean() > 0.9
    assert label[same].tolist() == expected.prediction[same].tolist()
    assert certified[same].tolist() == expected.certified[same].tolist()
    assert margin[same].tolist() == expected.margin[same].tolist()
    code, out, _ = run("doctor", pooling, "--device", "cpu", "--onnx", tmp_path / "m.onnx", "--json")
    assert (code, json.loads(out)["consequence"]) == (0, "exact")


def test_attention_pooling_in_8_bits(pooling, tmp_path):
    for number, pixels in enumerate(tiny.pixels(np.arange(12) % 3)):
        folder = tmp_path / "data" / tiny.COLORS[number % 3]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    more = ("--int8", "--calibration", tmp_path / "data", "--calibration-images", 12)
    code, out, err = run("export", pooling, "-o", tmp_path / "m.onnx", *more, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["metadata"]["quantization"] == "int8, static"
    assert json.loads(out)["locality"] == "exact"


def test_attention_pooling_through_onnxruntime(pooling, tmp_path):
    Image.fromarray(tiny.pixels(np.array([1]), tint=200)[0]).save(tmp_path / "photo.png")
    certify = ("certify", tmp_path / "photo.png", "--model", pooling, "--device", "cpu", "--json", "--backend")
    verdicts = []
    for backend in ("torch", "onnxruntime"):
        code, out, err = run(*certify, backend)
        assert (code, err) == (0, "")
        verdict = json.loads(out)["results"][0]["results"][0]
        verdicts.append((verdict["prediction"], verdict["certified"]))
    assert verdicts[0] == verdicts[1]


@pytest.mark.parametrize(("rule", "reason"), [("vote", "sums over regions"), ("detection", "double-masking can")])
def test_attention_pooling_with_another_rule_refused(pooling, tmp_path, rule, reason):
    about = f"the rule {rule} cannot be exported for a model that pools regions by attention"
    check_mistake(run("export", pooling, "-o", tmp_path / "m.onnx", "--rule", rule), 2, about, reason)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--rule", "detection"), 2, "the rule detection cannot be exported"),
        (("--rule", "levine-feizi"), 2, "the rule levine-feizi cannot be exported"),
        (("--rule", "votes"), 2, "did you mean vote"),
        (("--patch", "9"), 2, "does not fit"),
        (("--patch", "two"), 2, "a patch is written"),
        (("--int8",), 2, "dynamic quantization"),
        (("--calibration", "digits"), 2, "--calibration needs --int8"),
        (("--data", "nowhere"), 2, "nowhere"),
        (("--placements", "nowhere.png"), 5, "nowhere.png"),
    ],
)
def test_mistakes_refused(tmp_path, arguments, code, message):
    check_mistake(run("export", "digits", "-o", tmp_path / "m.onnx", *arguments), code, message)
    assert list(tmp_path.iterdir()) == []


def test_outputs_refused(tmp_path):
    (tmp_path / "m.onnx").mkdir()
    (tmp_path / "file").touch()
    for name, code, message in (
        ("m.onnx", 2, "is a folder"),
        ("m.txt", 2, "must be a .onnx file"),
        ("file/m.onnx", 1, "cannot be written"),
    ):
        check_error(run("export", "digits", "-o", tmp_path / name), code, message)
