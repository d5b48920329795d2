"""Data classes for the results of evaluations, per image and per run; standard library only."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import product
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
    """Result of one rule on one image against one threat.

    `worst_placement` is [top, left, height, width] in pixels, or a list of these for several windows. `locality` is as
    in `Certificate`.
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
        """Convert a certificate to one record per image."""
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
    """All results for one image of a dataset.

    `source` is the file or the name of the image within the dataset. `largest_px` is the side in pixels of the largest
    square patch for which a double-masking defense built for it certifies the prediction of the first rule and patch; 0
    if there is none, None if it was not computed.
    """

    index: int
    label: int
    results: list[Record]
    source: str = ""
    largest_px: int | None = None

    def to_json(self) -> str:
        """Serialize to one line of JSONL; unknown fields are omitted."""
        return json.dumps(named(asdict(self)), separators=(",", ":"))


def named(values: dict[str, Any]) -> dict[str, Any]:
    """Order the fields of an image record for writing: `source` comes before `results` and is omitted if empty.

    >>> named({"index": 3, "label": 0, "results": [], "source": "cat/3.png"})
    {'index': 3, 'label': 0, 'source': 'cat/3.png', 'results': []}
    """
    source, results, largest = values.pop("source"), values.pop("results"), values.pop("largest_px", None)
    known = ({"source": source} if source else {}) | ({} if largest is None else {"largest_px": largest})
    return {**values, **known, "results": results}


def in_unit(threat: str, pixels: str = "") -> str:
    """Add the unit to the notation of a patch.

    Args:
        threat: notation of the patch, as in `Record.threat`.
        pixels: the image that the pixels refer to, as in `RunInfo.pixels`.

    >>> in_unit("2x8"), in_unit("2%"), in_unit("5 within the allowed placements", "at 32x32")
    ('2x8 px', '2% of the image', '5 px at 32x32 within the allowed placements')
    """
    size, space, where = threat.partition(" ")
    unit = "of the image" if size.endswith("%") else f"px {pixels}".strip()
    return f"{size} {unit}{space}{where}"


def spread(records: "Sequence[ImageRecord]", pixels: str = "") -> str:
    """Summarize the distribution of the largest certifiable patches over the images in one sentence.

    Misclassified images count as 0.
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
    """Index of the result to display if only one per image can be shown.

    This is the result of the model's deployed rule and patch if available, otherwise the first one that certifies some
    image, otherwise the first.

    Args:
        deployed: the deployed [rule, patch] of the model.
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
    """Results of one rule against one threat over a dataset. Accuracies are fractions of all images.

    The last four fields are as in `bagcert.attacks.evaluate.AttackRow`, or None if the images were not attacked.
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
    """Result of an evaluation, as printed by `bagcert evaluate --json`.

    `placements` is the mask image of allowed placements (`file` name and `sha256`), or None without a mask. `attack`
    describes how the images were attacked, or is None. `notes` are remarks needed to interpret the results, for example
    that the images are a sample. `pixels` says which pixels patch sizes refer to: "at 32x32" if all images have the
    size of the network's input, otherwise "of the photo". `deployed` is the deployed [rule, patch] of the model.
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
    masks_per_axis: int | None = None
    deployed: list[str] | None = None
    schema_version: int = field(default=SCHEMA_VERSION)

    def to_dict(self) -> dict[str, Any]:
        """Convert to a dict for JSON, with the schema version first and without empty optional fields."""
        values = document(self, ("placements", "attack", "notes", "pixels", "masks_per_axis", "deployed"))
        if self.attack is None:
            for row, figure in product(values["results"], ATTACK_FIGURES):
                del row[figure]
        return values

    def to_csv(self) -> str:
        """Convert the results to CSV with one line per rule and patch."""
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


def document(result: Any, optional: Sequence[str] = ("notes",)) -> dict[str, Any]:
    """Convert a result to a dict for JSON, with the schema version first and without empty `optional` fields."""
    values = {"schema_version": result.schema_version, **asdict(result)}
    return {name: value for name, value in values.items() if value or name not in optional}


ATTACK_FIGURES = ("attacked_accuracy", "attempts", "certified_attempts", "broken_certificates")


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> list[float]:
    """Wilson score interval of a proportion, 95 % by default. Source: Wilson, JASA 1927.

    >>> [round(bound, 4) for bound in wilson_interval(60, 100)]
    [0.502, 0.6906]
    """
    share = successes / trials
    center = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    # For a proportion of 0 or 1 that end of the interval is exactly 0 or 1, regardless of rounding.
    low = (center - spread) / scale if successes else 0.0
    high = (center + spread) / scale if successes < trials else 1.0
    return [low, high]
