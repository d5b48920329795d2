"""The gallery of an evaluation: a selection of images with the votes of their regions.

The selection depends only on the records, so that a resumed run keeps the same pictures. Verdicts are taken from the
records. The votes are recomputed for the selected images; because the batch size differs, they may differ from those of
the evaluation by rounding. They are for illustration only.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo, turn
from bagcert.data.preprocess import Preprocessing, StoredShape
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UnreadableError, UsageError
from bagcert.evaluation.gallery_file import MOST_PICTURES, MOST_REGIONS, MOST_SIDE_PX, Gallery, Picture
from bagcert.records import ImageRecord, Record, headline_column
from bagcert.rules.largest import VOTING_RULES, largest_certifiable_px, largest_certified_px
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel


def chosen(
    records: Sequence[ImageRecord], most: int = MOST_PICTURES, deployed: Sequence[str] | None = None
) -> list[int]:
    """Selects the images to show, as ascending positions in `records`.

    A third each is correct and certified, correct only, and wrong under the representative rule and patch, spread
    evenly over the margins. If a kind has fewer images, the others get more.

    >>> chosen([])
    []
    """
    kinds: list[list[int]] = [[], [], []]
    column = headline_column(records, deployed)
    for position, record in enumerate(records):
        first = record.results[column]
        right = first.prediction == record.label
        kinds[0 if right and first.certified else 1 if right else 2].append(position)
    for kind in kinds:
        kind.sort(key=lambda position: (records[position].results[column].margin, position))
    room, kept = most, []
    for left, kind in zip((3, 2, 1), sorted(kinds, key=len), strict=True):
        count = min(len(kind), -(-room // left) if left > 1 else room)
        kept += [kind[round(i)] for i in np.linspace(0, len(kind) - 1, count)]
        room -= count
    return sorted(kept)


def make_gallery(
    model: BagCert,
    images: ImageSet,
    records: Sequence[ImageRecord],
    placements: str | Path | None = None,
    fit: str = "squash",
    most: int = MOST_PICTURES,
    deployed: Sequence[str] | None = None,
) -> Gallery:
    """Creates the gallery of an evaluation, with another forward pass over the selected images.

    Args:
        model, images, placements, fit: as for the evaluation.
        most: number of pictures, at most 32.
        deployed: the model's [rule, patch], see `headline_column`.
    """
    preprocessing = Preprocessing(model.image_size, fit)
    some = [records[position] for position in chosen(records, min(most, MOST_PICTURES), deployed)]

    def prepared(photo: Photo) -> tuple[np.ndarray, np.ndarray, StoredShape]:
        return preprocessing.apply(photo), thumbnail(photo.upright()), (photo.stored_size, photo.orientation)

    found = images.prepare_each([record.index for record in some], prepared)
    if lost := [error for error in found if isinstance(error, UnreadableError)]:
        raise lost[0]
    ready: list[Any] = list(found)
    if not ready:
        return Gallery(model.class_names, [])
    column = headline_column(records, deployed)
    maps = model.score_map(np.stack([item[0] for item in ready]))
    pictures = [
        picture(maps[i : i + 1], preprocessing, small, shape, record.index, record.results[column], placements)
        for i, ((_, small, shape), record) in enumerate(zip(ready, some, strict=True))
    ]
    return Gallery(model.class_names, pictures)


def picture(
    net_map: ScoreMap,
    preprocessing: Preprocessing,
    pixels: np.ndarray,
    shape: StoredShape,
    index: int,
    verdict: Record,
    placements: str | Path | None = None,
) -> Picture:
    """Creates one picture from the network's score map [1, classes, rows, cols] and the verdict to show.

    Args:
        pixels: uint8 [height, width, 3], the photo upright and small.
        shape: of the photo as stored, to whose pixels the verdict's placements belong.
    """
    stored_size, orientation = shape
    stored = preprocessing.geometry(stored_size, orientation).score_map(net_map)
    upright_size = stored_size[::-1] if turn(orientation)[0] else stored_size
    upright = preprocessing.geometry(upright_size, 1).grid(net_map.grid)
    threat = PatchThreatModel.parse(
        verdict.threat.removesuffix(" within the allowed placements"), stored_size, placements
    )
    # The side a vote certifies is over all placements; masks are built for the allowed ones.
    asked = replace(threat, allowed=None) if verdict.rule in VOTING_RULES else threat
    label = net_map.class_scores.new_tensor([verdict.prediction])
    worst = np.asarray(verdict.worst_placement).reshape(-1, 4).tolist()
    rival = runner_up(net_map, verdict.prediction)
    return Picture(
        index=index,
        prediction=verdict.prediction,
        runner_up=rival,
        size_px=upright_size,
        pixels=pixels,
        votes=votes(net_map, verdict.prediction, rival),
        row_edges=edges(upright.rows_seen),
        col_edges=edges(upright.cols_seen),
        worst_placements=[list(box) for box in dict.fromkeys(turned(box, stored_size, orientation) for box in worst)],
        largest_certified_px=int(largest_certified_px(stored, verdict.rule, threat=asked)[0]),
        largest_certifiable_px=int(largest_certifiable_px(stored, label)[0]),
    )


def photo_picture(
    model: BagCert,
    photo: Photo,
    verdict: Record,
    fit: str = "squash",
    placements: str | Path | None = None,
    most: int = MOST_SIDE_PX,
) -> Picture:
    """The picture of one photo, by one further forward pass.

    Args:
        most: the longest side of the picture in pixels.
    """
    preprocessing = Preprocessing(model.image_size, fit)
    net_map = model.score_map(preprocessing.apply(photo)[None])
    shape = (photo.stored_size, photo.orientation)
    return picture(net_map, preprocessing, thumbnail(photo.upright(), most), shape, 0, verdict, placements)


def votes(net_map: ScoreMap, prediction: int, rival: int) -> np.ndarray:
    """Returns the scores of each region for two classes, int16 [2, rows, cols], clipped.

    For a model with attention pooling, these are the class scores of its readout if only this region were kept, in
    units of 128. They show which class a region supports, but not its weight among the regions, and do not add up to
    the class scores of the image.
    """
    found = net_map[:1].region_scores[0, [prediction, rival]].cpu().numpy()
    if net_map.readout is not None:
        found = found // net_map.readout.score_unit
    return np.clip(found, -(2**15), 2**15 - 1).astype(np.int16)


def runner_up(score_map: ScoreMap, prediction: int) -> int:
    """Returns the class with the largest score other than `prediction`; the lowest index among ties."""
    sums = score_map.class_scores[0].clone()
    sums[prediction] = sums.min() - 1
    return int(sums.max(0).indices)


def edges(seen: np.ndarray) -> list[float]:
    """Returns the edges at which regions are drawn along an axis: midway between the centers of adjacent footprints.

    Args:
        seen: boolean [regions, pixels], as in `RegionGrid`.

    >>> edges(np.eye(3, dtype=bool))
    [0.0, 1.0, 2.0, 3.0]
    """
    regions, pixels = seen.shape
    if regions > MOST_REGIONS:
        raise UsageError(f"a map of {regions} regions along an axis is too large to draw; the limit is {MOST_REGIONS}")
    first, last = seen.argmax(1), pixels - seen[:, ::-1].argmax(1)
    centers = (first + last) / 2
    # Clipping at the border and wrap-around shift centers; the middle ones have the true stride of the map.
    if regions < 2 or (np.diff(centers) <= 0).any():
        return np.linspace(0, pixels, regions + 1).tolist()
    middle = (centers[1:] + centers[:-1]) / 2
    step = np.median(np.diff(centers))
    ends = [max(0.0, middle[0] - step), min(float(pixels), middle[-1] + step)]
    return [ends[0], *middle.tolist(), ends[1]]


def turned(box: Sequence[int], stored_size: tuple[int, int], orientation: int) -> tuple[int, int, int, int]:
    """Converts a placement [top, left, height, width] from pixels of the stored photo to those of the upright photo.

    >>> turned([0, 0, 1, 2], (10, 20), 6)
    (0, 9, 2, 1)
    """
    swapped, rows_reversed, cols_reversed = turn(orientation)
    top, left, height, width = box
    if rows_reversed:
        top = stored_size[0] - top - height
    if cols_reversed:
        left = stored_size[1] - left - width
    return (left, top, width, height) if swapped else (top, left, height, width)


def thumbnail(pixels: np.ndarray, most: int = MOST_SIDE_PX) -> np.ndarray:
    """Shrinks uint8 [height, width, 3] so that no side is longer than `most` px."""
    if max(pixels.shape[:2]) <= most:
        return pixels
    small = Image.fromarray(pixels)
    small.thumbnail((most, most), Image.Resampling.BILINEAR)
    return np.array(small)
