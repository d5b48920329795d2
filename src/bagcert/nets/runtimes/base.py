"""Base class of backends: caches sessions by image size and number of threads."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from bagcert.io.optional import require_installed

Session = Callable[[np.ndarray], np.ndarray]
"""Function from images float32 [batch, channels, height, width] to `z` [batch, classes, rows, cols]."""


class Runner(ABC):
    """Forward pass of one network on one backend, in float32.

    It uses as many threads as torch at the time of the call, so that measurements with different thread counts also
    cover the backend. Sessions are started on first use.

    Args:
        net: maps images in [0, 1] to `z`, from `inference_copy`.
    """

    name: ClassVar[str]
    libraries: ClassVar[tuple[str, ...]]
    extra: ClassVar[str]

    def __init__(self, net: nn.Module, folder: Path | None = None) -> None:
        require_installed(self.libraries, self.extra, f"the backend {self.name}")
        self.net = net
        self.folder = folder
        self._sessions: dict[tuple[int, ...], Session] = {}

    @abstractmethod
    def start(self, image: tuple[int, int, int], threads: int) -> Session:
        """Starts a session for images of [channels, height, width], with any batch size."""

    def __call__(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """Computes `z` in float32 for a batch on the CPU."""
        channels, height, width = images.shape[1:]
        key = (channels, height, width, torch.get_num_threads())
        if key not in self._sessions:
            self._sessions[key] = self.start((channels, height, width), torch.get_num_threads())
        return torch.from_numpy(self._sessions[key](np.ascontiguousarray(images.numpy())))

    def versions(self) -> dict[str, str]:
        """Returns the versions of libraries that the scores depend on."""
        return {name: metadata.version(name) for name in self.libraries}
