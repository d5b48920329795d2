"""What a network costs, and the hash that tells its weights from others."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


def multiply_adds(build: Callable[[], nn.Module], channels: int, image_size: tuple[int, int]) -> int:
    """Multiply-adds of one image's pass, counted without weights or memory.

    Args:
        build: makes the network.
        channels: of its input.
        image_size: (height_px, width_px).

    >>> multiply_adds(lambda: nn.Conv2d(3, 2, 1), 3, (4, 4))
    96
    """
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        build()(torch.zeros(2, channels, *image_size))
    return counter.get_total_flops() // 4  # two operations each, for two images


def update_with_weights(digest: Any, net: nn.Module) -> None:
    """Feeds the name, dtype, shape and bytes of every tensor of a network into a `hashlib` object."""
    for name, tensor in net.state_dict().items():
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {values.dtype} {list(values.shape)}".encode())
        digest.update(values.flatten().view(torch.uint8).numpy().tobytes())
