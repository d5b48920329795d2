"""`bagcert doctor`: what it prints, and how it exits."""

import json

import pytest
import torch
from torch import nn

from bagcert.defenses.bagcert import load
from bagcert.errors import UnreadableError, UnsoundError, UsageError
from bagcert.locality import measure_onnx
from tests.command import check_error, run


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The digits model as ONNX: float32, of bytes, of one image at a time, quantized dynamically; and others."""
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    from onnxruntime.quantization import QuantType, quantize_dynamic

    folder = tmp_path_factory.mktemp("onnx")
    scorer = load("digits", device="cpu").scorer.to(memory_format=torch.contiguous_format)

    class Bytes(nn.Module):
        def forward(self, images):
            return scorer(images.permute(0, 3, 1, 2).float() / 255)

    class Sums(nn.Module):
        def forward(self, images):
            return scorer(images).sum((2, 3))

    size = scorer.image_size
    floats, one, octets = torch.rand(2, 3, *size), torch.rand(1, 3, *size), torch.zeros(2, *size, 3, dtype=torch.uint8)
    batch = ({0: torch.export.Dim("batch")},)
    for name, net, example, shapes in (
        ("float", scorer, floats, batch),
        ("bytes", Bytes(), octets, batch),
        ("one", scorer, one, None),
        ("sums", Sums(), floats, batch),
        ("smaller", nn.Conv2d(3, 10, 3), floats, batch),
    ):
        program = torch.onnx.export(net.eval(), (example,), dynamic_shapes=shapes, dynamo=True, verbose=False)
        program.save(str(folder / f"{name}.onnx"))
    quantize_dynamic(folder / "float.onnx", folder / "int8.onnx", weight_type=QuantType.QUInt8)
    (folder / "garbage.onnx").write_bytes(b"no model")
    return folder


def test_a_shipped_model_is_measured(files, monkeypatch, tmp_path):
    monkeypatch.setenv("BAGCERT_CACHE", str(tmp_path))
    code, out, err = run("doctor", "digits", "--device", "cpu", "--data", "digits", "--images", 60, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert next(iter(found)) == "schema_version"
    assert (found["model"], found["dtype"], found["footprint"]) == ("digits", "float32", "equal")
    assert found["consequence"] in ("exact", "guarded")
    kinds = {probe["kind"] for probe in found["probes"]}
    assert kinds == {"leak", "NaN", "drift"}
    rows = found["cost"]
    assert [row["guard"] for row in rows] == ["none", "leak", "leak and drift"]
    assert rows[0]["certified_accuracy"] > 0.3
    assert rows[0]["certified_accuracy"] >= rows[1]["certified_accuracy"] >= rows[2]["certified_accuracy"]
    assert rows[2]["tolerance_z"] >= 4 * max(found["leak_z"], found["drift_z"]) * 0.999
    # What it found is what loading goes by from now on.
    assert len(list(tmp_path.rglob("*.json"))) == 1
    assert load("digits", device="cpu").locality.thorough


def test_the_table_says_what_it_means():
    code, out, err = run("doctor", "digits", "--device", "cpu", "--dtype", "bfloat16", "--patch", "3")
    assert (code, err) == (0, "")
    text = " ".join(out.split())
    parts = ("digits: torch on cpu, bfloat16, patches of 3x3 px", "footprint:", "adversarial", "within one", "across")
    for part in parts:
        assert part in text


@pytest.mark.parametrize("name", ["float", "bytes", "one"])
def test_an_onnx_file_of_a_local_net_is_fine(files, name):
    report = measure_onnx(files / f"{name}.onnx", load("digits", device="cpu"))
    assert report.consequence in ("exact", "guarded"), report.reason
    assert report.backend == "onnxruntime"
    assert report.largest_score > 1
    kinds = {probe.kind for probe in report.probes}
    assert ("NaN" in kinds) == (name != "bytes")
    assert any("threads" in probe.name for probe in report.probes)
    assert any("instead of 64" in probe.name for probe in report.probes) == (name != "one")


def test_an_onnx_file_quantized_dynamically_is_refused(files):
    code, out, err = run("doctor", "digits", "--device", "cpu", "--onnx", files / "int8.onnx", "--json")
    assert code == 4
    assert "int8.onnx is refused: int8.onnx is quantized dynamically" in err
    found = json.loads(out)
    assert found["consequence"] == "refused"
    assert found["cost"] == []
    # Its name is not all there is against it.
    assert found["leak_z"] > 1e-4 * found["largest_score"]
    assert found["leak_levels"] > 0


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("garbage", UnreadableError, "is not an ONNX model"),
        ("missing", UnreadableError, "cannot be read"),
        ("sums", UsageError, "no output of four dimensions"),
        ("smaller", UnsoundError, "returns a map of"),
    ],
)
def test_other_files_are_refused_in_a_sentence(files, name, error, message):
    with pytest.raises(error, match=message):
        measure_onnx(files / f"{name}.onnx", load("digits", device="cpu"))
    code, out, err = run("doctor", "digits", "--device", "cpu", "--onnx", files / f"{name}.onnx")
    assert (code, out) == (error.exit_code, "")
    assert len(err.splitlines()) == 1


def test_patch_too_large_refused():
    check_error(run("doctor", "digits", "--device", "cpu", "--patch", "9"), 2, "does not fit")
