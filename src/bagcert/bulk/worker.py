"""Certification of one part of the data: returns one row per image, with an error column.

All engines use the same worker. Every forward pass has the same batch size; the last batch is padded. The last bit of a
score may depend on the batch size, so this makes the rows independent of the number of images, the worker, and
restarts.
"""

import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from bagcert.bulk.parts import Part, PartReader, PhotoOrError
from bagcert.data.prefetch import prefetch
from bagcert.data.preprocess import Preprocessing
from bagcert.defenses.bagcert import BagCert, load
from bagcert.errors import UnreadableError, UnsoundError, UsageError
from bagcert.proofs.certificate_record import pixels_sha256
from bagcert.records import Record
from bagcert.rules.together import certify_together, joined
from bagcert.threat import PatchThreatModel

if TYPE_CHECKING:
    from bagcert.scores import ScoreMap

MOST_SCORES = 1 << 24  # maximum number of scores to collect for one call of the rules

RESULT = pa.struct(
    [
        ("rule", pa.string()),
        ("patch", pa.string()),
        ("threat", pa.string()),
        ("prediction", pa.int32()),
        ("certified", pa.bool_()),
        ("margin", pa.int64()),
        ("worst_placement", pa.list_(pa.list_(pa.int32()))),
        ("locality", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("number", pa.int64()),
        ("source", pa.string()),
        ("label", pa.int64()),
        ("error", pa.string()),
        ("height_px", pa.int32()),
        ("width_px", pa.int32()),
        ("exif_orientation", pa.int32()),
        ("pixels_sha256", pa.string()),
        ("prediction", pa.int32()),
        ("class_name", pa.string()),
        ("results", pa.list_(RESULT)),
        ("worker", pa.string()),
    ]
)
"""One row per image; docs/many_images.md describes the columns."""


@dataclass(frozen=True)
class CertifyJob:
    """The options of a certification run, shared by all workers.

    Attributes:
        model, device, dtype, portable, backend, masks_per_axis: as for `bagcert.defenses.bagcert.load`.
        patches, rules: at least one of each.
        placements: a mask image, readable for every worker.
    """

    model: str
    weights_sha256: str
    patches: tuple[str, ...]
    rules: tuple[str, ...]
    placements: str | None = None
    fit: str = "squash"
    batch_size: int = 100
    device: str = "auto"
    dtype: str = "float32"
    portable: bool = False
    backend: str = "torch"
    masks_per_axis: int | None = None


@dataclass(frozen=True)
class _Input:
    """Network input of an image, and the facts for its row. The decoded photo is not kept."""

    size_px: tuple[int, int]
    orientation: int
    pixels_sha256: str
    pixels: np.ndarray


class Worker:
    """Certifies parts with one loaded model.

    Raises:
        UnsoundError: the model with this name has different weights on this machine.
    """

    def __init__(self, job: CertifyJob, model: BagCert | None = None) -> None:
        self.job = job
        self.model = model or load(
            job.model,
            job.device,
            dtype=job.dtype,
            portable=job.portable,
            backend=job.backend,
            masks_per_axis=job.masks_per_axis,
        )
        self.name = f"{socket.gethostname()}:{os.getpid()}"
        if self.model.weights_sha256 != job.weights_sha256:
            raise UnsoundError(
                f"on {self.name} the model {job.model} has the weights {self.model.weights_sha256[:16]}, "
                f"but the run was started with {job.weights_sha256[:16]}"
            )
        self._preprocessing = Preprocessing(self.model.image_size, job.fit)
        self._reader = PartReader()

    def certify(self, parts: Sequence[Part]) -> Iterator[pa.Table]:
        """Iterates over the rows of each part, by SCHEMA. An image that cannot be certified is a row with its error.

        The next part is prefetched while the current one is computed, if reading does not compete with computing.

        Raises:
            BagcertError: the store does not respond, or the data changed.
        """
        read = (self._reader.read(part, self._prepare) for part in parts)
        if any(part.remote for part in parts) or self.model.scorer.device.type != "cpu":
            read = prefetch(read)
        for part, (inputs, labels) in zip(parts, read, strict=True):
            yield self._rows(part, inputs, labels)

    def _rows(self, part: Part, inputs: list["_Input | UnreadableError"], labels: list[int | None]) -> pa.Table:
        rows: list[dict[str, Any]] = [
            {"number": part.first + i, "source": source, "label": label, "worker": self.name}
            for i, (source, label) in enumerate(zip(part.sources(), labels, strict=True))
        ]
        good: dict[int, _Input] = {}
        for i, found in enumerate(inputs):
            if isinstance(found, _Input):
                good[i] = found
                height, width = found.size_px
                rows[i] |= {"height_px": height, "width_px": width, "exif_orientation": found.orientation}
                rows[i]["pixels_sha256"] = found.pixels_sha256
            else:
                rows[i]["error"] = str(found)
        for some, scores in self._scored(good):
            for i, verdict in zip(some, self._verdicts([good[i] for i in some], scores), strict=True):
                rows[i] |= verdict
        return pa.Table.from_pylist(rows, SCHEMA)

    def _prepare(self, found: PhotoOrError) -> "_Input | UnreadableError":
        if isinstance(found, UnreadableError):
            return found
        pixels = self._preprocessing.apply(found)
        return _Input(found.stored_size, found.orientation, pixels_sha256(found.pixels), pixels)

    def _scored(self, good: dict[int, _Input]) -> "Iterator[tuple[list[int], ScoreMap]]":
        """Computes the score maps of all images, joined into as few as memory allows, because rules then run faster."""
        numbers, size = list(good), self.job.batch_size
        some: list[int] = []
        maps: list[ScoreMap] = []
        for start in range(0, len(numbers), size):
            batch = numbers[start : start + size]
            pixels = np.stack([good[i].pixels for i in batch])
            filled = np.concatenate([pixels, np.repeat(pixels[:1], size - len(pixels), axis=0)])
            maps.append(self.model.score_map(filled)[: len(batch)])
            some += batch
            if sum(each.scores.numel() for each in maps) >= MOST_SCORES or start + size >= len(numbers):
                yield some, joined(maps)
                some, maps = [], []

    def _verdicts(self, inputs: Sequence[_Input], scores: "ScoreMap") -> list[dict[str, Any]]:
        """Computes the verdict columns of each image. Photos with the same windows share a call of the rule."""
        verdicts: list[dict[str, Any]] = [{"results": []} for _ in inputs]
        shapes = [(found.size_px, found.orientation) for found in inputs]
        fitting: list[tuple[list[int], ScoreMap, list[PatchThreatModel]]] = []
        for (size, _), chosen, score_map in self._preprocessing.score_maps(scores, shapes):
            try:
                threats = [PatchThreatModel.parse(patch, size, self.job.placements) for patch in self.job.patches]
                fitting.append((chosen, score_map, threats))
            except UsageError as error:  # the patch does not fit into images of this size
                for i in chosen:
                    verdicts[i] = {"error": str(error)}
        try:
            self._certify(fitting, verdicts)
        except UsageError:  # the rule refuses some images; find out which
            for one in fitting:
                for i in one[0]:
                    verdicts[i] = {"results": []}
                try:
                    self._certify([one], verdicts)
                except UsageError as error:
                    for i in one[0]:
                        verdicts[i] = {"error": str(error)}
        for row in verdicts:
            if "error" not in row:
                row["prediction"] = row["results"][0]["prediction"]
                row["class_name"] = self.model.class_names[row["prediction"]]
        return verdicts

    def _certify(
        self, some: "Sequence[tuple[list[int], ScoreMap, list[PatchThreatModel]]]", verdicts: Sequence[dict[str, Any]]
    ) -> None:
        """Appends the results of each rule and patch to `verdicts`.

        Args:
            some: groups of images: positions in `verdicts`, score map, one threat per patch.
        """
        for rule in self.job.rules:
            for column, patch in enumerate(self.job.patches):
                maps, threats = [score_map for _, score_map, _ in some], [threats[column] for _, _, threats in some]
                certificates = certify_together(rule, maps, threats)
                for (chosen, _, _), certificate in zip(some, certificates, strict=True):
                    for i, record in zip(chosen, Record.each(certificate), strict=True):
                        verdicts[i]["results"].append(_result(record, patch))


def _result(record: Record, patch: str) -> dict[str, Any]:
    """Returns the result columns of one rule and patch. Worst placements are always a list of windows."""
    place = record.worst_placement
    several = bool(place) and isinstance(place[0], list)
    return {**asdict(record), "patch": patch, "worst_placement": place if several else [place]}
