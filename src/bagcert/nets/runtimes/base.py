"""What every backend has in common: sessions by image size and number of threads."""

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
"""Images float32 [batch, channels, height, width] to `z` [batch, classes, rows, cols]."""


class Runner(ABC):
    """The forward pass of one network on one backend, in float32.

    It uses as many threads as torch does at the time of the call, so that what measures torch with other numbers of
    threads measures this as well. A session is started when it is first needed.

    Args:
        net: images in [0, 1] to `z`, from `inference_copy`.
        folder: where graphs are kept between processes; None keeps none.

    Attributes:
        name: of the backend.
        libraries: the packages it needs.
        extra: what brings them, as in `pip install "bagcert[...]"`.

    Raises:
        UsageError: a library is missing.
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
        """A session for images of [channels, height, width], of any number at once."""

    def __call__(self, images: Float[Tensor, "batch channels height width"]) -> Tensor:
        """`z` in float32 of a batch on the CPU."""
        channels, height, width = images.shape[1:]
        key = (channels, height, width, torch.get_num_threads())
        if key not in self._sessions:
            self._sessions[key] = self.start((channels, height, width), torch.get_num_threads())
        return torch.from_numpy(self._sessions[key](np.ascontiguousarray(images.numpy())))

    def versions(self) -> dict[str, str]:
        """Of the libraries that the scores depend on."""
        return {name: metadata.version(name) for name in self.libraries}
