"""Records of images and runs, as evaluations write them: plain data, standard library only."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from bagcert.io.deprecated import NAMES
from bagcert.io.lazy import lazy_names

if TYPE_CHECKING:
    from bagcert.certificate import Certificate
else:
    __getattr__, _ = lazy_names(__name__, {}, deprecated=NAMES[__name__])

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Record:
    """The result of one rule on one image against one threat; `locality` as in `Certificate`.

    `worst_placement` is [top, left, height, width], or a list of those where there are several windows.
    """

    rule: str
    patch: list[int] | None
    threat: str
    prediction: int
    certified: bool
    margin: int
    worst_placement: list[Any]
    locality: str = "exact"

    @classmethod
    def each(cls, certificate: "Certificate") -> "list[Record]":
        """One record per image of a certificate."""
        patch = certificate.threat.patch
        threat = str(certificate.threat)
        columns = (certificate.prediction, certificate.certified, certificate.margin, certificate.worst_placement)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        shape = None if patch is None else list(patch)
        return [
            cls(
                certificate.rule,
                shape,
                threat,
                prediction,
                certified,
                margin,
                places[0] if len(places) == 1 else places,
                certificate.locality,
            )
            for prediction, certified, margin, places in rows
        ]


@dataclass(frozen=True)
class ImageRecord:
    """All verdicts on one image of a data set; `source` is its file within the data, or what else it is called.

    `largest_px` is the side in pixels of the largest square patch for which a double-masking defense built for it
    certifies the answer of the first rule and patch, 0 if there is none; None where that was not asked for.
    """

    index: int
    label: int
    results: list[Record]
    source: str = ""
    largest_px: int | None = None

    def to_json(self) -> str:
        """One line of JSONL, with the source before the results; without what is not known."""
        return json.dumps(named(asdict(self)), separators=(",", ":"))


def named(values: dict[str, Any]) -> dict[str, Any]:
    """The record of an image as it is written: `source` stands before `results`, and only if there is one.

    >>> named({"index": 3, "label": 0, "results": [], "source": "cat/3.png"})
    {'index': 3, 'label': 0, 'source': 'cat/3.png', 'results': []}
    """
    source, results, largest = values.pop("source"), values.pop("results"), values.pop("largest_px", None)
    known = ({"source": source} if source else {}) | ({} if largest is None else {"largest_px": largest})
    return {**values, **known, "results": results}


def in_unit(threat: str, pixels: str = "") -> str:
    """A patch as records name it, with its unit.

    Args:
        threat: as in `Record.threat`.
        pixels: whose pixels they are, as in `RunInfo.pixels`.

    >>> in_unit("2x8"), in_unit("2%"), in_unit("5 within the allowed placements", "at 32x32")
    ('2x8 px', '2% of the image', '5 px at 32x32 within the allowed placements')
    """
    size, space, where = threat.partition(" ")
    unit = "of the image" if size.endswith("%") else f"px {pixels}".strip()
    return f"{size} {unit}{space}{where}"


def spread(records: "Sequence[ImageRecord]", pixels: str = "") -> str:
    """How the largest certifiable patches of the images are distributed, in a sentence.

    Of images answered wrongly nothing is certified, so their largest patch counts as 0.
    """
    sides = sorted(record.largest_px or 0 for record in records if record.results[0].prediction == record.label)
    sides = [0] * (len(records) - len(sides)) + sides
    some = sum(side > 0 for side in sides)
    at = {share: sides[min(len(sides) - 1, len(sides) * share // 100)] for share in (25, 50, 75, 90)}
    quantiles = ", ".join(f"{share} % {side}" for share, side in at.items())
    unit = f"px {pixels}".strip()
    share_above = f"{some / len(sides):.1%} above 0"
    return f"largest certifiable square, {unit}: quantiles {quantiles}, largest {sides[-1]}; {share_above}"


def headline_column(records: Sequence[ImageRecord], deployed: Sequence[str] | None = None) -> int:
    """The verdict to show where only one is: that of the model's own rule and patch, if it is there.

    Otherwise the first that certifies some image, or else the first.

    Args:
        deployed: the model's own [rule, patch].
    """
    if not records:
        return 0
    asked = [[row.rule, row.threat] for row in records[0].results]
    if deployed is not None and list(deployed) in asked:
        return asked.index(list(deployed))
    columns = range(len(asked))
    return next((column for column in columns if any(record.results[column].certified for record in records)), 0)


@dataclass(frozen=True)
class Row:
    """One rule against one threat over a data set. Accuracies are fractions of all images.

    The last four are as in `bagcert.attacks.evaluate.AttackRow`, None where the images were not attacked.
    """

    rule: str
    patch: list[int] | None
    threat: str
    clean_accuracy: float
    certified_accuracy: float
    certified_share: float
    interval95: dict[str, list[float]]
    seconds: float
    attacked_accuracy: float | None = None
    attempts: int | None = None
    certified_attempts: int | None = None
    broken_certificates: int | None = None


@dataclass(frozen=True)
class RunInfo:
    """A whole evaluation, as `bagcert evaluate --json` prints it.

    `placements` is the mask image of allowed placements, its `file` name and `sha256`, None where there was none.
    `attack` says how the images were attacked, None if they were not. `notes` are sentences without which the figures
    would be misunderstood, such as that the images are a sample. `pixels` says whose pixels patches are in: "at 32x32"
    where all images have the size of the network's input, else "of the photo". `deployed` is the model's own
    [rule, patch].
    """

    model: str
    weights_sha256: str
    data: str
    split: str
    images: int
    limit: int | None
    device: str
    backend: str
    dtype: str
    threads: int
    versions: dict[str, str]
    seconds: dict[str, float]
    results: list[Row]
    unreadable: int = 0
    repeat: int = 1
    batch_size: int = 0
    peak_memory_mib: int = 0
    placements: dict[str, str] | None = None
    attack: dict[str, Any] | None = None
    notes: list[str] | None = None
    pixels: str = ""
    deployed: list[str] | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON, the schema version first; without a mask, attacks or notes where there are none."""
        values = asdict(self)
        values["results"] = [_without_attack(row) if self.attack is None else row for row in values["results"]]
        for name in ("placements", "attack", "notes", "pixels", "deployed"):
            if not values[name]:
                del values[name]
        return {"schema_version": values.pop("schema_version"), **values}

    def to_csv(self) -> str:
        """The rows as a table for spreadsheets: a line per rule and patch, with what was evaluated beside it."""
        attack = ATTACK_FIGURES if self.attack is not None else ()
        columns = ["model", "data", "split", "images", "rule", "threat", "pixels", "clean_accuracy"]
        columns += ["certified_accuracy", "certified_low95", "certified_high95", "certified_share", *attack]
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(columns)
        for row in self.results:
            low, high = row.interval95["certified_accuracy"]
            own = {**asdict(self), **asdict(row), "certified_low95": low, "certified_high95": high}
            table.writerow([own[column] for column in columns])
        return text.getvalue()


ATTACK_FIGURES = ("attacked_accuracy", "attempts", "certified_attempts", "broken_certificates")


def _without_attack(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ATTACK_FIGURES}


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> list[float]:
    """Wilson's score interval of a proportion; 95 % by default. Wilson, JASA 1927.

    >>> [round(bound, 4) for bound in wilson_interval(60, 100)]
    [0.502, 0.6906]
    """
    share = successes / trials
    center = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # Of all or none the bound is the share itself, which rounding must not miss.
    low = (center - spread) / scale if successes else 0.0
    high = (center + spread) / scale if successes < trials else 1.0
    return [low, high]
