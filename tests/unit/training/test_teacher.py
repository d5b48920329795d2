"""Distillation: the targets against their formula, and the teachers that are refused."""

from pathlib import Path

import numpy as np
import pytest
import torch

from bagcert.errors import UsageError
from bagcert.nets.attention_pooling import attention_masking_loss
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.saved_model import read_model
from bagcert.threat import PatchThreatModel
from bagcert.training import losses
from bagcert.training.loop import train
from bagcert.training.objective import make_objective
from bagcert.training.recipe import Recipe
from bagcert.training.teacher import TAUGHT_LOSSES, Teacher
from tests import refused, tiny

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained teacher for each kind of aggregation."""
    folder = tmp_path_factory.mktemp("teachers")
    recipes = {"sum": tiny.recipe(loss__name="cross-entropy"), "attention": tiny.attention_recipe()}
    return {name: train(recipe, folder / name, tiny.image_set(), device="cpu") for name, recipe in recipes.items()}


def _student(**arguments: object) -> RegionScorer:
    options = {"class_names": tiny.COLORS, "image_size": (8, 8), **arguments}
    return RegionScorer(torch.nn.Sequential(torch.nn.Conv2d(3, 3, 1)), **options)


def _recipe(teacher: Path | str, **changes: object) -> Recipe:
    return tiny.recipe(**{"loss__name": "cross-entropy", "loss__teacher": str(teacher), **changes})


@pytest.mark.parametrize("kind", ["sum", "attention"])
def test_targets_mix_smoothed_labels_and_predictions(taught: dict[str, Path], kind: str) -> None:
    images = torch.from_numpy(tiny.pixels(np.array([0, 1, 2, 1]))).permute(0, 3, 1, 2).float() / 255
    labels = torch.tensor([0, 2, 1, 1])
    changes = {"loss__teacher_weight": 0.6, "loss__teacher_temperature": 3.0, "loss__label_smoothing": 0.3}
    targets = Teacher(_recipe(taught[kind], **changes).loss, _student(), CPU).targets(images, labels)
    scorer = read_model(taught[kind])[0].eval()
    with torch.no_grad():
        z = scorer(images).double()
        if kind == "sum":
            scores = z.numpy().sum((2, 3)) / (z.shape[2] * z.shape[3])
        else:
            scores = scorer.readout(scorer.readout.evidence(z.float()).sum((2, 3))).double().numpy()
    for target, label, score in zip(targets.numpy(), labels.tolist(), scores, strict=True):
        share = np.exp(score / 3) / np.exp(score / 3).sum()
        truth = np.full(3, 0.1)
        truth[label] = 0.8
        np.testing.assert_allclose(target, 0.4 * truth + 0.6 * share, atol=1e-4)
    assert not targets.requires_grad


def test_the_teacher_does_not_change(taught: dict[str, Path], tmp_path: Path) -> None:
    before = (taught["sum"] / "model.safetensors").read_bytes()
    teacher = Teacher(_recipe(taught["sum"]).loss, _student(), CPU)
    batch = torch.rand(4, 3, 8, 8)
    first = teacher.targets(batch, torch.zeros(4, dtype=torch.long))
    assert torch.equal(teacher.targets(batch, torch.zeros(4, dtype=torch.long)), first)
    train(_recipe(taught["sum"]), tmp_path, tiny.image_set(), device="cpu")
    assert (taught["sum"] / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", TAUGHT_LOSSES)
def test_targets_of_smoothed_labels(name: str, smoothing: float) -> None:
    scorer = _student()
    recipe = tiny.recipe(loss__name=name, loss__label_smoothing=smoothing)
    objective = make_objective(recipe, scorer, PatchThreatModel.parse(2, (8, 8)), CPU)
    z, labels = torch.randn(5, 3, 8, 8), torch.tensor([0, 1, 2, 2, 0])
    targets = torch.nn.functional.one_hot(labels, 3) * (1 - smoothing) + smoothing / 3
    generator = torch.Generator()
    torch.testing.assert_close(objective(z, labels, generator, targets), objective(z, labels, generator))
    other = objective(z, labels, generator, targets.roll(1, 1))
    assert not torch.allclose(other, objective(z, labels, generator))


def test_targets_in_attention_pooling() -> None:
    scorer = tiny.attention_scorer()
    z, labels = torch.randn(4, 8, 8, 8), torch.tensor([0, 1, 2, 2])
    windows = losses.window_masks(scorer.grid().windows(PatchThreatModel.parse(2, (8, 8))), CPU)
    arguments = (scorer.readout, z, labels, windows, 0.5)
    targets = torch.nn.functional.one_hot(labels, 3).float()
    torch.testing.assert_close(attention_masking_loss(*arguments, targets=targets), attention_masking_loss(*arguments))
    halves = (attention_masking_loss(*arguments, targets=targets.roll(shift, 1)) for shift in (0, 1))
    mixed = attention_masking_loss(*arguments, targets=(targets + targets.roll(1, 1)) / 2)
    torch.testing.assert_close(mixed, sum(halves) / 2)


def test_teacher_outweighs_wrong_labels(tmp_path: Path) -> None:
    """With the teacher alone in the target, the labels of the training images do not matter."""
    teacher = train(tiny.recipe(train__epochs=8), tmp_path / "teacher", tiny.image_set(200), device="cpu")
    images = tiny.image_set(200, seed=7)
    wrong = type(images)(images.name, "train", (images.labels + 1) % 3, images.class_names, images.source)
    correct = {}
    for name, changes in {"taught": {"loss__teacher": str(teacher), "loss__teacher_weight": 1.0}, "alone": {}}.items():
        recipe = tiny.recipe(loss__name="cross-entropy", train__epochs=8, **changes)
        scorer = read_model(train(recipe, tmp_path / name, wrong, device="cpu"))[0]
        z = scorer.real_scores(tiny.pixels(images.labels, seed=7))
        correct[name] = (z.mean((2, 3)).argmax(1).numpy() == images.labels).mean()
    assert correct["taught"] > 0.7 > 0.5 > correct["alone"]


@pytest.mark.parametrize(
    ("arguments", "changes", "words"),
    [
        ({"class_names": ("red", "green", "yellow")}, {}, "has other classes"),
        ({"image_size": (9, 8)}, {}, "images of another size"),
        ({"mean": (0.5,), "std": (1.0,)}, {}, "images of other channels"),
        *(
            ({}, {"loss__name": name}, f"loss.teacher needs loss.name to be one of .*; got {name}")
            for name in ("margin", "clipped", "masked-features", "interval-bounds")
        ),
    ],
)
def test_teacher_refused(taught: dict[str, Path], arguments: dict, changes: dict, words: str) -> None:
    refused(UsageError, words, Teacher, _recipe(taught["sum"], **changes).loss, _student(**arguments), CPU)


def test_unknown_teacher_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="unknown model 'no-such-model'"):
        train(_recipe("no-such-model"), tmp_path / "run", tiny.image_set(), device="cpu")
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())
