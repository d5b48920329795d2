"""How hard an attack tries, and the form all attacks share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bagcert.attacks.victim import Victim
from bagcert.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """How hard attacks try.

    Attributes:
        steps: of each gradient ascent.
        restarts: of each gradient ascent, with other contents, target classes and objectives.
        placements: how many are attacked per image, the most promising ones first; None for every one.
        seed: of all random choices.
        rows: patched images per pass through the network.

    Raises:
        UsageError: a number below 1, or a seed below 0.
    """

    steps: int = 40
    restarts: int = 2
    placements: int | None = 8
    seed: int = 0
    rows: int = 128

    def __post_init__(self) -> None:
        for name in ("steps", "restarts", "placements", "rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"the attack's {name} must be at least 1, got {value}")
        if self.seed < 0:
            raise UsageError(f"the attack's seed must be at least 0, got {self.seed}")


OnProgress = Callable[[float], None]
Attack = Callable[[Victim, Settings, torch.Generator, OnProgress], None]
"""Attacks all open images of a victim by `Victim.submit`; reports the share done."""
