"""Records of certificates for the checker, and what a forger changes in them."""

import base64
import copy
import zlib
from typing import Any

import numpy as np

from bagcert.certificate import Certificate
from bagcert.proofs.certificate_record import geometry_fields, map_fields, threat_fields
from bagcert.proofs.verify import VerifyResult
from bagcert.records import Record
from bagcert.scores import ScoreMap


def packed(values: np.ndarray, dtype: str = "<i2") -> str:
    return base64.b64encode(zlib.compress(values.astype(dtype).tobytes())).decode()


def unpacked(text: str, dtype: str = "<i2") -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype).copy()


def record_of(score_map: ScoreMap, certificate: Certificate, image: int = 0) -> dict[str, Any]:
    """What the checker reads of a record."""
    said = Record.each(certificate)[image]
    restricted = certificate.threat.allowed is not None
    return {
        "record_version": 3 if score_map.readout is not None else 2 if restricted else 1,
        "image": {"size_px": list(score_map.grid.image_size)},
        "geometry": geometry_fields(score_map.grid),
        "threat": threat_fields(certificate.threat),
        "rule": certificate.rule,
        **map_fields(score_map[image : image + 1]),
        "locality": certificate.locality,
        "verdict": {name: getattr(said, name) for name in ("prediction", "certified", "margin", "worst_placement")},
    }


def altered(record: dict[str, Any], *path: str, value: Any) -> dict[str, Any]:
    """A copy with one value replaced."""
    changed = copy.deepcopy(record)
    place = changed
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    return changed


def with_scores(record: dict[str, Any], scores: np.ndarray) -> dict[str, Any]:
    return altered(record, "scores", "data", value=packed(scores))


def scores_in(record: dict[str, Any]) -> np.ndarray:
    return unpacked(record["scores"]["data"]).reshape(record["scores"]["shape"])


def check_refused(verdict: VerifyResult, fault: str, *words: str) -> None:
    assert (verdict.ok, verdict.fault) == (False, fault), verdict
    for word in words:
        assert word in verdict.reason
    assert "\n" not in verdict.reason
