"""Compares certificate records with their model and images by recomputing hashes, geometry and scores."""

import base64
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bagcert.data.photo import Photo, read_image
from bagcert.data.preprocess import FITS, Preprocessing
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UnreadableError
from bagcert.proofs.certificate_record import geometry_fields, image_fields, map_fields, model_fields, pixels_sha256
from bagcert.proofs.verify import VerifyResult

PACKED = {
    "data": ("scores", "<i2"),
    "slack": ("slack of the scores", "<i2"),
    "products": ("products of the evidence", "<i4"),
    "weights": ("weights of the evidence", "u1"),
}
"""The packed fields of a map: their name in messages and their dtype."""


def image_path(record: dict[str, Any], images: Path | None = None) -> Path:
    """Path of the image of a record: its source, or the file of the same name in the folder `images`."""
    source = Path(record["source"])
    return source if images is None else images / source.name


def recompute(record: dict[str, Any], model: BagCert, path: Path) -> VerifyResult:
    """Check that a verified record matches the model and the image.

    The image must have the recorded pixels, and the model the recorded weights, head and readout. The geometry and the
    scores or evidence are recomputed and must equal the recorded ones exactly.

    Args:
        record: a record accepted by `from_line` and `verify_record`.
        model: the model, on any device, in the recorded dtype.
        path: path of the image file.

    Returns:
        A verdict; its fault is "proof" for a mismatch and "image" if the image cannot be read.
    """
    for name, there, here in _pairs(record["model"], model_fields(model)):
        if name != "name" and there != here:
            return _refused(f"its {name} is {there}, but that of {model.name} is {here}")
    try:
        photo = read_image(path)
    except UnreadableError as error:
        return VerifyResult(False, f"its image cannot be compared: {error}", "image")
    for name, there, here in _pairs(record["image"], image_fields(photo)):
        if there != here:
            return _refused(f"the {name} of its image is {there}, but that of {path} is {here}")
    return _computed(record, model, photo)


def _computed(record: dict[str, Any], model: BagCert, photo: Photo) -> VerifyResult:
    said = record["network"]
    if said["fit"] not in FITS:
        return _refused(f"its fit is {said['fit']!r}, expected {' or '.join(FITS)}")
    preprocessing = Preprocessing(model.image_size, said["fit"])
    pixels = preprocessing.apply(photo)
    network = {"size_px": list(preprocessing.size), "fit": said["fit"], "pixels_sha256": pixels_sha256(pixels)}
    for name, there, here in _pairs(said, network):
        if there != here:
            return _refused(f"the {name} of the network's input is {there}, recomputed as {here}")
    geometry = preprocessing.geometry(photo.stored_size, photo.orientation)
    score_map = geometry.score_map(model.score_map(pixels[None]))
    # The limit of masks per axis belongs to the rule, and `verify_record` has applied it.
    for axis, there, here in _pairs(record["geometry"], geometry_fields(score_map.grid.with_masks_per_axis(None))):
        if there != here:
            number = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), len(here))
            return _refused(f"its geometry is not the network's: {axis} differ from number {number} on")
    ((name, found),) = map_fields(score_map).items()
    if (refused := _map(record, name, found)) is not None:
        return refused
    label = record["verdict"]["prediction"]
    if record["verdict"]["class_name"] != model.class_names[label]:
        return _refused(f"class {label} is {model.class_names[label]!r}, not {record['verdict']['class_name']!r}")
    return VerifyResult(True, "pixels, geometry and scores are those of the model")


def _map(record: dict[str, Any], name: str, found: dict[str, Any]) -> VerifyResult | None:
    """Return a negative verdict if the recorded map (`scores` or `evidence`) differs from the recomputed one."""
    if name not in record:
        return _refused(f"the record has no {name}, but this model computes {name}")
    said = record[name]
    for field in found:
        if field not in PACKED and said[field] != found[field]:
            return _refused(f"the {field} of its {name} is {said[field]}, recomputed as {found[field]}")
    for field in found:
        if field not in PACKED:
            continue
        what, dtype = PACKED[field]
        there, here = _unpacked(said[field], dtype), _unpacked(found[field], dtype)
        if there.shape != here.shape:
            return _refused(f"the {what} have {there.size} values, but the recomputed ones have {here.size}")
        if not np.array_equal(there, here):
            return _refused(
                f"the {what} differ from the network's here in {int((there != here).sum())} of {here.size} places by "
                f"up to {int(np.abs(there - here).max())} (recorded with {_where(record['environment'])})"
            )
    return None


def _pairs(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, there[name], value) for name, value in here.items()]


def _unpacked(text: str | None, dtype: str) -> np.ndarray:
    """Unpack a field whose size `verify_record` has checked; empty for None."""
    return np.frombuffer(b"" if text is None else zlib.decompress(base64.b64decode(text)), dtype).astype(int)


def _where(environment: dict[str, Any]) -> str:
    version = environment["versions"].get("torch", "unknown")
    return f"{environment['device']}, {environment['dtype']}, torch {version}, {environment['threads']} threads"


def _refused(reason: str) -> VerifyResult:
    return VerifyResult(False, reason, "proof")
