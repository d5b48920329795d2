"""Results of attacks on a batch of images, and files about successful attacks and broken certificates."""

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagcert.attacks.victim import Victim
from bagcert.io.files import write_atomically
from bagcert.threat import PatchThreatModel


@dataclass(frozen=True)
class AttackRecord:
    """Result of the attacks on one image under one rule and threat.

    Attributes:
        patch: [height_px, width_px] for a single unrestricted patch of one shape, else None.
        broken: whether an attack changed the prediction (for detection: without raising an alert).
        placement: `[top, left, height, width]` in pixels of each patch of the successful attack, or None.
        patched_prediction: prediction on the patched image; the clean prediction if no attack succeeded.
        attempts: number of patched images on which the rule was evaluated.
    """

    rule: str
    patch: list[int] | None
    threat: str
    prediction: int
    certified: bool
    broken: bool
    attack: str | None
    placement: list[list[int]] | None
    patched_prediction: int
    attempts: int


@dataclass(frozen=True, eq=False)
class AttackResult:
    """Result of the attacks on a batch under one rule and threat.

    Attributes:
        labels: true labels [batch], used only for accuracies.
        images: the clean images, uint8 [batch, height, width, channels].
        patched: successful adversarial images by index in the batch.
    """

    records: list[AttackRecord]
    labels: np.ndarray
    images: np.ndarray
    patched: dict[int, np.ndarray]
    threat: PatchThreatModel

    @classmethod
    def of(cls, victim: Victim, labels: np.ndarray) -> "AttackResult":
        """Collect the results of the attacks on a victim."""
        patch = victim.threat.patch
        records = [
            AttackRecord(
                rule=victim.rule,
                patch=None if patch is None else list(patch),
                threat=str(victim.threat),
                prediction=int(victim.prediction[i]),
                certified=bool(victim.certified[i]),
                broken=bool(victim.broken[i]),
                attack=victim.attack[i],
                placement=victim.placement[i],
                patched_prediction=int(victim.patched_prediction[i]),
                attempts=int(victim.attempts[i]),
            )
            for i in range(len(victim))
        ]
        return cls(records, np.asarray(labels), victim.images.numpy(), victim.patched, victim.threat)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.records)

    @property
    def broken(self) -> np.ndarray:
        """Which images are broken, boolean [batch]."""
        return np.array([record.broken for record in self.records])

    @property
    def alarms(self) -> list[int]:
        """Indices of images that are both certified and broken; empty if all certificates are valid."""
        return [i for i, record in enumerate(self.records) if record.certified and record.broken]

    @property
    def clean_accuracy(self) -> float:
        """Fraction of images classified correctly without an attack."""
        return float(self._right.mean())

    @property
    def attacked_accuracy(self) -> float:
        """Fraction of images classified correctly and not broken; an upper bound on robust accuracy."""
        return float((self._right & ~self.broken).mean())

    @property
    def certified_accuracy(self) -> float:
        """Fraction of images classified correctly and certified; a lower bound on robust accuracy."""
        return float((self._right & np.array([record.certified for record in self.records])).mean())

    @property
    def attempts(self) -> int:
        """Number of patched images on which the rule was evaluated."""
        return sum(record.attempts for record in self.records)

    @property
    def _right(self) -> np.ndarray:
        return np.array([record.prediction for record in self.records]) == self.labels


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 pixels [height, width, 1 or 3] to a PNG file atomically."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def save_broken(result: AttackResult, i: int, folder: Path, name: str, index: int, about: dict[str, Any]) -> None:
    """Write the clean and the patched image, the placement and the verdicts of a broken certificate for analysis."""
    write_png(folder / f"{name}-clean.png", result.images[i])
    write_png(folder / f"{name}-patched.png", result.patched[i])
    verdict = {**about, "index": index, "label": int(result.labels[i]), **asdict(result.records[i])}
    write_atomically(folder / f"{name}.json", (json.dumps(verdict, indent=2) + "\n").encode())
