"""What attacks found on a batch: per image broken or not, the patch and the placement; pictures and alarms on disk."""

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
    """What the attacks did to one image under one rule and threat.

    Attributes:
        prediction: the clean answer.
        certified: was it promised that no attack changes it?
        broken: did one change it? (For the detection rule: without an alert.)
        attack: the one that did; None without.
        placement: `[top, left, height, width]` of each patch that did, in pixels; None without.
        patched_prediction: the answer on the patched image; the clean one where nothing changed it.
        attempts: patched images that the rule was asked about.
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
    """A batch under attack, one rule and one threat.

    Attributes:
        records: one per image.
        labels: true labels [batch]; nothing but the accuracies looks at them.
        images: uint8 [batch, height, width, channels], as given.
        patched: the successful adversarial images by their number in the batch.
        threat: what the attacker could do.
    """

    records: list[AttackRecord]
    labels: np.ndarray
    images: np.ndarray
    patched: dict[int, np.ndarray]
    threat: PatchThreatModel

    @classmethod
    def of(cls, victim: Victim, labels: np.ndarray) -> "AttackResult":
        """Reads off what has been done to a victim."""
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
        """How many images."""
        return len(self.records)

    @property
    def broken(self) -> np.ndarray:
        """Boolean [batch]: some attack changed the answer."""
        return np.array([record.broken for record in self.records])

    @property
    def alarms(self) -> list[int]:
        """Images that were certified and are broken; there must be none."""
        return [i for i, record in enumerate(self.records) if record.certified and record.broken]

    @property
    def clean_accuracy(self) -> float:
        """The share of images right without an attack."""
        return float(self._right.mean())

    @property
    def attacked_accuracy(self) -> float:
        """The share of images right without an attack and under every attack tried: an upper bound."""
        return float((self._right & ~self.broken).mean())

    @property
    def certified_accuracy(self) -> float:
        """The share of images right and certified: a lower bound."""
        return float((self._right & np.array([record.certified for record in self.records])).mean())

    @property
    def attempts(self) -> int:
        """Patched images that the rule was asked about."""
        return sum(record.attempts for record in self.records)

    @property
    def _right(self) -> np.ndarray:
        return np.array([record.prediction for record in self.records]) == self.labels


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Writes uint8 [height, width, 1 or 3] as PNG, whole or not at all.

    Raises:
        BagcertError: it cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    write_atomically(path, buffer.getvalue())


def save_broken(result: AttackResult, i: int, folder: Path, name: str, index: int, about: dict[str, Any]) -> None:
    """Writes all that is needed to look into a broken certificate: both images, the placement and the verdicts.

    Args:
        i: its number in the batch.
        folder, name: where, and how the files begin.
        index: its number in the data set.
        about: the model and the data it happened with.

    Raises:
        BagcertError: a file cannot be written.
    """
    write_png(folder / f"{name}-clean.png", result.images[i])
    write_png(folder / f"{name}-patched.png", result.patched[i])
    verdict = {**about, "index": index, "label": int(result.labels[i]), **asdict(result.records[i])}
    write_atomically(folder / f"{name}.json", (json.dumps(verdict, indent=2) + "\n").encode())
