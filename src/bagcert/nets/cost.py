"""Computational cost of a network, and hashing of its weights."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(build: Callable[[], nn.Module], channels: int, image_size: tuple[int, int]) -> int:
    """Count the multiply-adds of a forward pass of one image, on the meta device without allocating weights.

    Args:
        image_size: (height_px, width_px).

    >>> multiply_adds(lambda: nn.Conv2d(3, 2, 1), 3, (4, 4))
    96
    """
    with torch.device("meta"):
        network = build()  # before counting: building may run the network to measure its map
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(2, channels, *image_size))
    return counter.get_total_flops() // 4  # two operations each, for two images


def update_with_weights(digest: Any, net: nn.Module) -> None:
    """Update a `hashlib` object with the name, dtype, shape and bytes of every tensor of a network."""
    for name, tensor in net.state_dict().items():
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
