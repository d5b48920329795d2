"""Certificate records against their model and images: pixels by their hashes, scores and geometry computed again."""

import base64
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from bagcert.data.photo import Photo, read_image
from bagcert.data.preprocess import FITS, Preprocessing
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UnreadableError
from bagcert.proofs.record import geometry_fields, image_fields, model_fields, pixels_sha256, scores_fields
from bagcert.proofs.verify import Verdict


def image_path(record: dict[str, Any], images: Path | None = None) -> Path:
    """Where the image of a record is: its source, or the file of that name in the folder `images`."""
    source = Path(record["source"])
    return source if images is None else images / source.name


def recompute(record: dict[str, Any], model: BagCert, path: Path) -> Verdict:
    """Is this what the model says of this image? To be asked of records that `verify_record` found to hold.

    The image must have the recorded pixels, the model the recorded weights and head; its own geometry for such an
    image, and its scores, computed here again, must be the recorded ones exactly.

    Args:
        record: of a form that `from_line` and `verify_record` accept.
        model: loaded on any device, in the recorded dtype.
        path: of the image file.
    """
    for name, there, here in _pairs(record["model"], model_fields(model)):
        if name != "name" and there != here:
            return _refused(f"its {name} is {there}, that of {model.name} is {here}")
    try:
        photo = read_image(path)
    except UnreadableError as error:
        return Verdict(False, f"its image cannot be compared: {error}", "image")
    for name, there, here in _pairs(record["image"], image_fields(photo)):
        if there != here:
            return _refused(f"the {name} of its image is {there}, that of {path} is {here}")
    return _scores(record, model, photo)


def _scores(record: dict[str, Any], model: BagCert, photo: Photo) -> Verdict:
    said = record["network"]
    if said["fit"] not in FITS:
        return _refused(f"its fit is {said['fit']!r}, known are {' and '.join(FITS)}")
    preprocessing = Preprocessing(model.image_size, said["fit"])
    pixels = preprocessing.apply(photo)
    network = {"size_px": list(preprocessing.size), "fit": said["fit"], "pixels_sha256": pixels_sha256(pixels)}
    for name, there, here in _pairs(said, network):
        if there != here:
            return _refused(f"the {name} of the network's input is {there}, here {here}")
    geometry = preprocessing.geometry(photo.stored_size, photo.orientation)
    score_map = geometry.score_map(model.score_map(pixels[None]))
    for axis, there, here in _pairs(record["geometry"], geometry_fields(score_map.grid)):
        if there != here:
            number = next((i for i, (a, b) in enumerate(zip(there, here, strict=False)) if a != b), len(here))
            return _refused(f"its geometry is not the network's: {axis} differ from number {number} on")
    scores = scores_fields(score_map)
    for name in ("shape", "low", "high"):
        if record["scores"][name] != scores[name]:
            return _refused(f"the {name} of its scores is {record['scores'][name]}, here {scores[name]}")
    for name in ("data", "slack"):
        there, here = _unpacked(record["scores"][name]), _unpacked(scores[name])
        if not np.array_equal(there, here):
            what = "scores" if name == "data" else "slack of the scores"
            if there.shape != here.shape:
                return _refused(f"the {what} are {there.size} numbers, here {here.size}")
            return _refused(
                f"the {what} differ from the network's here in {int((there != here).sum())} of {here.size} places by "
                f"up to {int(np.abs(there - here).max())} (recorded with {_where(record['environment'])})"
            )
    label = record["verdict"]["prediction"]
    if record["verdict"]["class_name"] != model.class_names[label]:
        return _refused(f"class {label} is {model.class_names[label]!r}, not {record['verdict']['class_name']!r}")
    return Verdict(True, "pixels, geometry and scores are those of the model")


def _pairs(there: dict[str, Any], here: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, there[name], value) for name, value in here.items()]


def _unpacked(text: str | None) -> np.ndarray:
    """Of fields that `verify_record` has unpacked within its limits; nothing for None."""
    return np.frombuffer(b"" if text is None else zlib.decompress(base64.b64decode(text)), dtype="<i2").astype(int)


def _where(environment: dict[str, Any]) -> str:
    version = environment["versions"].get("torch", "unknown")
    return f"{environment['device']}, {environment['dtype']}, torch {version}, {environment['threads']} threads"


def _refused(reason: str) -> Verdict:
    return Verdict(False, reason, "proof")
