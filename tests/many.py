"""What several processes do in `tests/integration/test_many_processes.py`: `torchrun -m tests.many FOLDER`.

Every process runs this file. Runs of tiny recipes come one after another, since starting processes takes longer.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.training.distributed import ProcessGroup, leave
from bagcert.training.loop import Progress, train
from bagcert.training.synchronized import SynchronizedBatchNorm2d, synchronize_batch_norm
from tests import refused, tiny

WHOLE: dict[str, dict[str, Any]] = {
    "class weights, in parts": {
        "data__class_weights": True,
        "train__accumulate": 2,
        "augment__cutout": 2,
        "augment__flip": True,
    },
    "sgd, clipped": {"optimizer__name": "sgd", "optimizer__gradient_clip": 0.1, "optimizer__learning_rate": 0.05},
    "muon": {"optimizer__name": "muon"},
    "draws of the loss": {
        "loss__name": "masked-features",
        "augment__cutout": 2,
        "augment__cutout_candidates": 3,
        "train__accumulate": 3,
    },
    "ablation": {"loss__name": "cross-entropy", "augment__ablation": "column", "augment__ablation_size": 3},
    "bounds": {  # by SGD: Adam makes large steps of gradients that are almost 0, and of how they are rounded
        "loss__name": "interval-bounds",
        "model__architecture": "convnet-rf10s4",
        "optimizer__name": "sgd",
        "optimizer__learning_rate": 0.05,
    },
    "stream": {
        "data__streaming": True,
        "data__workers": 0,
        "data__shuffle": 20,
        "data__class_weights": True,
        "train__accumulate": 2,
    },
}
"""Recipes whose batches of 9 images are shared unevenly."""
STOPPED = {"memory": {}, "stream": {"data__streaming": True, "data__workers": 0, "data__shuffle": 20}}
STOPPED_AFTER = 8  # of 14 steps, in the middle of the second epoch


def unbalanced() -> Any:
    """Images of which the classes are not equally many, so that class weights differ in each process's share."""
    images = tiny.image_set(90)
    return images.subset([i for i, label in enumerate(images.labels) if label or i % 4 == 0])


def stop_after(step: int) -> Any:
    """SIGTERM to the process that is told of the progress, and to no other."""

    def stop(at: Progress) -> None:
        if at.step == step:
            os.kill(os.getpid(), signal.SIGTERM)

    return stop


def check_batch_norm(index: int, size: int) -> None:
    """Output, gradients and statistics are those of one batch norm that sees all images."""
    random = torch.Generator().manual_seed(0)
    images = 100 + torch.randn(5 * size + 1, 4, 3, 2, generator=random)  # a large mean costs digits if done badly
    target = torch.randn(images.shape, generator=random)
    whole, shared = nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4))
    whole.weight.data = torch.tensor([1.0, -2.0, 0.5, 3.0])
    shared.load_state_dict({f"0.{name}": value for name, value in whole.state_dict().items()})
    synchronize_batch_norm(shared)
    assert type(shared[0]) is SynchronizedBatchNorm2d
    for _ in range(2):
        inputs = [images.clone().requires_grad_(), images[index::size].clone().requires_grad_()]
        outputs = [whole(inputs[0]), shared(inputs[1])]
        torch.testing.assert_close(outputs[1], outputs[0][index::size], rtol=0, atol=2e-5)
        (outputs[0] * target).sum().backward()
        (outputs[1] * target[index::size]).sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad[index::size], rtol=1e-4, atol=1e-4)
    for name, parameter in shared[0].named_parameters():
        dist.all_reduce(parameter.grad)
        torch.testing.assert_close(parameter.grad, whole.get_parameter(name).grad, rtol=1e-4, atol=1e-3)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(shared[0].state_dict()[name], value)
    torch.testing.assert_close(shared.eval()(images), whole.eval()(images), rtol=0, atol=2e-5)


def check_group(group: ProcessGroup) -> None:
    """What one process knows, or fails at, all do."""
    assert [group.any(False), group.any(group.index == 1)] == [False, True]
    assert (group.sum(group.index + 1.0), group.mean(group.index)) == (3.0, 0.5)
    assert group.from_main(lambda: f"made by {group.index}") == "made by 0"
    for failing in (0, 1):
        refused(UnreadableError, f"^broken on {failing}$", fail_on, group, failing)


def fail_on(group: ProcessGroup, failing: int) -> None:
    with group.together():
        if group.index == failing:
            raise UnreadableError(f"broken on {failing}")


def main(folder: Path) -> None:
    """All of it; each process leaves what it was told in `told-INDEX.json`."""
    for name, changes in WHOLE.items():
        train(tiny.recipe(**changes), folder / name, unbalanced(), device="cpu")
    group = ProcessGroup()
    assert group.size == 2
    check_batch_norm(group.index, group.size)
    check_group(group)
    told = {}
    for name, changes in STOPPED.items():
        try:
            train(
                tiny.recipe(**changes),
                folder / f"stopped {name}",
                unbalanced(),
                device="cpu",
                on_progress=stop_after(STOPPED_AFTER),
            )
        except BagcertError as error:
            told[name] = str(error)
    train(tiny.recipe(), folder / "begun by one", unbalanced(), resume=True, device="cpu")
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "again": ({}, "stopped memory"),
        "parts": ({"train__accumulate": 5}, "parts"),
    }
    for name, (changes, where) in wrong.items():
        try:
            train(tiny.recipe(**changes), folder / where, unbalanced(), device="cpu")
        except UsageError as error:
            told[name] = str(error)
    (folder / f"told-{group.index}.json").write_text(json.dumps(told))
    leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
