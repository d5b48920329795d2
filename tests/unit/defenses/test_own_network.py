"""Models of one's own networks: saved, loaded, moved, printed."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import bagcert
from bagcert.defenses import bagcert as module
from bagcert.defenses.bagcert import BagCert, load
from bagcert.errors import UnsoundError, UsageError
from bagcert.nets.receptive_field.module_state import is_told_by_text
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.runtimes.onnx_graph import network_key
from bagcert.nets.saved_model import CONFIG, GRAPH, WEIGHTS, ModelConfig
from bagcert.threat import PatchThreatModel
from tests import refused
from tests.command import run

pytestmark = pytest.mark.slow

SIZE, NAMES = (14, 12), ("cat", "dog", "frog")


class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3, 2), nn.BatchNorm2d(8)
        self.conv2, self.avgpool, self.fc = nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Linear(8, 3)
        nn.init.normal_(self.bn1.running_mean)

    def forward(self, x):
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.flatten(self.avgpool(x + self.conv2(x)), 1))


@pytest.fixture(scope="module")
def images():
    return torch.rand(16, 3, *SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def own(images):
    torch.manual_seed(0)
    network = bagcert.regionalize(Classifier())
    scorer = RegionScorer.from_module(network, NAMES, SIZE, scale="auto", images=images, mean=(0.4, 0.5, 0.6))
    return BagCert(scorer, patch=2)


@pytest.fixture(scope="module")
def folder(own, tmp_path_factory):
    return own.save(tmp_path_factory.mktemp("saved") / "own", name="mine")


def same(first, second):
    return all(
        torch.equal(getattr(first, name), getattr(second, name))
        for name in ("prediction", "certified", "margin", "worst_placement")
    )


def test_save_and_load(own, folder, images):
    loaded = load(folder, device="cpu")
    assert loaded.name == "mine"
    assert (loaded.rule, loaded.patch, loaded.class_names) == ("double-masking", "2", NAMES)
    assert same(loaded.certify(images), own.certify(images))
    assert np.array_equal(loaded.scorer.grid().rows_seen, own.scorer.grid().rows_seen)
    assert loaded.locality is not None


def test_save_again_as_it_is(folder, tmp_path):
    load(folder, device="cpu", checked=False).save(tmp_path / "again")
    for name in (WEIGHTS, CONFIG):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_save_needs_nothing_of_the_class(folder, images, monkeypatch):
    expected = load(folder, device="cpu", checked=False).predict(images)
    monkeypatch.setattr(Classifier, "forward", None)
    assert torch.equal(load(folder, device="cpu", checked=False).predict(images), expected)
    assert b"Classifier" not in (folder / WEIGHTS).read_bytes()


@pytest.mark.parametrize("patch", [3, (2, 3), "2*2", "area:4", "1+2x3"])
def test_save_keeps_the_patch(own, tmp_path, patch):
    saved = BagCert(own.scorer, rule="vote", patch=patch)
    loaded = load(saved.save(tmp_path), checked=False)
    assert loaded.rule == "vote"
    assert PatchThreatModel.parse(loaded.patch, SIZE) == PatchThreatModel.parse(patch, SIZE)


def test_save_refused(own, tmp_path):
    threat = PatchThreatModel.parse(2, SIZE, np.arange(14 * 12).reshape(SIZE) < 5 * 12)  # only allowed at the top
    gray = RegionScorer(nn.Conv2d(1, 3, 3), NAMES, SIZE, mean=(0.0,), std=(1.0,))
    for model, words in (
        (BagCert(own.scorer, patch=threat), "notation"),
        (BagCert(gray), "RGB"),
        (BagCert(RegionScorer(own.scorer.net, ("a\n", "b", "c"), SIZE), patch=2), "control characters"),
    ):
        refused(UsageError, words, model.save, tmp_path)


def test_save_shipped_models(tmp_path):
    digits = load("digits", checked=False)
    digits.save(tmp_path)
    assert (tmp_path / WEIGHTS).read_bytes() == (digits.folder / WEIGHTS).read_bytes()
    config = json.loads((tmp_path / CONFIG).read_text())
    kept = ModelConfig.model_validate(json.loads((digits.folder / CONFIG).read_text()))
    assert ModelConfig.model_validate(config) == kept


def test_save_changed_weights(tmp_path):
    images = torch.rand(4, 3, 8, 8)
    digits = load("digits", checked=False)
    digits.scorer.net[0].weight.data *= 1.5
    expected = digits.score_map(images).scores
    assert not torch.equal(expected, load("digits", checked=False).score_map(images).scores)
    loaded = load(digits.save(tmp_path), checked=False)
    assert loaded.config.architecture == GRAPH
    assert torch.equal(loaded.score_map(images).scores, expected)


def test_save_another_network_under_the_config(tmp_path):
    """Equal names and shapes do not make an equal network."""
    config = load("digits", checked=False).config.model_copy(update={"padded": True})
    other = config.model_copy(update={"padded": False}).build()
    saved = BagCert(other, config.rule, patch=config.patch, config=config)
    loaded = load(saved.save(tmp_path), checked=False)
    assert loaded.scorer.grid().map_size == other.grid().map_size
    assert loaded.scorer.grid().map_size != config.build().grid().map_size


def test_save_untrained_architecture(tmp_path):
    config = load("digits", checked=False).config
    torch.manual_seed(0)
    scorer = config.build()
    BagCert(scorer, config.rule, patch=1, config=config).save(tmp_path, name="fresh")
    loaded = load(tmp_path, checked=False)
    assert (loaded.config.architecture, loaded.patch, loaded.name) == (config.architecture, "1", "fresh")


def test_save_attention_pooling(tmp_path):
    facts = load("digits", checked=False).config.model_dump()
    facts |= {"head": "attention-pooling", "values": 4, "attention_heads": 2, "hidden": 3}
    config = ModelConfig.model_validate(facts)
    torch.manual_seed(0)
    BagCert(config.build(), config.rule, patch=config.patch, config=config).save(tmp_path / "a")
    loaded = load(tmp_path / "a", checked=False)
    loaded.scorer.net[0].weight.data *= 1.5
    images = torch.rand(3, 3, 8, 8)
    again = load(loaded.save(tmp_path / "b"), checked=False)
    assert again.config.architecture == GRAPH
    assert torch.equal(again.score_map(images).class_scores, loaded.score_map(images).class_scores)


@pytest.mark.parametrize("backend", ["onnxruntime"])
def test_other_backends_take_the_folder(backend, folder, images):
    loaded = load(folder, device="cpu", backend=backend)
    assert loaded.backend == backend
    near = (loaded.scorer.real_scores(images) - load(folder, checked=False).scorer.real_scores(images)).abs().max()
    assert near < 1e-4


def test_move_to_the_same_device(folder, images):
    loaded = load(folder, device="cpu")
    expected = loaded.certify(images)
    assert loaded.to("cpu") is loaded
    assert same(loaded.certify(images), expected)


def test_move_measures_locality(folder, monkeypatch):
    loaded = load(folder, device="cpu", portable=True)
    asked = []
    monkeypatch.setattr(BagCert, "check_locality", lambda self, portable=False: asked.append(portable))
    loaded.to("cpu")
    assert asked == [True]
    load(folder, device="cpu", checked=False).to(torch.device("cpu"))
    assert asked == [True]


def test_move_from_a_device_that_leaks(folder, monkeypatch):
    loaded = load(folder, device="cpu")
    moves, before = [], loaded.locality
    monkeypatch.setattr(BagCert, "_move", lambda self, device: moves.append(device.type))

    def refuse(report, portable):
        raise UnsoundError("it leaks")

    monkeypatch.setattr(module, "resolve_device", lambda name: torch.device("meta"))
    monkeypatch.setattr(module, "check_counting", lambda device: None)
    monkeypatch.setattr(module, "require_local", refuse)
    refused(UnsoundError, "it leaks", loaded.to, "cuda")
    assert moves == ["meta", "cpu"]
    assert loaded.locality is before


def test_move_of_a_cpu_backend_refused(folder, monkeypatch):
    loaded = load(folder, device="cpu", backend="onnxruntime", checked=False)
    monkeypatch.setattr(module, "resolve_device", lambda name: torch.device("meta"))
    refused(UsageError, "onnxruntime runs on the CPU", loaded.to, "cuda")


def test_move_to_no_such_device_refused(own):
    refused(UsageError, "a device must be", own.to, "tpu9")


def test_text_of_models(own, folder):
    assert repr(load(folder, device="cpu", dtype="bfloat16", checked=False)) == (
        "BagCert('mine', 3 classes, patch 2 px at 14x12, rule double-masking, torch on cpu in bfloat16)"
    )
    assert len(repr(own)) < 200


def test_text_of_score_maps(own, images):
    text = repr(own.score_map(images))
    assert text == "ScoreMap(16 images of 14x12 px, 3 classes, 6x5 regions, scores in [-2047, 2047], cpu)"


@pytest.mark.parametrize("dtype", ["bfloat16", torch.bfloat16])
def test_dtypes_by_name_or_as_torchs_own(folder, dtype):
    assert load(folder, device="cpu", dtype=dtype, checked=False).scorer.autocast_dtype == torch.bfloat16


def test_scale_of_the_largest_score(own, images):
    scores = own.score_map(images).scores
    assert scores.abs().max() == 2047
    assert (scores.abs() == 2047).sum() == 1


def test_scale_changes_alone(own, images):
    scorer = RegionScorer(own.scorer.net, NAMES, SIZE)
    z = scorer.real_scores(images)
    assert scorer.calibrate((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1)) is scorer
    assert scorer.scale != 1.0
    assert torch.equal(scorer.real_scores(images), z)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"scale": "auto"}, "needs images"),
        ({"images": torch.zeros(1, 3, *SIZE)}, "need scale"),
        ({"scale": "automatic", "images": torch.zeros(1, 3, *SIZE)}, 'a number or "auto"'),
        ({"scale": "auto", "images": torch.zeros(0, 3, *SIZE)}, "float images must be"),
        ({"scale": "auto", "images": torch.zeros(1, 3, *SIZE), "head": "binary"}, "only the fixed-point head"),
    ],
)
def test_scale_refused(changes, why):
    refused(UsageError, why, RegionScorer.from_module, nn.Conv2d(3, 3, 3), NAMES, SIZE, **changes)


def test_scale_of_zeros_refused():
    net = nn.Conv2d(3, 3, 3)
    net.requires_grad_(False).weight.zero_()
    net.bias.zero_()
    refused(UsageError, "all 0", RegionScorer(net, NAMES, SIZE).calibrate, torch.rand(2, 3, *SIZE))


class Joins(nn.Module):
    def __init__(self, join):
        super().__init__()
        self.a, self.b, self.join = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1), join

    def forward(self, x):
        x = self.a(x)
        return self.join(x, self.b(x))


def test_caches_do_not_take_one_traced_network_for_another():
    """Their texts and weights are equal; their code is not."""
    torch.manual_seed(0)
    first, second = Joins(torch.add), Joins(torch.mul)
    second.load_state_dict(first.state_dict())
    first, second = torch.fx.symbolic_trace(first), torch.fx.symbolic_trace(second)
    assert repr(first) == repr(second)
    assert network_key(first) is None
    assert network_key(nn.Sequential(second)) is None
    assert network_key(nn.Conv2d(3, 4, 1)) is not None


def test_what_a_text_does_not_tell():
    hooked, patched, scripted = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1), torch.jit.script(nn.Conv2d(3, 4, 1))
    hooked.register_forward_hook(lambda part, given, out: out.roll(1, 2))
    patched.forward = lambda x: x
    for part in (hooked, patched, scripted, Joins(torch.add)):
        assert not is_told_by_text(nn.Sequential(part))
    assert is_told_by_text(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU()))


def test_commands_take_the_folder(folder, tmp_path):
    model, photos, out = tmp_path / "model", tmp_path / "photos", tmp_path / "out.json"
    random = np.random.default_rng(0)
    for name in NAMES[:2]:
        (photos / name).mkdir(parents=True)
        for number in range(3):
            Image.fromarray(random.integers(0, 256, (*SIZE, 3), dtype=np.uint8)).save(photos / name / f"{number}.png")
    shutil.copytree(folder, model)
    for words in (
        ("certify", photos / "cat" / "0.png", "--model", model),
        ("evaluate", model, "--data", photos, "--split", "all", "--out", out),
        ("doctor", model),
        ("info", model),
        ("attack", model, "--data", photos, "--limit", "2"),
        ("export", model, "--out", tmp_path / "model.onnx"),
        ("report", out, "--out", tmp_path / "report.html"),
    ):
        done = run(*words)
        assert done.code == 0, f"{words}: {done.err}"
        if words[0] == "info":
            assert "2 px at 14x12" in done.out
