"""Settings and function type of attacks."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bagcert.attacks.victim import Victim
from bagcert.errors import UsageError


@dataclass(frozen=True)
class Settings:
    """Strength of attacks.

    Attributes:
        restarts: number of restarts, with different contents, target classes and objectives.
        placements: number of placements attacked per image, most promising first; None for all.
        rows: number of patched images per forward pass.
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
"""Type of an attack: attacks all unbroken images of a victim through `Victim.submit` and reports its progress."""
