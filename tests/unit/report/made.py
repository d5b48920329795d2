"""Results, records and galleries made by hand."""

import json
from pathlib import Path

import numpy as np

from bagcert.evaluation.gallery_file import Gallery, Picture, gallery_bytes, gallery_path
from bagcert.records import ImageRecord, Record, Row, RunInfo

EVIL = "<script>alert(1)</script>"
EDGES = [0.0, 2.0, 4.0]


def record(index: int, label: int, prediction: int, margin: int, rule: str = "vote") -> ImageRecord:
    verdict = Record(rule, [2, 2], "2", prediction, margin >= 0, margin, [0, 1, 2, 2])
    return ImageRecord(index, label, [verdict])


RECORDS = [record(0, 0, 0, 5), record(1, 0, 1, -3), record(2, 1, 1, -1), record(3, 1, 1, 0)]


def info(**changes: object) -> RunInfo:
    interval = {"clean_accuracy": [0.3, 0.95], "certified_accuracy": [0.15, 0.85]}
    row = Row("vote", [2, 2], "2", 0.75, 0.5, 0.5, interval, 0.1)
    values: dict = {
        "model": "tiny",
        "weights_sha256": "ab" * 32,
        "data": "colors",
        "split": "test",
        "images": 4,
        "limit": None,
        "device": "cpu",
        "backend": "torch",
        "dtype": "float32",
        "threads": 1,
        "versions": {"python": "3.11"},
        "seconds": {"total": 1.5},
        "results": [row],
    }
    return RunInfo(**values | changes)


def gallery(names: tuple[str, ...] = ("red", "green")) -> Gallery:
    pixels = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    votes = np.array([[[3, 0], [1, 1]], [[0, 2], [1, 0]]], dtype=np.int16)
    pictures = [
        Picture(index, prediction, 1 - prediction, (4, 4), pixels, votes, EDGES, EDGES, [[0, 1, 2, 2]], 2, 3)
        for index, prediction in ((0, 0), (1, 1), (2, 1))
    ]
    return Gallery(names, pictures)


def write(folder: Path, names: tuple[str, ...] = ("red", "green"), **changes: object) -> Path:
    path = folder / "r.json"
    path.write_text(json.dumps(info(**changes).to_dict()))
    path.with_suffix(".records.jsonl").write_text("".join(one.to_json() + "\n" for one in RECORDS))
    gallery_path(path).write_bytes(gallery_bytes(gallery(names)))
    return path
