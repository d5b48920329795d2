"""Muon for convolutional networks, combined with AdamW from `torch.optim`."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class MuonAdamW(torch.optim.Optimizer):
    """Muon for convolution kernels, reshaped to matrices [outputs, inputs * kernel area]; AdamW for the rest.

    `torch.optim.Muon` only accepts matrices. Each kernel is copied to a matrix before a step and back after it. The
    parameter groups of both optimizers are exposed, so that a learning-rate schedule applies to both.

    Args:
        kernels: parameters with at least two axes.
        learning_rate, weight_decay: settings for the kernels. Updates have the same root mean square as AdamW's.
        others_learning_rate: learning rate of the others, which have no weight decay.

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
        """Performs one step of both optimizers."""
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            matrix.copy_(kernel.flatten(1))
            matrix.grad = None if kernel.grad is None else kernel.grad.flatten(1)
        self.muon.step()
        self.adamw.step()
        for kernel, matrix in zip(self.kernels, self.matrices, strict=True):
            kernel.copy_(matrix.view(kernel.shape))

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets the gradients of all parameters."""
        self.adamw.zero_grad(set_to_none)
        for parameter in (*self.kernels, *self.matrices):
            parameter.grad = None

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of both optimizers."""
        return {"muon": self.muon.state_dict(), "adamw": self.adamw.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Loads the state of both optimizers."""
        self.muon.load_state_dict(state_dict["muon"])
        self.adamw.load_state_dict(state_dict["adamw"])
        self.param_groups = self.muon.param_groups + self.adamw.param_groups
