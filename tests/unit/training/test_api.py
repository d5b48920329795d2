"""`bagcert.train`: recipes and networks of one's own."""

from pathlib import Path

import pytest
import torch
from torch import nn

import bagcert
from bagcert.data import load_dataset
from bagcert.errors import UnsoundError, UsageError
from bagcert.nets.region_scorer import RegionScorer
from tests import refused, tiny

FAST = {
    "train.batch_size": 32,
    "train.ema": 0.9,
    "train.precision": "fp32",
    "optimizer.learning_rate": 0.02,
    "augment.crop": 0,
}


class _Functional(nn.Module):
    """Not a sequence, and in train mode different from eval mode."""

    def __init__(self, classes: int, padding: int = 0) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 32, 4, padding=padding)
        self.norm = nn.BatchNorm2d(32)
        self.last = nn.Conv2d(32, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.norm(self.first(x)))
        return self.last(y + 0.5)


def test_train_own_module_on_digits(tmp_path: Path) -> None:
    network = _Functional(10)
    before = network.last.weight.detach().clone()
    model = bagcert.train(network, "digits", patch=1, epochs=8, out=tmp_path / "run", device="cpu", settings=FAST)
    images = load_dataset("digits", "test", 120)
    certificate = model.certify(images.array())
    right = certificate.prediction == torch.from_numpy(images.labels)
    assert right.float().mean() > 0.6
    assert (right & certificate.certified).float().mean() > 0.15
    assert model.scorer.net is network, "it is trained in place"
    assert not torch.equal(network.last.weight, before)
    assert not network.training
    assert model.scorer.scale != 1.0
    assert (model.patch, model.class_names) == ("1", images.class_names)
    assert model.locality is not None
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["metrics.jsonl", "module.safetensors", "recipe.toml"]


def test_train_own_module_resumed_is_exact(tmp_path: Path) -> None:
    def trained(folder: Path, stop: int | None, resume: bool) -> dict:
        torch.manual_seed(5)
        network = _Functional(3)

        def watch(at) -> None:
            if at.step == stop:
                raise RuntimeError("the process died")

        options = {"epochs": 3, "out": folder, "resume": resume, "on_progress": watch}
        bagcert.train(network, tiny.image_set(), patch=1, device="cpu", settings=FAST, **options)
        return network.state_dict()

    whole = trained(tmp_path / "whole", None, resume=False)
    with pytest.raises(RuntimeError, match="died"):
        trained(tmp_path / "stopped", 2, resume=False)
    resumed = trained(tmp_path / "stopped", None, resume=True)
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_train_scorer_with_attention_readout(tmp_path: Path) -> None:
    scorer = tiny.attention_scorer()
    model = bagcert.train(scorer, tiny.image_set(), patch=2, epochs=1, device="cpu", settings=FAST)
    assert model.scorer is scorer
    assert model.certify(tiny.image_set().array()).margin.shape == (60,)


def test_train_module_not_local_refused() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1))
    refused(UnsoundError, None, bagcert.train, network, tiny.image_set(), patch=1, epochs=1, device="cpu")
    assert network.training


@pytest.mark.parametrize(
    ("what", "options", "words"),
    [
        (_Functional(3), {"data": None}, "give data"),
        (_Functional(3), {"patch": 7}, "no image could ever be certified"),
        (_Functional(4), {}, "4 output channels for 3 class names"),
        (_Functional(3), {"epochs": 1, "minutes": 1}, "give one of them"),
        (_Functional(3), {"settings": {"train.epoch": 3}}, "did you mean train.epochs"),
        (tiny.attention_scorer(names=("a", "b", "c")), {}, "different classes"),
    ],
)
def test_train_refuses_in_a_sentence(what: nn.Module, options: dict, words: str) -> None:
    refused(UsageError, words, bagcert.train, what, **{"data": tiny.image_set(), "device": "cpu", **options})


def test_train_by_recipe_and_by_recipe_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = bagcert.train(tiny.recipe(), tiny.image_set(), patch=(1, 2), epochs=1, device="cpu")
    assert (model.name, model.patch, model.image_size) == ("tiny", "1x2", (8, 8))
    assert (tmp_path / "runs" / "tiny" / "config.json").exists()
    small = {"model.width": 8, "model.depth": 1}
    model = bagcert.train("photos", tiny.image_set(), size=16, patch="1%", epochs=1, device="cpu", settings=small)
    assert (model.name, model.image_size, model.scorer.head) == ("photos", (16, 16), "attention-pooling")
    assert isinstance(model.scorer, RegionScorer)
