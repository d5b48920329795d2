"""Creates certificate records: all data needed to recheck the verdict for an image, a rule and a patch.

The fields are described in docs/records.md. Records contain no timestamps and no random values, so an interrupted and
resumed run produces the same bytes as an uninterrupted run.
"""

import base64
import hashlib
import zlib
from dataclasses import asdict
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.data.photo import Photo
from bagcert.data.preprocess import Preprocessing
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UsageError
from bagcert.grid import RegionGrid
from bagcert.proofs.lines import READOUT_VERSION, seal
from bagcert.records import Record
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel

if TYPE_CHECKING:
    from bagcert.aggregation import AttentionPooling


def certificate_record(
    model: BagCert,
    preprocessing: Preprocessing,
    photo: Photo,
    score_map: ScoreMap,
    certificate: Certificate,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Create the record of the certificate of one image, ready for `bagcert.proofs.lines.to_line`.

    Args:
        model: model that computed the scores.
        preprocessing: preprocessing of the photo for the network.
        photo: the image as stored.
        score_map: scores [1, classes, rows, cols] or evidence of the image, with the geometry of the stored photo.
        certificate: certificate of the image.
        environment: `device`, `backend`, `dtype`, `threads` and `versions` of the run.

    Raises:
        UsageError: more than one image, or scores outside the int16 range.
    """
    if len(score_map) != 1 or len(certificate) != 1:
        raise UsageError(f"a record is for one image, got {len(score_map)} score maps, {len(certificate)} certificates")
    (said,) = Record.each(certificate)
    restricted = certificate.threat.allowed is not None
    record = {
        "record_version": 3 if score_map.readout is not None else 2 if restricted else 1,
        "source": photo.source,
        "image": image_fields(photo),
        "network": {
            "size_px": list(preprocessing.size),
            "fit": preprocessing.fit,
            "pixels_sha256": pixels_sha256(preprocessing.apply(photo)),
        },
        "model": model_fields(model),
        "geometry": geometry_fields(score_map.grid),
        "threat": threat_fields(certificate.threat),
        "rule": certificate.rule,
        **map_fields(score_map),
        "locality": certificate.locality,
        "verdict": {
            "prediction": said.prediction,
            "class_name": model.class_names[said.prediction],
            **{name: asdict(said)[name] for name in ("certified", "margin", "worst_placement")},
        },
        "environment": environment,
    }
    return seal(record)


def image_fields(photo: Photo) -> dict[str, Any]:
    """Fields that identify an image: stored size and orientation, and a hash of the pixels."""
    return {
        "size_px": list(photo.stored_size),
        "exif_orientation": photo.orientation,
        "pixels_sha256": pixels_sha256(photo.pixels),
    }


def pixels_sha256(pixels: np.ndarray) -> str:
    """SHA-256 of uint8 pixels [height, width, 3], row by row."""
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def model_fields(model: BagCert) -> dict[str, Any]:
    """Fields that identify a model and its head."""
    return {
        "name": model.name,
        "weights_sha256": model.weights_sha256,
        "head": model.scorer.head,
        "scale": model.scorer.scale,
    }


@lru_cache(maxsize=64)
def geometry_fields(grid: RegionGrid) -> dict[str, Any]:
    """Geometry fields: the pixels seen by each row and column of regions, as ascending runs [start, stop).

    `masks_per_axis` is added if the windows per axis are limited.
    """
    limit = {} if grid.masks_per_axis is None else {"masks_per_axis": grid.masks_per_axis}
    return {"rows": [_runs(seen) for seen in grid.rows_seen], "cols": [_runs(seen) for seen in grid.cols_seen], **limit}


def threat_fields(threat: PatchThreatModel) -> dict[str, Any]:
    """Threat fields: notation, shapes, number of patches, and allowed placements as packed bits, row by row."""
    return {
        "notation": threat.notation,
        "shapes": [list(shape) for shape in threat.shapes],
        "patches": threat.patches,
        "allowed": None if threat.allowed is None else _pack(np.packbits(threat.allowed).tobytes()),
    }


def map_fields(score_map: ScoreMap) -> dict[str, Any]:
    """Map fields under their name in a record: `scores`, or `evidence` for attention pooling."""
    if score_map.readout is None:
        return {"scores": scores_fields(score_map)}
    return {"evidence": evidence_fields(score_map, score_map.readout)}


def scores_fields(score_map: ScoreMap) -> dict[str, Any]:
    """Score fields: the integers [classes, rows, cols] and their slack, if any, as deflated little-endian int16."""
    if not -(2**15) <= score_map.low < score_map.high < 2**15:
        raise UsageError(f"a record holds scores of 16 bits, got the range [{score_map.low}, {score_map.high}]")
    return {
        "shape": list(score_map.scores.shape[1:]),
        "low": score_map.low,
        "high": score_map.high,
        "data": _pack_int16(score_map.scores[0]),
        "slack": None if score_map.slack is None else _pack_int16(score_map.slack[0]),
    }


def evidence_fields(score_map: ScoreMap, readout: "AttentionPooling") -> dict[str, Any]:
    """Evidence fields: products as deflated little-endian int32, weights as deflated bytes, and the readout hash."""
    products, weights = score_map.scores[0].split([readout.values, readout.heads])
    return {
        "shape": [readout.values, readout.heads, *score_map.grid.map_size],
        "readout_sha256": readout_fields(readout)["sha256"],
        "products": _pack_integers(products, "<i4"),
        "weights": _pack_integers(weights, "u1"),
    }


@lru_cache(maxsize=4)
def readout_fields(readout: "AttentionPooling") -> dict[str, Any]:
    """Readout fields: sizes, matrices as deflated little-endian int32, and the hash of all these integers."""
    parts = {name: getattr(readout, name) for name in ("first", "first_bias", "second", "skip", "bias")}
    sizes = {
        "values": readout.values,
        "heads": readout.heads,
        "hidden": len(readout.first),
        "classes": readout.classes,
    }
    hashed = hashlib.sha256(np.array(list(sizes.values()), "<i4").tobytes())
    for part in parts.values():
        hashed.update(_bytes(part, "<i4"))
    packed = {name: _pack_integers(part, "<i4") for name, part in parts.items()}
    return {"readout_version": READOUT_VERSION, **sizes, **packed, "sha256": hashed.hexdigest()}


def _runs(seen: np.ndarray) -> list[list[int]]:
    edges = np.flatnonzero(np.diff(np.concatenate([[0], seen.astype(np.int8), [0]])))
    return edges.reshape(-1, 2).tolist()


def _pack_int16(values: Tensor) -> str:
    return _pack_integers(values.clamp(max=2**15 - 1), "<i2")


def _pack_integers(values: Tensor, dtype: str) -> str:
    return _pack(_bytes(values, dtype))


def _bytes(values: Tensor, dtype: str) -> bytes:
    return values.cpu().numpy().astype(dtype).tobytes()


def _pack(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode("ascii")
