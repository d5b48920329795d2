"""Certified and attacked accuracy over a data set: how tight the certificates are, and whether any of them breaks."""

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
from bagcert.records import SCHEMA_VERSION, named
from bagcert.threat import PatchThreatModel

Batch = tuple[Sequence[int], np.ndarray, np.ndarray]
"""Numbers in the data set, uint8 images [batch, height, width, channels], true labels [batch]."""


@dataclass(frozen=True)
class AttackRow:
    """One rule against one threat over a data set. Accuracies are fractions of all images.

    `certified_accuracy <= attacked_accuracy <= clean_accuracy`, unless `broken_certificates` is not 0.
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
    """What attacks did to one image of a data set, a result per rule and threat; `source` as in `ImageRecord`."""

    index: int
    label: int
    results: list[AttackRecord]
    source: str = ""

    def to_json(self) -> str:
        """One line of JSONL."""
        return json.dumps(named(asdict(self)), separators=(",", ":"))


@dataclass(frozen=True)
class Bracket:
    """Rows, a record per image, and where the images of broken certificates are; None as it should be."""

    rows: list[AttackRow]
    records: list[ImageAttacks]
    alarm_folder: Path | None = None

    @property
    def broken_certificates(self) -> int:
        """In all rows together."""
        return sum(row.broken_certificates for row in self.rows)


@dataclass(frozen=True)
class AttackInfo:
    """A whole run, as `bagcert attack --json` prints it; `notes` and `pixels` as in `bagcert.records.RunInfo`."""

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
        """Ready for JSON, the schema version first; without notes where there are none."""
        values = asdict(self)
        if not self.notes:
            del values["notes"]
        return {"schema_version": values.pop("schema_version"), **values}


@dataclass
class _Tally:
    """One rule against one threat, filled batch by batch."""

    rule: str
    notation: str
    results: list[AttackResult] = field(default_factory=list)
    library: list[Tensor] = field(default_factory=list)

    def row(self) -> AttackRow:
        weights = [len(result) for result in self.results]

        def mean(name: str) -> float:
            right = [
                round(getattr(result, name) * weight) for result, weight in zip(self.results, weights, strict=True)
            ]
            return sum(right) / sum(weights)

        first = self.results[0].records[0]
        records = [record for result in self.results for record in result.records]
        return AttackRow(
            rule=self.rule,
            patch=first.patch,
            threat=first.threat,
            clean_accuracy=mean("clean_accuracy"),
            attacked_accuracy=mean("attacked_accuracy"),
            certified_accuracy=mean("certified_accuracy"),
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
    """Attacks every image of a data set under every rule and threat.

    Batches are attacked one after the other; what is found on one is transferred to the next. An image that is both
    certified and broken is an alarm: both images, the placement and the verdicts are written at once, into `save` or
    else into `bagcert-broken-<n>` in the current folder, and counted. It does not raise; look at
    `Bracket.broken_certificates`.

    Args:
        batches: (numbers, images, labels); images as `attack` takes them, of one size.
        patches, rules: a row for each pair, in this order.
        attacks: names from `ATTACKS`; all of them when empty.
        settings: how hard to try.
        allowed: where patches may lie, a boolean [height, width] or a mask image; everywhere when absent.
        save: a folder for the successful adversarial images, as PNG.
        about: facts about the run that belong into the files of an alarm.
        on_progress: called with (images done, counted in parts; images broken so far), over all rows together.

    Raises:
        UsageError: bad images, patch, rule or attack.
        UnreadableError: no batch at all.
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
    """How a data set was attacked, for the JSON of a run."""
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
    """Images of a data set for `attack_dataset`, with their labels; all must have the network's `size`.

    Args:
        numbers: of the images; all of them when absent.
        sources: gets what each image is called, by its number.

    Raises:
        UsageError: an image of another size; its patch would have to be chosen before it is resized.
        UnreadableError: an image that cannot be read.
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
                    f"{size[0]}x{size[1]} px, since the patch is put on what the network sees; --resize brings every "
                    "image to that size first"
                )
        if sources is not None:
            sources |= {number: images.named(photo) for number, photo in zip(batch, photos, strict=True)}
        yield batch, np.stack([photo.pixels for photo in photos]), labels[batch]


def _name(index: int, record: AttackRecord) -> str:
    """How the files about one image begin: `000012-vote-5`."""
    return f"{index:06d}-{record.rule}-{re.sub(r'[^0-9A-Za-z.]+', '_', record.threat)}"


def _free_folder() -> Path:
    """The first `bagcert-broken-<n>` in the current folder that is not there yet."""
    number = 1
    while Path(f"bagcert-broken-{number}").exists():
        number += 1
    return Path(f"bagcert-broken-{number}")
