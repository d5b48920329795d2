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


class TestRoundTrip:
    @pytest.mark.parametrize("architecture", ["resnet-rf5", "resnet-rf8s2", "bagnet9"])
    def test_it_is_equal_bit_for_bit(self, tmp_path, architecture):
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

    def test_the_same_weights_have_the_same_hash(self, tmp_path):
        written(tmp_path / "a")
        written(tmp_path / "b")
        assert weights_sha256(tmp_path / "a") == weights_sha256(tmp_path / "b")
        written(tmp_path / "c", width=9)
        assert weights_sha256(tmp_path / "a") != weights_sha256(tmp_path / "c")

    def test_what_is_read_does_not_hang_on_the_file(self, tmp_path):
        scorer, _ = written(tmp_path)
        read, _ = read_model(tmp_path)
        (tmp_path / WEIGHTS).write_bytes(b"")
        assert all(torch.equal(read.state_dict()[name], tensor) for name, tensor in scorer.state_dict().items())

    def test_only_two_files_are_left(self, tmp_path):
        written(tmp_path)
        written(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


class TestWeights:
    def test_missing(self, tmp_path):
        written(tmp_path)
        (tmp_path / WEIGHTS).unlink()
        with pytest.raises(UnreadableError, match=f"has no {WEIGHTS}"):
            read_model(tmp_path)

    def test_a_tensor_too_few(self, tmp_path):
        written(tmp_path)
        rewrite_tensors(tmp_path, lambda tensors: tensors.pop("net.0.weight"))
        with pytest.raises(UnreadableError, match=r"lacks tensor 'net.0.weight'"):
            read_model(tmp_path)

    def test_a_tensor_too_many(self, tmp_path):
        written(tmp_path)
        rewrite_tensors(tmp_path, lambda tensors: tensors.update(extra=torch.ones(1)))
        with pytest.raises(UnreadableError, match="unknown tensor 'extra'"):
            read_model(tmp_path)

    def test_a_tensor_of_another_shape(self, tmp_path):
        written(tmp_path)
        rewrite_tensors(tmp_path, lambda tensors: tensors.update({"net.0.weight": torch.ones(8, 3, 5, 5)}))
        with pytest.raises(UnreadableError, match=r"has shape \[8, 3, 5, 5\], expected \[8, 3, 3, 3\]"):
            read_model(tmp_path)

    @pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
    def test_values_that_are_not_finite(self, tmp_path, value):
        written(tmp_path)
        rewrite_tensors(tmp_path, lambda tensors: tensors["net.0.weight"].view(-1)[7:8].fill_(value))
        with pytest.raises(UnreadableError, match=r"'net.0.weight' .* not finite"):
            read_model(tmp_path)

    def test_large_finite_values_are_fine(self, tmp_path):
        written(tmp_path)
        rewrite_tensors(tmp_path, lambda tensors: tensors["net.0.weight"].fill_(3e38))
        read_model(tmp_path)

    @pytest.mark.parametrize("kept", [0, 4, 100, -1])
    def test_truncated(self, tmp_path, kept):
        written(tmp_path)
        content = (tmp_path / WEIGHTS).read_bytes()
        (tmp_path / WEIGHTS).write_bytes(content[:kept])
        with pytest.raises(UnreadableError, match="not a valid safetensors file"):
            read_model(tmp_path)

    @pytest.mark.parametrize("content", ["pickle", "torch.save", "zip", "text", "huge header"])
    def test_other_files_by_that_name_are_refused_and_not_executed(self, tmp_path, content):
        written(tmp_path)
        traces = tmp_path / "executed"

        class Trap:
            def __reduce__(self):
                return os.mkdir, (str(traces),)

        path = tmp_path / WEIGHTS
        if content == "torch.save":
            torch.save({"net.0.weight": Trap()}, path)
        else:
            pieces = {"zip": b"PK\x03\x04" + bytes(100), "text": b"not weights\n" * 20, "huge header": b"\xff" * 64}
            path.write_bytes(pickle.dumps(Trap()) if content == "pickle" else pieces[content])
        with pytest.raises(UnreadableError, match="not a valid safetensors file"):
            read_model(tmp_path)
        assert not traces.exists()

    def test_a_folder_by_that_name(self, tmp_path):
        written(tmp_path)
        (tmp_path / WEIGHTS).unlink()
        (tmp_path / WEIGHTS).mkdir()
        with pytest.raises(UnreadableError):
            read_model(tmp_path)


class TestConfig:
    def test_missing(self, tmp_path):
        with pytest.raises(UnreadableError, match=rf"has no readable {CONFIG}: No such file"):
            read_model(tmp_path)

    @pytest.mark.parametrize("content", [b"", b"{", b'{"name": "tin', b"[" * 100_000, b"\xff\xfe\x00", b"[]", b"null"])
    def test_not_a_json_object(self, tmp_path, content):
        written(tmp_path)
        (tmp_path / CONFIG).write_bytes(content)
        with pytest.raises(UnreadableError, match=r"is not a model config: [^:]"):
            read_config(tmp_path)

    @pytest.mark.parametrize("key", FACTS)
    def test_a_key_is_missing(self, tmp_path, key):
        written(tmp_path)
        facts = json.loads((tmp_path / CONFIG).read_text())
        del facts[key]
        (tmp_path / CONFIG).write_text(json.dumps(facts))
        with pytest.raises(UnreadableError, match=f"{key}: field required"):
            read_config(tmp_path)

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
        ],
    )
    def test_what_is_wrong_is_named(self, tmp_path, changes, message):
        written(tmp_path)
        rewrite_config(tmp_path, **changes)
        with pytest.raises(UnreadableError, match=message) as caught:
            read_model(tmp_path)
        assert len(str(caught.value).splitlines()) == 1

    def test_a_depth_the_architecture_cannot_have(self, tmp_path):
        written(tmp_path, architecture="resnet-rf9", depth=3)
        rewrite_config(tmp_path, depth=2)
        with pytest.raises(UnreadableError, match=r"does not describe a network: .* at least 3 blocks, got 2"):
            read_model(tmp_path)

    def test_a_config_that_claims_too_much_costs_nothing(self, tmp_path):
        written(tmp_path)
        rewrite_config(tmp_path, width=65536)  # 17 GB in every block, were it built
        tracemalloc.start()
        try:
            with pytest.raises(UnreadableError, match=r"has shape \[8, 3, 3, 3\], expected \[65536, 3, 3, 3\]"):
                read_model(tmp_path)
            assert tracemalloc.get_traced_memory()[1] < 100e6
        finally:
            tracemalloc.stop()


class TestNormalization:
    """The tensors that the network uses are those that the config states, and fit to divide by."""

    @pytest.mark.parametrize("name", ["mean", "std"])
    @pytest.mark.parametrize("value", [0.25, -0.25, 0.0, 1e-44, 3e38])
    def test_tensors_beside_the_config_are_refused(self, tmp_path, name, value):
        written(tmp_path)
        rewrite_tensors(tmp_path, lambda tensors: tensors[f"normalize.{name}"].view(-1)[1:2].fill_(value))
        with pytest.raises(UnreadableError, match=f"'normalize.{name}' .* is not the {name} that {CONFIG} states"):
            read_model(tmp_path)

    @pytest.mark.parametrize("value", [0.0, -1.0, 1e-44, 1e-60, 1e39])
    def test_deviations_that_float32_cannot_divide_by_are_refused(self, tmp_path, value):
        written(tmp_path)
        rewrite_config(tmp_path, std=[0.2, value, 0.3])
        rewrite_tensors(tmp_path, lambda tensors: tensors["normalize.std"].view(-1)[1:2].fill_(min(value, 3e38)))
        with pytest.raises(UnreadableError, match=r"std\.1: input|std must be positive and finite in float32"):
            read_model(tmp_path)

    def test_means_that_float32_does_not_hold_are_refused(self, tmp_path):
        written(tmp_path)
        rewrite_config(tmp_path, mean=[0.4, 1e39, 0.6])
        with pytest.raises(UnreadableError, match="mean must be finite in float32"):
            read_model(tmp_path)

    @pytest.mark.parametrize("scale", [1e-44, 1e39])
    def test_a_scale_that_float32_does_not_hold_is_refused(self, tmp_path, scale):
        written(tmp_path)
        rewrite_config(tmp_path, scale=scale)
        with pytest.raises(UnreadableError, match="scale of the fixed-point head must be positive and finite"):
            read_model(tmp_path)

    def test_as_many_digits_as_float32_holds_are_enough(self, tmp_path):
        mean = [0.1, 1 / 3, 0.7000000123]
        written(tmp_path, mean=mean)
        assert read_model(tmp_path)[1].mean == mean
        rewrite_config(tmp_path, mean=torch.tensor(mean).tolist())
        assert read_model(tmp_path)[1].mean == torch.tensor(mean).tolist()

    @pytest.mark.parametrize("value", [-1e-30, -1e-6, -1.0])
    def test_negative_variances_are_refused(self, tmp_path, value):
        written(tmp_path)
        rewrite_tensors(tmp_path, lambda tensors: tensors["net.1.running_var"][3:4].fill_(value))
        with pytest.raises(UnreadableError, match=r"'net.1.running_var' .* has a negative variance"):
            read_model(tmp_path)

    def test_a_variance_of_nothing_is_fine(self, tmp_path):
        """That of a channel which is always 0; batch norm adds to it before it divides."""
        written(tmp_path)
        rewrite_tensors(tmp_path, lambda tensors: tensors["net.1.running_var"].zero_())
        read_model(tmp_path)


class TestWriting:
    def test_weights_that_are_not_finite_are_not_written(self, tmp_path):
        config = config_of()
        scorer = config.build()
        scorer.net[0].weight.data[0] = torch.nan
        with pytest.raises(BagcertError, match=r"'net.0.weight' has values that are not finite") as caught:
            write_model(tmp_path / "new", scorer, config)
        assert caught.value.exit_code == 1
        assert not (tmp_path / "new").exists()

    def test_a_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        config = config_of()
        with pytest.raises(BagcertError, match="cannot be written: "):
            write_model(tmp_path / "file" / "model", config.build(), config)
        assert (tmp_path / "file").read_text() == "in the way"

    def test_a_folder_that_cannot_be_written(self):
        config = config_of()
        with pytest.raises(BagcertError, match="cannot be written: "):
            write_model(Path("/proc/no-model-here"), config.build(), config)

    @pytest.mark.parametrize("failing", ["fsync", "replace", "chmod"])
    def test_a_full_disk_leaves_what_was_there(self, tmp_path, monkeypatch, failing):
        written(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        other = config_of(width=9)

        def full(*args, **kwargs):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(files.os, failing, full)
        with pytest.raises(BagcertError, match="cannot be written: No space left on device"):
            write_model(tmp_path, other.build(), other)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_a_disk_that_fills_between_the_files_leaves_whole_ones(self, tmp_path, monkeypatch):
        replaced = os.replace

        def full_for_the_config(source, target):
            if Path(target).name == CONFIG:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replaced(source, target)

        monkeypatch.setattr(files.os, "replace", full_for_the_config)
        with pytest.raises(BagcertError, match="No space left"):
            written(tmp_path)
        monkeypatch.undo()
        assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
        with pytest.raises(UnreadableError, match=f"no readable {CONFIG}"):
            read_model(tmp_path)

    def test_a_kill_between_the_files_never_leaves_two_models_mixed(self, tmp_path, monkeypatch):
        written(tmp_path)
        other = config_of(name="other", scale=3.0)
        replaced = os.replace

        def killed_at_the_config(source, target):
            if Path(target).name == CONFIG:
                raise KeyboardInterrupt
            replaced(source, target)

        monkeypatch.setattr(files.os, "replace", killed_at_the_config)
        with pytest.raises(KeyboardInterrupt):
            write_model(tmp_path, other.build(), other)
        monkeypatch.undo()
        with pytest.raises(UnreadableError, match=f"no readable {CONFIG}"):
            read_model(tmp_path)


class TestHostile:
    @pytest.mark.parametrize("where", ["name", "architecture", "rule", "patch"])
    def test_names_that_would_move_a_cursor_are_refused(self, tmp_path, where):
        written(tmp_path)
        rewrite_config(tmp_path, **{where: "tiny\x1b[2J\nsecond line"})
        with pytest.raises(UnreadableError, match="control characters") as caught:
            read_model(tmp_path)
        assert "\x1b" not in str(caught.value)
        assert "\n" not in str(caught.value)

    def test_a_config_as_large_as_no_config_is_not_read(self, tmp_path, monkeypatch):
        written(tmp_path)
        monkeypatch.setattr("bagcert.nets.saved_model.MAX_CONFIG_BYTES", 100)
        with pytest.raises(UnreadableError, match=f"no readable {CONFIG}|{CONFIG}"):
            read_config(tmp_path)

    def test_weights_as_large_as_no_weights_are_not_read(self, tmp_path, monkeypatch):
        written(tmp_path)
        monkeypatch.setattr("bagcert.nets.saved_model.MAX_WEIGHTS_BYTES", 100)
        with pytest.raises(UnreadableError, match=WEIGHTS):
            read_model(tmp_path)

    def test_a_pipe_in_place_of_a_file_does_not_hang(self, tmp_path):
        written(tmp_path)
        (tmp_path / WEIGHTS).unlink()
        os.mkfifo(tmp_path / WEIGHTS)
        with pytest.raises(UnreadableError, match=WEIGHTS):
            read_model(tmp_path)

    @pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int32])
    def test_tensors_of_another_type_are_refused(self, tmp_path, dtype):
        written(tmp_path)
        rewrite_tensors(tmp_path, lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items()}))
        with pytest.raises(UnreadableError, match=f"is {dtype}, expected torch.float32"):
            read_model(tmp_path)

    @pytest.mark.parametrize("length", [0, 7, 8, 2**40, 2**63])
    def test_headers_that_claim_another_length_are_refused(self, tmp_path, length):
        written(tmp_path)
        content = (tmp_path / WEIGHTS).read_bytes()
        (tmp_path / WEIGHTS).write_bytes(length.to_bytes(8, "little") + content[8:])
        with pytest.raises(UnreadableError, match="not a valid safetensors file"):
            read_model(tmp_path)

    def test_facts_that_cannot_be_printed_as_json_are_refused(self, tmp_path):
        written(tmp_path)
        text = (tmp_path / CONFIG).read_text().replace('"provenance": {', '"provenance": {"seconds": NaN')
        (tmp_path / CONFIG).write_text(text)
        with pytest.raises(UnreadableError, match=CONFIG):
            read_config(tmp_path)
