"""Certified and attacked accuracy over a dataset: tightness of the certificates, and search for broken ones."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bagcert.attacks import ATTACKS, attack
from bagcert.attacks.result import AttackRecord, AttackResult, save_broken, write_png
from bagcert.attacks.settings import Settings
from bagcert.data.image_set import ImageSet
from bagcert.defenses.base import Defense
from bagcert.errors import UnreadableError, UsageError
from bagcert.records import SCHEMA_VERSION, document, named
from bagcert.threat import PatchThreatModel

Batch = tuple[Sequence[int], np.ndarray, np.ndarray]
"""Indices in the dataset, uint8 images [batch, height, width, channels], true labels [batch]."""


@dataclass(frozen=True)
class AttackRow:
    """Results of one rule against one threat over a dataset. Accuracies are fractions of all images.

    `certified_accuracy <= attacked_accuracy <= clean_accuracy` holds unless certificates were broken. `attempts` counts
    the evaluated patched images, `certified_attempts` those of certified images.
    """

    rule: str
    patch: list[int] | None
    threat: str
    clean_accuracy: float
    attacked_accuracy: float
    certified_accuracy: float
    attempts: int
    certified_attempts: int
    broken_certificates: int


@dataclass(frozen=True)
class ImageAttacks:
    """Attack results for one image of a dataset, one per rule and threat; `source` is as in `ImageRecord`."""

    index: int
    label: int
    results: list[AttackRecord]
    source: str = ""

    def to_json(self) -> str:
        """Serialize to one line of JSONL."""
        return json.dumps(named(asdict(self)), separators=(",", ":"))


@dataclass(frozen=True)
class Bracket:
    """Result of `bracket`.

    Attributes:
        alarm_folder: folder with the images of broken certificates; None if no certificate was broken.
    """

    rows: list[AttackRow]
    records: list[ImageAttacks]
    alarm_folder: Path | None = None

    @property
    def broken_certificates(self) -> int:
        """Number of broken certificates in all rows."""
        return sum(row.broken_certificates for row in self.rows)


@dataclass(frozen=True)
class AttackInfo:
    """Result of a run, as printed by `bagcert attack --json`; `notes` and `pixels` as in `bagcert.records.RunInfo`."""

    model: str
    weights_sha256: str
    data: str
    split: str
    images: int
    limit: int | None
    device: str
    dtype: str
    threads: int
    versions: dict[str, str]
    seconds: dict[str, float]
    seed: int
    attack: dict[str, Any]
    results: list[AttackRow]
    notes: list[str] = field(default_factory=list)
    pixels: str = ""
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict for JSON, with the schema version first and without empty notes."""
        return document(self)


@dataclass
class _Tally:
    rule: str
    notation: str
    results: list[AttackResult] = field(default_factory=list)
    library: list[Tensor] = field(default_factory=list)

    def row(self) -> AttackRow:
        records = [record for result in self.results for record in result.records]
        labels = np.concatenate([result.labels for result in self.results])
        right = [record for record, label in zip(records, labels, strict=True) if record.prediction == label]
        return AttackRow(
            rule=self.rule,
            patch=records[0].patch,
            threat=records[0].threat,
            clean_accuracy=len(right) / len(records),
            attacked_accuracy=sum(not record.broken for record in right) / len(records),
            certified_accuracy=sum(record.certified for record in right) / len(records),
            attempts=sum(record.attempts for record in records),
            certified_attempts=sum(record.attempts for record in records if record.certified),
            broken_certificates=sum(len(result.alarms) for result in self.results),
        )


def attack_dataset(
    defense: Defense,
    batches: Iterable[Batch],
    patches: Sequence[str],
    rules: Sequence[str],
    *,
    attacks: Sequence[str] = (),
    settings: Settings | None = None,
    allowed: np.ndarray | str | Path | None = None,
    save: Path | None = None,
    about: dict[str, Any] | None = None,
    on_progress: Callable[[float, int], None] = lambda images, broken: None,
) -> Bracket:
    """Attack every image of a dataset under every rule and threat.

    Batches are attacked one after the other, and successful patch contents are transferred to later batches. If an
    image is both certified and broken, the clean and the patched image, the placement and the verdicts are written
    immediately to `save`, or to `bagcert-broken-<n>` in the current folder. This does not raise an error; check
    `Bracket.broken_certificates`.

    Args:
        batches: (indices, images, labels) with images as for `attack`, all of one size.
        patches, rules: one row is computed for each pair.
        attacks: names from `ATTACKS`; all attacks if empty.
        allowed: where patches may lie: boolean [height, width] or path of a mask image; default: everywhere.
        about: information about the run, included in the files about broken certificates.
        on_progress: called with (finished images, including fractions; broken images so far) over all rows.
    """
    settings = settings or Settings()
    tallies = [_Tally(rule, patch) for patch in patches for rule in rules]
    indices: list[int] = []
    labels: list[int] = []
    folder: Path | None = None
    done, broken = 0.0, 0
    for number, (numbers, images, truth) in enumerate(batches):
        for tally in tallies:

            def part(share: float, before: float = done, count: int = len(images), so_far: int = broken) -> None:
                on_progress(before + share * count, so_far)

            threat = PatchThreatModel.parse(tally.notation, (images.shape[1], images.shape[2]), allowed)
            seed = settings.seed + 1_000_003 * number
            result = attack(
                defense,
                images,
                truth,
                threat,
                rule=tally.rule,
                attacks=attacks,
                seed=seed,
                settings=settings,
                library=tally.library,
                on_progress=part,
            )
            tally.results.append(result)
            done += len(images)
            broken += int(result.broken.sum())
            on_progress(done, broken)
            if save is not None:
                for i, pixels in result.patched.items():
                    write_png(save / f"{_name(numbers[i], result.records[i])}.png", pixels)
            for i in result.alarms:
                folder = folder or save or _free_folder()
                name = f"broken-{_name(numbers[i], result.records[i])}"
                save_broken(result, i, folder, name, numbers[i], {**(about or {}), "seed": settings.seed})
        indices += numbers
        labels += np.asarray(truth).tolist()
    if not indices:
        raise UnreadableError("there is no image to attack")
    columns = [[record for result in tally.results for record in result.records] for tally in tallies]
    lines = zip(indices, labels, *columns, strict=True)
    records = [ImageAttacks(int(index), int(label), list(results)) for index, label, *results in lines]
    return Bracket([tally.row() for tally in tallies], records, folder)


def attack_choices(attacks: Sequence[str], settings: Settings, batch_size: int) -> dict[str, Any]:
    """Describe the attacks on a dataset for the JSON of a run."""
    return {
        "attacks": list(attacks or ATTACKS),
        "steps": settings.steps,
        "restarts": settings.restarts,
        "placements": "all" if settings.placements is None else settings.placements,
        "batch_size": batch_size,
    }


def upright_batches(
    images: ImageSet,
    labels: np.ndarray,
    size: tuple[int, int],
    batch_size: int,
    numbers: Sequence[int] | None = None,
    sources: dict[int, str] | None = None,
) -> Iterator[Batch]:
    """Yield batches of a dataset for `attack_dataset`; all images must be upright and have the network's `size`.

    Args:
        size: (height_px, width_px).
        numbers: indices of the images; default: all images.
        sources: dict that receives the name of each image by its index.
    """
    chosen = list(range(len(images)) if numbers is None else numbers)
    for start in range(0, len(chosen), batch_size):
        batch = chosen[start : start + batch_size]
        photos = images.read(batch)
        for photo in photos:
            height, width = photo.stored_size
            if (height, width) != size or photo.orientation != 1:
                turned = " and turned by EXIF" if photo.orientation != 1 else ""
                raise UsageError(
                    f"{photo.source} is {height}x{width} px{turned}; attacks need upright images of the network's "
                    f"{size[0]}x{size[1]} px, since the patch is applied to the network's input; use --resize to "
                    "resize every image first"
                )
        if sources is not None:
            sources |= {number: images.named(photo) for number, photo in zip(batch, photos, strict=True)}
        yield batch, np.stack([photo.pixels for photo in photos]), labels[batch]


def _name(index: int, record: AttackRecord) -> str:
    """Prefix of the files about one image, such as `000012-vote-5`."""
    return f"{index:06d}-{record.rule}-{re.sub(r'[^0-9A-Za-z.]+', '_', record.threat)}"


def _free_folder() -> Path:
    """The first `bagcert-broken-<n>` in the current folder that does not exist yet."""
    number = 1
    while Path(f"bagcert-broken-{number}").exists():
        number += 1
    return Path(f"bagcert-broken-{number}")
