"""Model folders: what is written is what is read, and nothing else gets through."""

import errno
import json
import os
import pickle
import tracemalloc
from pathlib import Path

import pytest
import safetensors.torch
import torch

from bagcert.errors import BagcertError, UnreadableError
from bagcert.io import files
from bagcert.nets.saved_model import CONFIG, WEIGHTS, ModelConfig, read_config, read_model, weights_sha256, write_model
from tests import refused, tiny

FACTS = {
    "name": "tiny",
    "architecture": "resnet-rf5",
    "width": 8,
    "depth": 2,
    "head": "fixed-point",
    "scale": 12.5,
    "mean": [0.4, 0.5, 0.6],
    "std": [0.2, 0.2, 0.3],
    "class_names": ["cat", "dog", "frog"],
    "image_size": [8, 8],
    "rule": "vote",
    "patch": "2",
}


def config_of(**changes):
    return ModelConfig.model_validate({**FACTS, **changes})


def written(folder, **changes):
    torch.manual_seed(0)
    config = config_of(**changes)
    scorer = config.build()
    write_model(folder, scorer, config)
    return scorer, config


def rewrite_tensors(folder, change):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    (folder / WEIGHTS).write_bytes(safetensors.torch.save(tensors))


def rewrite_config(folder, **changes):
    facts = {**json.loads((folder / CONFIG).read_text()), **changes}
    (folder / CONFIG).write_text(json.dumps(facts))


@pytest.mark.parametrize("architecture", ["resnet-rf5", "resnet-rf8s2", "bagnet9"])
def test_round_trip(tmp_path, architecture):
    scorer, config = written(tmp_path, architecture=architecture, padded=False, provenance={"seed": 3})
    read, read_back = read_model(tmp_path)
    assert read_back == config
    assert not read.training
    given, found = scorer.state_dict(), read.state_dict()
    assert list(given) == list(found)
    for name, tensor in given.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert (read.scale, read.head, read.class_names) == (12.5, "fixed-point", ("cat", "dog", "frog"))
    assert all(parameter.requires_grad for parameter in read.parameters())  # as a start for fine-tuning


def test_weights_hash(tmp_path):
    written(tmp_path / "a")
    written(tmp_path / "b")
    assert weights_sha256(tmp_path / "a") == weights_sha256(tmp_path / "b")
    written(tmp_path / "c", width=9)
    assert weights_sha256(tmp_path / "a") != weights_sha256(tmp_path / "c")


def test_weights_read_are_a_copy(tmp_path):
    scorer, _ = written(tmp_path)
    read, _ = read_model(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(b"")
    assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in scorer.state_dict().items())


def test_writing_twice_leaves_two_files(tmp_path):
    written(tmp_path)
    written(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("net.0.weight"), "lacks tensor 'net.0.weight'"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "unknown tensor 'extra'"),
        (
            lambda tensors: tensors.update({"net.0.weight": torch.ones(8, 3, 5, 5)}),
            r"has shape \[8, 3, 5, 5\], expected \[8, 3, 3, 3\]",
        ),
        *[
            (
                lambda tensors, dtype=dtype: tensors.update({k: v.to(dtype) for k, v in tensors.items()}),
                f"is {dtype}, expected torch.float32",
            )
            for dtype in (torch.float64, torch.bfloat16, torch.int32)
        ],
        *[
            (
                lambda tensors, value=value: tensors["net.0.weight"].view(-1)[7:8].fill_(value),
                r"'net.0.weight' .* not finite",
            )
            for value in (float("nan"), float("inf"), -float("inf"))
        ],
        *[
            (
                lambda tensors, value=value: tensors["net.1.running_var"][3:4].fill_(value),
                r"'net.1.running_var' .* has a negative variance",
            )
            for value in (-1e-30, -1e-6, -1.0)
        ],
    ],
)
def test_tensors_refused(tmp_path, change, message):
    written(tmp_path)
    rewrite_tensors(tmp_path, change)
    refused(UnreadableError, message, read_model, tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: tensors["net.0.weight"].fill_(3e38),
        lambda tensors: tensors["net.1.running_var"].zero_(),  # of a channel that is always 0
    ],
    ids=["large weights", "no variance"],
)
def test_tensors_accepted(tmp_path, change):
    written(tmp_path)
    rewrite_tensors(tmp_path, change)
    read_model(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"PK\x03\x04" + bytes(100),
        lambda content: b"not weights\n" * 20,
        lambda content: b"\xff" * 64,
        *[lambda content, kept=kept: content[:kept] for kept in (0, 4, 100, -1)],
        *[lambda content, n=n: n.to_bytes(8, "little") + content[8:] for n in (0, 7, 8, 2**40, 2**63)],
    ],
)
def test_damaged_weights_refused(tmp_path, damage):
    written(tmp_path)
    (tmp_path / WEIGHTS).write_bytes(damage((tmp_path / WEIGHTS).read_bytes()))
    refused(UnreadableError, "not a valid safetensors file", read_model, tmp_path)


@pytest.mark.parametrize("save", [pickle.dump, torch.save])
def test_pickles_not_executed(tmp_path, save):
    written(tmp_path)
    with (tmp_path / WEIGHTS).open("wb") as file:
        save({"net.0.weight": tiny.Trap(tmp_path / "executed")}, file)
    refused(UnreadableError, "not a valid safetensors file", read_model, tmp_path)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("put", "message"), [(Path.exists, f"has no {WEIGHTS}"), (Path.mkdir, None), (os.mkfifo, WEIGHTS)]
)
def test_weights_that_are_no_file_refused(tmp_path, put, message):
    written(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    put(tmp_path / WEIGHTS)
    refused(UnreadableError, message, read_model, tmp_path)


def test_config_missing(tmp_path):
    refused(UnreadableError, rf"has no readable {CONFIG}: No such file", read_model, tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b'{"name": "tin', b"[" * 100_000, b"\xff\xfe\x00", b"[]", b"null"])
def test_config_no_json_object(tmp_path, content):
    written(tmp_path)
    (tmp_path / CONFIG).write_bytes(content)
    refused(UnreadableError, r"is not a model config: [^:]", read_config, tmp_path)


@pytest.mark.parametrize("key", FACTS)
def test_config_key_missing(tmp_path, key):
    written(tmp_path)
    facts = json.loads((tmp_path / CONFIG).read_text())
    del facts[key]
    (tmp_path / CONFIG).write_text(json.dumps(facts))
    refused(UnreadableError, f"{key}: field required", read_config, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"widht": 8}, "widht: extra inputs are not permitted"),
        ({"format": 2}, "format: input should be 1"),
        ({"width": "wide"}, "width: input should be a valid integer"),
        ({"width": 0}, "width: input should be greater than or equal to 1"),
        ({"width": 10**9}, "width: input should be less than or equal to 65536"),
        ({"width": 10**400}, "width: "),
        ({"depth": 4097}, "depth: input should be less than or equal to 4096"),
        ({"head": "softmax"}, "head: input should be 'binary', 'fixed-point' or 'attention-pooling'"),
        ({"scale": float("nan")}, "scale: "),
        ({"scale": float("inf")}, "scale: input should be a finite number"),
        ({"scale": 0}, "scale: input should be greater than 0"),
        ({"mean": [0.5, float("nan"), 0.5]}, "mean.1: input should be a finite number"),
        ({"mean": [0.5]}, "mean: list should have at least 3 items"),
        ({"std": [0.5, 0.0, 0.5]}, "std.1: input should be greater than 0"),
        ({"std": [0.5] * 4}, "mean and std must have three values .* got 3 and 4"),
        ({"class_names": ["one"]}, "class_names: list should have at least 2 items"),
        ({"class_names": "cats"}, "class_names: input should be a valid list"),
        ({"class_names": ["x"] * 100_001}, "class_names: list should have at most 100000 items"),
        ({"image_size": [8]}, "image_size"),
        ({"image_size": [0, 8]}, "image_size.0: input should be greater than or equal to 1"),
        ({"image_size": [8, 16385]}, "image_size.1: input should be less than or equal to 16384"),
        ({"architecture": "resnet-rf55"}, "unknown architecture 'resnet-rf55'; did you mean resnet-rf5"),
        ({"recipe": "digits"}, "recipe: input should be a valid dictionary"),
        ({"mean": [0.4, 1e39, 0.6]}, "mean must be finite in float32"),
        ({"scale": 1e-44}, "scale of the fixed-point head must be positive and finite"),
        ({"scale": 1e39}, "scale of the fixed-point head must be positive and finite"),
    ],
)
def test_config_refused(tmp_path, changes, message):
    written(tmp_path)
    rewrite_config(tmp_path, **changes)
    refused(UnreadableError, message, read_model, tmp_path)


def test_config_depth_refused(tmp_path):
    written(tmp_path, architecture="resnet-rf9", depth=3)
    rewrite_config(tmp_path, depth=2)
    refused(UnreadableError, r"does not describe a network: .* at least 3 blocks, got 2", read_model, tmp_path)


def test_config_of_a_huge_network_costs_nothing(tmp_path):
    written(tmp_path)
    rewrite_config(tmp_path, width=65536)  # 17 GB in every block, were it built
    tracemalloc.start()
    try:
        refused(UnreadableError, r"has shape \[8, 3, 3, 3\], expected \[65536, 3, 3, 3\]", read_model, tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 100e6
    finally:
        tracemalloc.stop()


# The tensors that the network uses are those that the config states, and fit to divide by.
@pytest.mark.parametrize("name", ["mean", "std"])
@pytest.mark.parametrize("value", [0.25, -0.25, 0.0, 1e-44, 3e38])
def test_normalization_beside_config_refused(tmp_path, name, value):
    written(tmp_path)
    rewrite_tensors(tmp_path, lambda tensors: tensors[f"normalize.{name}"].view(-1)[1:2].fill_(value))
    refused(UnreadableError, f"'normalize.{name}' .* is not the {name} that {CONFIG} states", read_model, tmp_path)


@pytest.mark.parametrize("value", [0.0, -1.0, 1e-44, 1e-60, 1e39])
def test_std_refused(tmp_path, value):
    written(tmp_path)
    rewrite_config(tmp_path, std=[0.2, value, 0.3])
    rewrite_tensors(tmp_path, lambda tensors: tensors["normalize.std"].view(-1)[1:2].fill_(min(value, 3e38)))
    refused(UnreadableError, r"std\.1: input|std must be positive and finite in float32", read_model, tmp_path)


def test_mean_in_float32_digits(tmp_path):
    mean = [0.1, 1 / 3, 0.7000000123]
    written(tmp_path, mean=mean)
    assert read_model(tmp_path)[1].mean == mean
    rewrite_config(tmp_path, mean=torch.tensor(mean).tolist())
    assert read_model(tmp_path)[1].mean == torch.tensor(mean).tolist()


def test_weights_not_finite_not_written(tmp_path):
    config = config_of()
    scorer = config.build()
    scorer.net[0].weight.data[0] = torch.nan
    with pytest.raises(BagcertError, match=r"'net.0.weight' has values that are not finite") as caught:
        write_model(tmp_path / "new", scorer, config)
    assert caught.value.exit_code == 1
    assert not (tmp_path / "new").exists()


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file" / "model", Path("/proc/no-model-here")):
        refused(BagcertError, "cannot be written: ", write_model, folder, config_of().build(), config_of())
    assert (tmp_path / "file").read_text() == "in the way"


@pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
def test_full_disk_leaves_what_was_there(tmp_path, monkeypatch, failing):
    written(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    other = config_of(width=9)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files.os, failing, full)
    refused(BagcertError, "cannot be written: No space left on device", write_model, tmp_path, other.build(), other)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def fail_at_the_config(monkeypatch, error):
    """Between the two files."""
    replaced = os.replace

    def replace(source, target):
        if Path(target).name == CONFIG:
            raise error
        replaced(source, target)

    monkeypatch.setattr(files.os, "replace", replace)


def test_disk_that_fills_between_the_files(tmp_path, monkeypatch):
    fail_at_the_config(monkeypatch, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    refused(BagcertError, "No space left", written, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    refused(UnreadableError, f"no readable {CONFIG}", read_model, tmp_path)


def test_kill_between_the_files_mixes_no_models(tmp_path, monkeypatch):
    written(tmp_path)
    fail_at_the_config(monkeypatch, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path, name="other", scale=3.0)
    refused(UnreadableError, f"no readable {CONFIG}", read_model, tmp_path)


@pytest.mark.parametrize("where", ["name", "architecture", "rule", "patch"])
def test_control_characters_refused(tmp_path, where):
    written(tmp_path)
    rewrite_config(tmp_path, **{where: "tiny\x1b[2J\nsecond line"})
    said = refused(UnreadableError, "control characters", read_model, tmp_path)
    assert "\x1b" not in said


def test_config_too_large_refused(tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setattr("bagcert.nets.saved_model.MAX_CONFIG_BYTES", 100)
    refused(UnreadableError, f"no readable {CONFIG}|{CONFIG}", read_config, tmp_path)


def test_weights_too_large_refused(tmp_path, monkeypatch):
    written(tmp_path)
    monkeypatch.setattr("bagcert.nets.saved_model.MAX_WEIGHTS_BYTES", 100)
    refused(UnreadableError, WEIGHTS, read_model, tmp_path)


def test_config_nan_refused(tmp_path):
    written(tmp_path)
    text = (tmp_path / CONFIG).read_text().replace('"provenance": {', '"provenance": {"seconds": NaN')
    (tmp_path / CONFIG).write_text(text)
    refused(UnreadableError, CONFIG, read_config, tmp_path)
