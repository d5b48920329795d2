"""Layers that see the whole image in ways that no table of layers shows, and layers that change from call to call."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import dlpack


def plain(x: Tensor) -> Tensor:
    """Away from every subclass."""
    return x.as_subclass(Tensor)


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return plain(x).mean((1, 2, 3), keepdim=True)


def _thread(work: Callable[[], Any]) -> Any:
    found: list[Any] = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


def _caught(x: Tensor) -> Any:
    try:
        return float(x.mean())
    except Exception:
        return 1.0


def _functions_off(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunction():
        return x.mean()


STATISTICS: dict[str, Callable[[Tensor], Any]] = {
    "as_subclass": lambda x: plain(x).mean((1, 2, 3), keepdim=True),
    "tensor": lambda x: torch.tensor(x).mean(),
    "tensor of a comparison": lambda x: torch.tensor(x > 0.3).float().mean((1, 2, 3), keepdim=True),
    "vmap": lambda x: torch.vmap(lambda image: image.mean())(x)[:, None, None, None],
    "dlpack": lambda x: torch.from_dlpack(dlpack.to_dlpack(x)).mean((1, 2, 3), keepdim=True),
    "numpy": lambda x: float(plain(x).numpy().mean()),
    "asarray": lambda x: float(np.asarray(x).mean()),
    "list": lambda x: float(np.mean(plain(x).tolist())),
    "item": lambda x: plain(x).mean().item(),
    "Function": _Function.apply,
    "thread": lambda x: _thread(lambda: plain(x).mean()),
    "caught": _caught,
    "functions off": _functions_off,
    "by type": lambda x: x.mean() if type(x) is Tensor else 1.0,
    "empty dim": lambda x: x.mean(dim=(), keepdim=True),
    "std": lambda x: torch.full_like(x[:, :1], x.std(True)),
    "aten": lambda x: torch.ops.aten.mean(x),
    "storage": lambda x: torch.empty(0).set_(plain(x).untyped_storage()).mean(),
    "grad": lambda x: torch.func.grad(lambda image: (image.mean() * image).sum())(x).mean(),
    "pixels": lambda x: len((plain(x) > 0.5).nonzero()) / x.numel(),
    "equal": lambda x: float(torch.equal(x, torch.zeros_like(x))),
    "checkpoint": lambda x: torch.utils.checkpoint.checkpoint(lambda x: x.mean(), x, use_reentrant=False),
    "nan": lambda x: plain(x).isnan().any().float(),
    "batch": lambda x: float(len(x) > 3),
    "large batch": lambda x: float(len(x) > 8),
    "contiguous": lambda x: float(x.is_contiguous()),
}


def gated(program: Any, x: Tensor) -> Callable:
    """A map that a statistic of the whole image switches."""
    draw = program.draw
    name = draw.choice(list(STATISTICS))
    program.details.append(name)
    statistic = STATISTICS[name]
    threshold = draw.choice([0.1, 0.3, 0.5, 0.7, 0.9, 0.97, round(draw.random(), 3)])
    program.thresholds.append(threshold)
    gate = draw.choice(
        [
            lambda x, s: x * (s > threshold), lambda x, s: torch.where(x < s, x, -x), lambda x, s: x + s,
            lambda x, s: x if s > threshold else -x, lambda x, s: x * float(s < threshold), lambda x, s: x.relu() * s,
            lambda x, s: (x, x.abs())[int(s > threshold)], lambda x, s: F.pad(x, (int(s > threshold), 0)),
        ]
    )  # fmt: skip
    return lambda x: gate(x, statistic(x))


def stateful(program: Any, x: Tensor) -> Any:
    """A layer that changes from call to call, or keeps what it has seen."""
    draw = program.draw
    kind, after = draw.randrange(6), draw.choice([1, 3, 6, 12])
    program.details.append(f"stateful {kind}")

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("average", torch.zeros(1))
            self.forget()

        def forget(self) -> None:
            """As before the first call."""
            self.calls, self.kept, self.average = 0, None, torch.zeros(1)

        def forward(self, x: Tensor) -> Tensor:
            if kind == 0:
                self.calls += 1
                return x if self.calls < after else x.mean() * x
            if kind == 1:
                self.average.add_(0.1)
                return x * self.average
            if kind == 2:
                self.kept = x.detach()
                return x
            if kind == 3:
                self.average = 0.9 * self.average + 0.1 * plain(x).mean()
                return x * self.average
            if kind == 4:
                self.kept = self.kept if self.kept is not None else torch.linspace(0, 1, x.shape[3])
                return x * self.kept
            self.kept = self.kept if self.kept is not None else plain(x).mean()
            return x * self.kept

    return Layer()
