"""The file `*.gallery.npz`: pictures of some images of an evaluation, and the votes of their regions.

The file holds `about`, JSON as bytes, and for picture i `image_i`, uint8 [height, width, 3], and `votes_i`, int16
[2, rows, cols]: the scores of the prediction and of its runner-up. The file contains no pickles. The reader checks
names, dtypes and shapes against `about`, and limits sizes before it decompresses anything.
"""

import io
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from jaxtyping import Int16, UInt8
from pydantic import BaseModel, ConfigDict, Field

from bagcert.errors import UnreadableError
from bagcert.io.files import open_regular
from bagcert.nets.saved_model import first_line

MOST_PICTURES = 32
MOST_SIDE_PX = 256
MOST_REGIONS = 1024  # limit per axis. No shipped network has a map larger than 1000x1000.
MAX_BYTES = 1 << 27
"""Limit on the file and on its decompressed content: 128 MiB, enough for 32 pictures with 1000x1000 regions."""

Edges = Annotated[list[float], Field(min_length=2, max_length=MOST_REGIONS + 1)]


@dataclass(frozen=True, eq=False)
class Picture:
    """One image of an evaluation, with the EXIF orientation applied.

    Attributes:
        prediction, runner_up: class indices; the runner-up has the next largest sum over all regions.
        size_px: [height, width] of the photo, upright; placements are in these pixels.
        pixels: uint8 [height, width, 3], made smaller where the photo has a side above `MOST_SIDE_PX`.
        votes: int16 [2, rows, cols], the scores of prediction and runner-up.
        row_edges, col_edges: rows + 1 and cols + 1 positions in pixels of the photo, between which each region is
            drawn. What a region sees is more than that.
        worst_placements: [top, left, height, width] each, by the first rule and patch of the evaluation.
        largest_certified_px: as in `bagcert.bulk.files.FileVerdict`, for the first rule and patch.
        largest_certifiable_px: likewise.
    """

    index: int
    prediction: int
    runner_up: int
    size_px: tuple[int, int]
    pixels: UInt8[np.ndarray, "height width rgb"]
    votes: Int16[np.ndarray, "two rows cols"]
    row_edges: list[float]
    col_edges: list[float]
    worst_placements: list[list[int]]
    largest_certified_px: int
    largest_certifiable_px: int


@dataclass(frozen=True)
class Gallery:
    """Pictures in the order of the data set, and the names of the model's classes."""

    class_names: tuple[str, ...]
    pictures: list[Picture]


class _About(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    index: int = Field(ge=0)
    prediction: int = Field(ge=0)
    runner_up: int = Field(ge=0)
    size_px: tuple[int, int]
    row_edges: Edges
    col_edges: Edges
    worst_placements: list[Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=4, max_length=4)]] = Field(
        max_length=64
    )
    largest_certified_px: int = Field(ge=0)
    largest_certifiable_px: int = Field(ge=0)
    picture_px: tuple[Annotated[int, Field(ge=1, le=MOST_SIDE_PX)], Annotated[int, Field(ge=1, le=MOST_SIDE_PX)]]


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    format: Annotated[int, Field(ge=1, le=1)]
    class_names: list[str] = Field(max_length=100_000)
    pictures: list[_About] = Field(max_length=MOST_PICTURES)


def gallery_path(results: Path) -> Path:
    """Returns the path of the gallery that belongs to the results file `results`."""
    return results.with_suffix(".gallery.npz")


def gallery_bytes(gallery: Gallery) -> bytes:
    """Serializes a gallery. The same gallery gives the same bytes."""
    pictures = []
    arrays: dict[str, np.ndarray] = {}
    for number, picture in enumerate(gallery.pictures):
        values = {name: getattr(picture, name) for name in _About.model_fields if name != "picture_px"}
        pictures.append({**values, "picture_px": list(picture.pixels.shape[:2])})
        arrays[f"image_{number}"] = picture.pixels
        arrays[f"votes_{number}"] = picture.votes
    about = json.dumps({"format": 1, "class_names": list(gallery.class_names), "pictures": pictures}, allow_nan=False)
    arrays = {"about": np.frombuffer(about.encode(), dtype=np.uint8), **arrays}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **arrays)  # type: ignore[arg-type]
    return buffer.getvalue()


def read_gallery(path: Path) -> Gallery:
    """Reads a gallery file."""
    try:
        with open_regular(path, MAX_BYTES) as file, zipfile.ZipFile(file) as parts:
            if sum(part.file_size for part in parts.infolist()) > MAX_BYTES:
                raise ValueError(f"it holds more than {MAX_BYTES:,} bytes")
            return _gallery(parts)
    except OSError as error:
        raise UnreadableError(f"{path} cannot be read: {error.strerror or error}") from None
    except Exception as error:  # the zip, deflate and npy readers raise many kinds of errors for damaged files
        raise UnreadableError(f"{path} is not a gallery: {first_line(error)}") from None


def _gallery(parts: zipfile.ZipFile) -> Gallery:
    about = _File.model_validate_json(_array(parts, "about", np.uint8, None).tobytes())
    pictures = []
    for number, one in enumerate(about.pictures):
        votes = (2, len(one.row_edges) - 1, len(one.col_edges) - 1)
        if max(one.prediction, one.runner_up) >= len(about.class_names):
            raise ValueError(f"picture {number} has a class beyond the {len(about.class_names)} named")
        if min(one.size_px) < 1 or not _ascending(one.row_edges) or not _ascending(one.col_edges):
            raise ValueError(f"picture {number} has no size, or edges that do not ascend")
        pixels = _array(parts, f"image_{number}", np.uint8, (*one.picture_px, 3))
        values = one.model_dump(exclude={"picture_px"})
        pictures.append(Picture(**values, pixels=pixels, votes=_array(parts, f"votes_{number}", np.int16, votes)))
    return Gallery(tuple(about.class_names), pictures)


def _ascending(edges: list[float]) -> bool:
    return bool(np.isfinite(edges).all() and (np.diff(edges) > 0).all())


def _array(parts: zipfile.ZipFile, name: str, dtype: type, shape: tuple[int, ...] | None) -> np.ndarray:
    """Reads one array, after checking dtype and shape in its header. `shape` None: a vector of any length."""
    content = io.BytesIO(parts.read(f"{name}.npy"))
    if np.lib.format.read_magic(content) != (1, 0):
        raise ValueError(f"{name} is not an array of npy version 1.0")
    found, by_columns, kind = np.lib.format.read_array_header_1_0(content)
    if kind != np.dtype(dtype) or by_columns or (shape is not None and found != shape) or len(found) < 1:
        raise ValueError(f"{name} is {kind} {list(found)}, expected {np.dtype(dtype)} {list(shape or ())}")
    values: np.ndarray = np.frombuffer(content.read(), dtype=dtype)
    return values.reshape(found) if shape is not None else values
