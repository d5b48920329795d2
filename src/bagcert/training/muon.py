"""Optimizers: what `torch.optim` has, put together for convolutional networks."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Muon for convolution kernels, each seen as a matrix [outputs, inputs * kernel area]; AdamW for the rest.

    `torch.optim.Muon` takes matrices only, so each kernel has one that is filled before a step and copied back
    after it. The parameter groups are those of the two optimizers, so a schedule reaches both.

    Args:
        kernels: parameters of at least two axes.
        others: batch norms, biases and the classifier.
        learning_rate, weight_decay: of the kernels; steps have the root mean square of AdamW's.
        others_learning_rate: of the others, which are not decayed.

    Source: K. Jordan et al., "Muon: an optimizer for hidden layers in neural networks", 2024.
    """

    def __init__(
        self,
        kernels: Iterable[nn.Parameter],
        others: Iterable[nn.Parameter],
        learning_rate: float,
        others_learning_rate: float,
        weight_decay: float,
    ) -> None:
        self.kernels = list(kernels)
        self.matrices = [nn.Parameter(kernel.detach().flatten(1).clone()) for kernel in self.kernels]
        self.muon = torch.optim.Muon(self.matrices, learning_rate, weight_decay, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(list(others), others_learning_rate, weight_decay=0.0)
        super().__init__([*self.kernels, *self.adamw.param_groups[0]["params"]], {})
        self.param_groups = self.muon.param_groups + self.adamw.param_groups

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]  # no closure is used
        """One step of both."""
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.copy_(kernel.flatten(1))
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        self.muon.step()
        self.adamw.step()
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            kernel.copy_(matrix.view(kernel.shape))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forgets the gradients of kernels and others."""
        self.adamw.zero_grad(set_to_none)
        for parameter in (*self.kernels, *self.matrices):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Of both optimizers."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Into both optimizers."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups
