"""Training: repeatable, resumable, and clear about what goes wrong."""

import json
import os
import pickle
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from bagcert.data import load_dataset
from bagcert.data.image_set import ArraySource, ImageSet
from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.nets.saved_model import read_model
from bagcert.training import loop as training
from bagcert.training import optimizers, setup, step
from bagcert.training.augment import cutout
from bagcert.training.batches import epoch_order
from bagcert.training.data import load_sources, load_training_data
from bagcert.training.loop import train
from bagcert.training.losses import cross_entropy_loss
from bagcert.training.objective import hardest_cutout
from bagcert.training.recipe import load_recipe
from tests import tiny

STEPS = 12  # of the tiny recipe: 60 images, 6 held out, batches of 9, 2 epochs


def _losses(monkeypatch: pytest.MonkeyPatch, folder: Path, recipe=None, images=None, **options) -> list[float]:
    """Trains and gives the loss of every step."""
    monkeypatch.setattr(training, "CHECK_LOSS_EVERY", 1)
    losses: list[float] = []
    train(
        recipe or tiny.recipe(),
        folder,
        images or tiny.image_set(),
        device="cpu",
        on_progress=lambda at: losses.append(at.loss),
        **options,
    )
    return losses


def _weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def _refused(words: str, folder: Path, images=None, error=UsageError, recipe=(), **options) -> None:
    """Training by a tiny recipe with these changes ends in one sentence with these words."""
    with pytest.raises(error) as raised:
        train(tiny.recipe(**dict(recipe)), folder, images or tiny.image_set(), **{"device": "cpu", **options})
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 300


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of the tiny recipe."""
    return train(tiny.recipe(), tmp_path_factory.mktemp("whole"), tiny.image_set(), device="cpu")


def test_run_folder(whole: Path) -> None:
    names = sorted(path.name for path in whole.iterdir())
    assert names == ["config.json", "metrics.jsonl", "model.safetensors", "recipe.toml"]
    assert load_recipe(str(whole / "recipe.toml")) == tiny.recipe()
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert [(line["epoch"], line["step"]) for line in lines] == [(1, 6), (2, STEPS)]
    for line in lines:
        assert line["loss"] > 0
        assert line["validation_images"] == 6
        assert 0 <= line["certified_accuracy"] <= line["clean_accuracy"] <= 1
    config = read_model(whole)[1]
    assert config.class_names == list(tiny.COLORS)
    assert config.provenance["training_images"] == 54


def test_seed_decides_weights(whole: Path, tmp_path: Path) -> None:
    again = train(tiny.recipe(), tmp_path / "again", tiny.image_set(), device="cpu")
    other = train(tiny.recipe(train__seed=1), tmp_path / "other", tiny.image_set(), device="cpu")
    assert _weights(again) == _weights(whole)
    assert _weights(other) != _weights(whole)


@pytest.mark.parametrize("after", [4, 5, 6, 9, 11])
def test_resume_after_any_step(whole: Path, tmp_path: Path, after: int) -> None:
    folder = tiny.stopped_run(tmp_path, after)
    assert (folder / "model.safetensors").exists() == (after >= 6)  # the first epoch ends there and is validated
    train(tiny.recipe(), folder, tiny.image_set(), resume=True, device="cpu")
    assert _weights(folder) == _weights(whole)
    assert not (folder / "checkpoint.pt").exists()
    metrics, expected = (
        [{**json.loads(line), "seconds": 0} for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (folder, whole)
    )
    assert metrics == expected


CLI_RECIPE = """
name = "small"
model = { architecture = "resnet-rf3", width = 8, depth = 1 }
defense = { rule = "vote", patch = "1" }
augment = { crop = 1, flip = false }
train = { epochs = 8, batch_size = 12, ema = 0.9, precision = "fp32", checkpoint_every = 3, validate_every = 8 }
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A recipe file, and the weights it leads to on 200 digits."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "small.toml").write_text(CLI_RECIPE)
    train(load_recipe(str(folder / "small.toml")), folder / "whole", "digits", limit=200, device="cpu")
    return folder / "small.toml", _weights(folder / "whole")


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_resume_after_kill_and_ctrl_c(small, tmp_path: Path, number: signal.Signals) -> None:
    recipe, expected = small
    out = tmp_path / "run"
    arguments = ["train", str(recipe), "--data", "digits", "--limit", "200", "--out", str(out), "--device", "cpu"]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "bagcert", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.001)
    process.send_signal(number)
    message = process.communicate(timeout=120)[1]
    if number == signal.SIGINT:
        assert process.returncode == 1
        assert message.splitlines()[-1].startswith("Error: interrupted at step")
        provenance = read_model(out)[1].provenance  # the model so far can be used
        assert 0 < provenance["steps"] < provenance["steps_planned"]
    else:
        assert process.returncode == -signal.SIGKILL
        assert not (out / "model.safetensors").exists(), "it was stopped before its end"
    train(load_recipe(str(recipe)), out, "digits", resume=True, limit=200, device="cpu")
    assert _weights(out) == expected


def test_resume_refused_for_another_run(tmp_path: Path) -> None:
    tiny.stopped_run(tmp_path, 5)
    before = (tmp_path / "checkpoint.pt").read_bytes()
    _refused("--resume", tmp_path)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    _refused("another recipe", tmp_path, recipe={"optimizer__learning_rate": 0.02}, resume=True)
    _refused("other data or another limit", tmp_path, images=tiny.image_set(40), resume=True)


def test_resume_without_an_unfinished_run_refused(whole: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / "nothing", whole):
        _refused("no unfinished run", folder, resume=True)


def test_checkpoint_damaged(tmp_path: Path) -> None:
    checkpoint = tiny.stopped_run(tmp_path, 5) / "checkpoint.pt"
    good = checkpoint.read_bytes()
    state = torch.load(checkpoint, weights_only=True)
    del state["optimizer"]
    torch.save(state, tmp_path / "incomplete")
    for content in (
        b"",
        b"not a checkpoint",
        good[: len(good) // 2],
        pickle.dumps(tiny.Trap(tmp_path / "sprung")),
        pickle.dumps(7),
        (tmp_path / "incomplete").read_bytes(),
    ):
        checkpoint.write_bytes(content)
        _refused("checkpoint.pt is damaged", tmp_path, error=UnreadableError, resume=True)
        assert checkpoint.read_bytes() == content
    assert not (tmp_path / "sprung").exists()


def test_loss_not_finite_keeps_checkpoint(tmp_path: Path) -> None:
    exploding = {"optimizer__learning_rate": 1e30, "train__checkpoint_every": 1}
    _refused("not finite at step", tmp_path, recipe=exploding, error=BagcertError)
    assert not (tmp_path / "model.safetensors").exists()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


def test_weights_not_finite_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def breaking(recipe, scorer, threat, device):
        calls = iter(range(100))

        def objective(z, labels, generator, targets):
            if next(calls) < 5:
                return z.square().mean((1, 2, 3))
            return (z * 0).abs().sqrt().mean((1, 2, 3))  # 0, with the gradient inf * 0

        return objective

    monkeypatch.setattr(step, "make_objective", breaking)
    with pytest.raises(BagcertError, match="not finite at step 6"):
        train(tiny.recipe(train__checkpoint_every=1), tmp_path, tiny.image_set(), device="cpu")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert state["step"] == 5
    assert all(tensor.isfinite().all() for tensor in state["model"].values())


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__name": "sgd", "optimizer__gradient_clip": 1.0},
        {"optimizer__name": "muon", "optimizer__learning_rate": 0.02},
        {"loss__name": "margin", "model__head": "binary", "train__ema": 0.0},
        {"loss__name": "smooth-margin", "loss__one_hot_penalty": 0.1, "model__head": "binary"},
        {"loss__name": "double-masking", "model__head": "binary", "loss__label_smoothing": 0.1},
        {"augment__cutout": 2, "augment__crop_mode": "zero", "data__class_weights": True},
        {"train__precision": "bf16", "model__padded": False, "defense__rule": "double-masking"},
        {"model__image_size": [12, 10], "defense__patch": "2x3"},
        {"augment__resized_crop": 0.5, "augment__resize": 12, "model__image_size": [10, 9]},
    ],
    ids=lambda changes: " ".join(f"{key}={value}" for key, value in changes.items()),
)
def test_options_lower_the_loss(changes: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses = _losses(monkeypatch, tmp_path, tiny.recipe(train__epochs=8, **changes), tiny.image_set(tint=120))
    assert np.mean(losses[-6:]) < 0.9 * np.mean(losses[:6])
    scorer, config = read_model(tmp_path)
    assert config.recipe["train"]["epochs"] == 8
    assert scorer.image_size == tuple(changes.get("model__image_size", (8, 8)))


def test_cutout_hardest_candidate() -> None:
    """Worked out one image and one candidate at a time, with the same draws."""
    recipe = tiny.recipe(augment__cutout=3, augment__cutout_candidates=4)
    scorer, labels = tiny.color_model().scorer, torch.tensor([0, 1, 2, 1])
    images = torch.from_numpy(tiny.pixels(labels.numpy())).permute(0, 3, 1, 2).contiguous()

    def objective(z, labels, generator, targets=None):
        return cross_entropy_loss(z, labels)

    found = hardest_cutout(images, labels, recipe, torch.Generator().manual_seed(3), scorer, objective)
    draws = torch.Generator().manual_seed(3)
    candidates = [cutout(images, 3, draws) for _ in range(4)]
    for i, label in enumerate(labels):
        values = [objective(scorer(each[i : i + 1].float() / 255), label[None], None).item() for each in candidates]
        assert len(set(values)) > 1
        assert torch.equal(found[i], candidates[values.index(max(values))][i])
    untouched = hardest_cutout(images, labels, tiny.recipe(), draws, scorer, objective)
    assert torch.equal(untouched, images)


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer__name": "muon"},  # both of its halves
        {"loss__name": "cross-entropy"},
        {"loss__name": "masked-features"},
        {"loss__name": "clipped"},
        {"loss__name": "cross-entropy", "augment__ablation": "column", "augment__ablation_size": 3},
        {"augment__cutout": 2, "augment__cutout_candidates": 2},
        {"augment__resized_crop": 0.3},
    ],
)
def test_resume_with_options(tmp_path: Path, changes: dict) -> None:
    recipe = tiny.recipe(**changes)
    train(recipe, tmp_path / "whole", tiny.image_set(), device="cpu")
    folder = tiny.stopped_run(tmp_path / "killed", 5, **changes)
    train(recipe, folder, tiny.image_set(), resume=True, device="cpu")
    assert _weights(folder) == _weights(tmp_path / "whole")
    train(tiny.recipe(), tmp_path / "plain", tiny.image_set(), device="cpu")
    assert _weights(folder) != _weights(tmp_path / "plain")


def test_options_change_weights(tmp_path: Path) -> None:
    images = tiny.image_set(90)
    unbalanced = images.subset(np.flatnonzero((images.labels > 0) | (np.arange(90) % 5 == 0)))
    plain = train(tiny.recipe(), tmp_path / "plain", unbalanced, device="cpu")
    for name, changes in {"cutout": {"augment__cutout": 3}, "weights": {"data__class_weights": True}}.items():
        train(tiny.recipe(**changes), tmp_path / name, unbalanced, device="cpu")
        assert _weights(tmp_path / name) != _weights(plain)


def test_precision_leaves_later_runs_alone(whole: Path, tmp_path: Path) -> None:
    train(tiny.recipe(train__precision="bf16"), tmp_path / "half", tiny.image_set(), device="cpu")
    again = train(tiny.recipe(), tmp_path / "again", tiny.image_set(), device="cpu")
    assert _weights(again) == _weights(whole) != _weights(tmp_path / "half")


def test_init_lowers_first_loss(whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = _losses(monkeypatch, tmp_path / "fresh")
    tuned = _losses(monkeypatch, tmp_path / "tuned", init=whole)
    assert tuned[0] < fresh[0]


def test_init_is_recorded_by_a_resumed_run(whole: Path, tmp_path: Path) -> None:
    folder = tiny.stopped_run(tmp_path / "tuned", 5, init=whole)
    train(tiny.recipe(), folder, tiny.image_set(), resume=True, device="cpu")
    assert read_model(folder)[1].provenance["init"] == whole.name
    assert read_model(whole)[1].provenance["init"] is None


def test_checkpoint_without_init_is_resumed(whole: Path, tmp_path: Path) -> None:
    checkpoint = tiny.stopped_run(tmp_path, 5) / "checkpoint.pt"
    state = torch.load(checkpoint, weights_only=True)
    del state["init"]  # as version 0.1.0 wrote it
    torch.save(state, checkpoint)
    train(tiny.recipe(), tmp_path, tiny.image_set(), resume=True, device="cpu")
    assert _weights(tmp_path) == _weights(whole)


def test_init_keeps_normalization(whole: Path, tmp_path: Path) -> None:
    paler = tiny.image_set(tint=150, seed=4)
    out = train(tiny.recipe(), tmp_path / "tuned", paler, init=whole, device="cpu")
    scorer, config = read_model(out)
    start = read_model(whole)[0]
    assert config.mean == pytest.approx(read_model(whole)[1].mean, rel=1e-6)
    assert torch.equal(scorer.normalize.std, start.normalize.std)
    assert read_model(train(tiny.recipe(), tmp_path / "fresh", paler, device="cpu"))[1].mean != config.mean


@pytest.mark.parametrize("names", [tiny.COLORS, ("red", "green", "yellow"), ("a", "b", "c", "d")])
def test_init_keeps_classifier_of_same_classes(whole: Path, names: tuple[str, ...]) -> None:
    given, config = read_model(whole)
    scorer = config.model_copy(update={"class_names": list(names)}).build()
    fresh = {name: tensor.clone() for name, tensor in scorer.state_dict().items()}
    setup.start_from(scorer, whole)
    classifier = {name for name in fresh if name.startswith(f"net.{len(scorer.net) - 1}.")}
    assert len(classifier) == 2
    for name, tensor in scorer.state_dict().items():
        kept = name not in classifier or names == tiny.COLORS
        assert torch.equal(tensor, given.state_dict()[name] if kept else fresh[name]), name


@pytest.mark.parametrize("changes", [{"model__depth": 2}, {"model__width": 16}, {"model__architecture": "resnet-rf5"}])
def test_init_of_another_shape_refused(whole: Path, tmp_path: Path, changes: dict) -> None:
    _refused("cannot start this recipe", tmp_path, recipe=changes, init=whole)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changes", "device", "word"),
    [
        ({"augment__cutout": 9}, "cpu", "cutout of 9 px"),
        ({"augment__crop": 8}, "cpu", "padding of 8 px"),
        ({"defense__patch": "9"}, "cpu", "9x9"),
        ({"defense__patch": "five"}, "cpu", "five"),
        ({"defense__rule": "votes"}, "cpu", "did you mean vote"),
        ({"model__architecture": "resnet-rf4"}, "cpu", "did you mean resnet-rf"),
        ({"model__image_size": [0, 8]}, "cpu", "greater than or equal to 1"),
        ({}, "gpu", "'gpu'"),
        ({}, "cuda:99", "cuda:99"),
    ],
)
def test_recipe_refused(changes: dict, device: str, word: str, tmp_path: Path) -> None:
    _refused(word, tmp_path, recipe=changes, device=device)
    assert not (tmp_path / "model.safetensors").exists()


def test_folder_not_writable_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    steps: list[training.Progress] = []
    _refused("cannot be written", tmp_path / "file", error=BagcertError, on_progress=steps.append)
    assert not steps


def test_images_of_several_sizes(tmp_path: Path) -> None:
    small, large = tiny.image_set(30), tiny.image_set(30, (10, 9), seed=1)
    labels = np.concatenate([small.labels, large.labels])
    sources = [ArraySource(part.array(), "mixed") for part in (small, large)]
    mixed = ImageSet("mixed", "train", labels, tiny.COLORS, lambda row: sources[row // 30](row % 30))
    _refused("differ in size", tmp_path, mixed)
    train(tiny.recipe(model__image_size=[8, 8]), tmp_path, mixed, device="cpu")
    assert read_model(tmp_path)[0].image_size == (8, 8)


def test_limit_takes_the_first_images(tmp_path: Path) -> None:
    train(tiny.recipe(train__epochs=1), tmp_path, "digits", limit=50, device="cpu")
    assert read_model(tmp_path)[1].provenance["training_images"] == 45
    assert len(load_dataset("digits", "train", 50)) == 50


def test_epoch_order() -> None:
    orders = [epoch_order(seed, epoch, 101) for seed in (0, 1) for epoch in range(3)]
    for order in orders:
        assert sorted(order.tolist()) == list(range(101))
    assert len({tuple(order.tolist()) for order in orders}) == len(orders)
    assert np.array_equal(epoch_order(1, 2, 101), orders[-1])


@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.9])
def test_learning_rate(warmup: float) -> None:
    share = optimizers.learning_rate(tiny.recipe(optimizer__warmup=warmup), 200)
    rates = [share(step) for step in range(201)]
    peak = max(0, round(200 * warmup) - 1)
    assert max(rates) == rates[peak] == 1
    assert all(a < b for a, b in pairwise(rates[: peak + 1]))
    assert all(a >= b for a, b in pairwise(rates[peak:]))
    assert 0 <= rates[199] < 0.01
    assert rates[200] == pytest.approx(0, abs=1e-12)


def test_resume_of_an_older_recipe(whole: Path, tmp_path: Path) -> None:
    folder = tiny.stopped_run(tmp_path, 6)
    written = (folder / "recipe.toml").read_text()
    older = "".join(line for line in written.splitlines(keepends=True) if not line.startswith("color = "))
    assert older != written
    (folder / "recipe.toml").write_text(older)
    train(tiny.recipe(), folder, tiny.image_set(), resume=True, device="cpu")
    assert _weights(folder) == _weights(whole)


def test_resume_of_an_extension(tmp_path: Path) -> None:
    held = {"optimizer__schedule": "hold", "optimizer__warmup_steps": 2, "train__checkpoint_every": 100}
    train(tiny.recipe(train__epochs=2, **held), tmp_path, tiny.image_set(), device="cpu")

    def die(at: training.Progress) -> None:
        raise RuntimeError("the process died")

    longer = tiny.recipe(train__epochs=4, **held)
    with pytest.raises(RuntimeError, match="died"):
        train(longer, tmp_path, tiny.image_set(), resume=True, device="cpu", on_progress=die)
    train(longer, tmp_path, tiny.image_set(), resume=True, device="cpu")
    whole = train(longer, tmp_path / "whole", tiny.image_set(), device="cpu")
    assert _weights(tmp_path) == _weights(whole)


def test_resume_with_a_later_decay(tmp_path: Path) -> None:
    held = {"optimizer__schedule": "hold", "optimizer__warmup_steps": 2, "train__checkpoint_every": 100}
    early, late = (tiny.recipe(train__epochs=2, optimizer__decay=decay, **held) for decay in (0.6, 0.3))
    train(early, tmp_path, tiny.image_set(), device="cpu")
    train(late, tmp_path, tiny.image_set(), resume=True, device="cpu")
    whole = train(late, tmp_path / "whole", tiny.image_set(), device="cpu")
    assert _weights(tmp_path) == _weights(whole)
    with pytest.raises(UsageError, match="falls already"):  # its checkpoint is later than this start of the fall
        train(early, tmp_path, tiny.image_set(), resume=True, device="cpu")


def test_validation_of_sorted_images(tmp_path: Path) -> None:
    """Class folders are sorted by class: a limit on validation images must not leave classes out."""
    images = tiny.image_set(90)
    ordered = images.subset(np.argsort(images.labels, kind="stable"))
    recipe = tiny.recipe(data__validation=0.5, train__validate_images=9)
    found = load_training_data(load_sources(recipe, ordered, None), recipe, torch.device("cpu"))
    assert len(found.held_out_labels) == 45
    assert set(found.held_out_labels[:9].tolist()) == {0, 1, 2}
    for pixels, label in zip(found.held_out, found.held_out_labels, strict=True):
        rows = [i for i, each in enumerate(ordered.array()) if np.array_equal(each, pixels)]
        assert ordered.labels[rows[0]] == label
