"""Runs the network and the rules over the images of an evaluation, in timed batches."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.data.prefetch import prefetch
from bagcert.data.preprocess import Preprocessing, StoredShape
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UnreadableError
from bagcert.evaluation.journal import Batch, EvaluationLog
from bagcert.records import ImageRecord, Record
from bagcert.rules.largest import largest_certifiable_px
from bagcert.rules.together import certify_together
from bagcert.threat import PatchThreatModel

READ_AT_ONCE = 64  # number of photos that are decoded in parallel
MOST_SIZES = 1024  # number of image sizes for which threats are cached


@dataclass
class RulePatch:
    """A rule and a patch notation, with one cached threat per image size."""

    rule: str
    notation: str
    threats: dict[tuple[int, int], PatchThreatModel] = field(default_factory=dict)

    def threat(self, size: tuple[int, int], placements: str | Path | None) -> PatchThreatModel:
        """Returns the threat for images of this size."""
        if size not in self.threats:
            if len(self.threats) >= MOST_SIZES:
                self.threats.clear()
            self.threats[size] = PatchThreatModel.parse(self.notation, size, placements)
        return self.threats[size]


@dataclass(frozen=True)
class Job:
    """Everything that an evaluation depends on."""

    model: BagCert
    images: ImageSet
    labels: np.ndarray
    settings: list[RulePatch]
    preprocessing: Preprocessing
    placements: str | Path | None
    batch_size: int
    largest: bool

    def batches(self, first: int, unreadable: dict[int, str]) -> Iterator[tuple[Batch, float]]:
        """Iterates over certified batches, starting at the image `first`, with the seconds spent waiting for each.

        Errors of unreadable images are added to `unreadable`, by image number.
        """
        clock = time.perf_counter()
        batches = _batches(self.images, self.preprocessing, self.batch_size, unreadable, first)
        if self.model.scorer.device.type != "cpu":  # on a CPU, reading would compete with computing
            batches = prefetch(batches)
        for numbers, pixels, shapes, sources in batches:
            waited = time.perf_counter() - clock
            results, sides, seconds = _certify(self, pixels, shapes)
            records = [
                ImageRecord(i, int(self.labels[i]), line, source, side)
                for i, line, source, side in zip(numbers, results, sources, sides, strict=True)
            ]
            # A copy: images that are read ahead may add to it meanwhile.
            passed = [(i, sentence) for i, sentence in list(unreadable.items()) if first <= i < numbers[-1]]
            resized = any(shape != (self.model.image_size, 1) for shape in shapes)
            yield Batch(records, passed, seconds, resized), waited
            first = numbers[-1] + 1
            clock = time.perf_counter()


@dataclass
class Found:
    """Accumulated results of the batches of a pass.

    Attributes:
        seconds: time of the forward pass, then of each setting.
    """

    seconds: list[float]
    records: list[ImageRecord] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    resized: bool = False
    waited: float = 0.0

    def add(self, batch: Batch) -> None:
        """Adds the next batch."""
        self.records += batch.records
        self.errors |= dict(batch.errors)
        self.resized |= batch.resized
        self.seconds = _sums(self.seconds, batch.seconds)


def first_pass(job: Job, journal: EvaluationLog | None, on_done: Callable[[int], None]) -> Found:
    """Computes the records of all images. Records in the journal are reused, new ones are appended to it."""
    found = Found([0.0] * (1 + len(job.settings)))
    for batch in journal.batches if journal else ():
        found.add(batch)
    unreadable: dict[int, str] = {}
    for batch, waited in job.batches(found.records[-1].index + 1 if found.records else 0, unreadable):
        if journal:
            journal.append(batch)
        found.add(batch)
        found.waited += waited
        on_done(batch.records[-1].index + 1)
    found.errors |= unreadable  # also those after the last batch
    return found


def timed_pass(job: Job, on_done: Callable[[int], None]) -> list[float]:
    """Repeats the pass and returns only its seconds."""
    seconds = [0.0] * (1 + len(job.settings))
    for batch, _ in job.batches(0, {}):
        seconds = _sums(seconds, batch.seconds)
        on_done(batch.records[-1].index + 1)
    return seconds


def _sums(left: Sequence[float], right: Sequence[float]) -> list[float]:
    return [a + b for a, b in zip(left, right, strict=True)]


def _batches(
    images: ImageSet, preprocessing: Preprocessing, batch_size: int, errors: dict[int, str], first: int
) -> Iterator[tuple[list[int], np.ndarray, list[StoredShape], list[str]]]:
    """Iterates over batches: image numbers, network inputs uint8 [batch, h, w, 3], stored shapes and source names.

    Starts at the image `first`. Errors of unreadable images are added to `errors`, by image number.
    """

    def sized(photo: Photo) -> tuple[np.ndarray, StoredShape, str]:
        return preprocessing.apply(photo), (photo.stored_size, photo.orientation), images.named(photo)

    def prepared() -> Iterator[tuple[int, np.ndarray, StoredShape, str]]:
        for start in range(first, len(images), READ_AT_ONCE):
            numbers = range(start, min(start + READ_AT_ONCE, len(images)))
            for number, found in zip(numbers, images.prepare_each(numbers, sized), strict=True):
                if isinstance(found, UnreadableError):
                    errors[number] = str(found)
                else:
                    yield number, *found

    each = prepared()
    while batch := list(islice(each, batch_size)):
        numbers, pixels, shapes, sources = (list(column) for column in zip(*batch, strict=True))
        yield numbers, np.stack(pixels), shapes, sources


def _certify(
    job: Job, pixels: np.ndarray, shapes: Sequence[StoredShape]
) -> tuple[list[list[Record]], list[int | None], list[float]]:
    """Certifies a batch under every setting.

    All photos share the forward pass, and photos with the same windows share a call of the rule.

    Returns:
        The records of each image, one per setting; the largest certifiable side of each image, or None if not
        requested; the seconds of the forward pass and of each setting.
    """
    clock = time.perf_counter()
    scores = job.model.score_map(pixels)
    divided = job.preprocessing.score_maps(scores, shapes)
    laps = [_elapsed(clock, job.model)]
    lines: list[list[Record]] = [[] for _ in shapes]
    for setting in job.settings:
        threats = [setting.threat(size, job.placements) for (size, _), _, _ in divided]
        clock = time.perf_counter()
        certificates = certify_together(setting.rule, [score_map for _, _, score_map in divided], threats)
        laps.append(_elapsed(clock, job.model))
        for (_, chosen, _), certificate in zip(divided, certificates, strict=True):
            for number, record in zip(chosen, Record.each(certificate), strict=True):
                lines[number].append(record)
    sides: list[int | None] = [None] * len(shapes)
    for _, chosen, score_map in divided if job.largest else ():
        label = torch.tensor([lines[number][0].prediction for number in chosen], device=score_map.scores.device)
        for number, side in zip(chosen, largest_certifiable_px(score_map, label).tolist(), strict=True):
            sides[number] = side
    return lines, sides, laps


def _elapsed(clock: float, model: BagCert) -> float:
    if model.scorer.device.type == "cuda":
        torch.cuda.synchronize(model.scorer.device)
    return time.perf_counter() - clock
