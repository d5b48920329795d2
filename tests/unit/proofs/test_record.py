"""Certificate records: what is in them, how a line is read, and a file that a kill leaves fit to be resumed."""

import base64
import hashlib
import json
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagcert.data.photo import Photo
from bagcert.data.preprocess import Preprocessing
from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.proofs.certificate_record import certificate_record
from bagcert.proofs.file import RecordFile
from bagcert.proofs.lines import MOST_LINE_BYTES, from_line, lines, seal, to_line
from bagcert.proofs.verify import verify_record
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import refused, tiny

ENVIRONMENT = {"device": "cpu", "backend": "torch", "dtype": "float32", "threads": 1, "versions": {"torch": "2"}}
PREPROCESSING = Preprocessing((8, 8))


def photo(source: str = "a.png", size=(8, 8), orientation: int = 1) -> Photo:
    return Photo(tiny.pixels(np.array([1]), size, tint=150)[0], orientation, source)


def make(
    source: str = "a.png", rule: str = "vote", patch: str = "2", size=(8, 8), orientation: int = 1, **changes: Any
):
    model, image = tiny.color_model(), photo(source, size, orientation)
    geometry = PREPROCESSING.geometry(image.stored_size, orientation)
    score_map = geometry.score_map(model.score_map(PREPROCESSING.apply(image)[None]))
    allowed = changes.pop("allowed", None)
    certificate = get_rule(rule).certify(score_map, PatchThreatModel.parse(patch, image.stored_size, allowed))
    return certificate_record(model, PREPROCESSING, image, score_map, certificate, ENVIRONMENT)


def test_a_record_holds_what_docs_records_md_says() -> None:
    record = make(size=(12, 8), orientation=6)
    pixels = tiny.pixels(np.array([1]), (12, 8), tint=150)[0]
    assert record["image"] == {
        "size_px": [12, 8],
        "exif_orientation": 6,
        "pixels_sha256": hashlib.sha256(pixels.tobytes()).hexdigest(),
    }
    seen = PREPROCESSING.apply(Photo(pixels, 6))
    assert record["network"]["pixels_sha256"] == hashlib.sha256(seen.tobytes()).hexdigest()
    assert (record["network"]["size_px"], record["network"]["fit"]) == ([8, 8], "squash")
    assert record["model"] == {"name": "Sequential", "weights_sha256": "", "head": "fixed-point", "scale": 2047.0}
    # The stored rows, from the last on, are the upright columns, of which 12 become 8; a region sees one of these.
    assert [len(record["geometry"][axis]) for axis in ("rows", "cols")] == [8, 8]
    assert record["geometry"]["cols"] == [[[i, i + 1]] for i in range(8)]
    assert [runs[0] for runs in record["geometry"]["rows"]][:2] == [[10, 12], [8, 11]]
    assert record["threat"] == {"notation": "2", "shapes": [[2, 2]], "patches": 1, "allowed": None}
    scores = np.frombuffer(zlib.decompress(base64.b64decode(record["scores"]["data"])), "<i2").reshape(3, 8, 8)
    expected = np.round(seen.astype(np.float32) / 255 * 2047).astype(int).transpose(2, 1, 0)
    assert np.abs(scores - expected).max() <= 1
    assert (record["scores"]["low"], record["scores"]["high"], record["scores"]["slack"]) == (-2047, 2047, None)
    assert (record["rule"], record["locality"], record["verdict"]["class_name"]) == ("vote", "exact", "green")
    assert next(iter(record)) == "record_version"
    text = json.dumps({k: v for k, v in record.items() if k != "sha256"}, sort_keys=True, separators=(",", ":"))
    assert record["sha256"] == hashlib.sha256(text.encode()).hexdigest()
    assert from_line(to_line(record)) == record
    assert verify_record(record).ok


@pytest.mark.parametrize("rule", ["vote", "levine-feizi", "double-masking", "detection"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_records_of_photos_are_verified(rule: str, orientation: int) -> None:
    allowed = np.ones((12, 20), dtype=bool)
    allowed[5, 11] = False
    for patch, where in (("4", None), ("3x5+5x2", allowed)):
        record = make(rule=rule, patch=patch, size=(12, 20), orientation=orientation, allowed=where)
        verdict = verify_record(json.loads(to_line(record)))
        assert verdict.ok, verdict


def test_a_record_is_of_one_image_and_of_small_integers() -> None:
    model, pixels = tiny.color_model(), tiny.pixels(np.array([1, 2]))
    two = model.score_map(pixels)
    certificate = get_rule("vote").certify(two, PatchThreatModel.parse("2", (8, 8)))
    with pytest.raises(UsageError, match="a record is for one image, got 2 score maps"):
        certificate_record(model, PREPROCESSING, Photo(pixels[0]), two, certificate, ENVIRONMENT)
    one = ScoreMap(torch.full((1, 3, 8, 8), 40_000), 0, 70_000, two.grid)
    certificate = get_rule("vote").certify(one, PatchThreatModel.parse("2", (8, 8)))
    with pytest.raises(UsageError, match=r"scores of 16 bits, got the range \[0, 70000\]"):
        certificate_record(model, PREPROCESSING, Photo(pixels[0]), one, certificate, ENVIRONMENT)


# Lines


def _without(record: dict[str, Any], *path: str) -> dict[str, Any]:
    changed = json.loads(json.dumps(record))
    place = changed
    for name in path[:-1]:
        place = place[name]
    del place[path[-1]]
    return changed


def test_what_is_no_line_of_a_record() -> None:
    record = make()
    line = to_line(record)
    for content, words in (
        (b"", "not JSON, or is cut short"),
        (line[: len(line) // 2], "not JSON, or is cut short"),
        (b"\xff\xfe" + line, "not text"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[1]", "not a JSON object"),
        (b"{}", "no record_version"),
        (line.replace(b'"record_version":1', b'"record_version":4'), "record_version is 4; this reads 1, 2 and 3"),
        (line.replace(b'"record_version":1', b'"record_version":3'), "it lacks 'evidence'"),
        (line.replace(b'"record_version":1', b'"record_version":true'), "record_version is True"),
        (line.replace(b'"scale":2047.0', b'"scale":NaN'), "NaN is not a number"),
        (line.replace(b'"scale":2047.0', b'"scale":-Infinity'), "-Infinity is not a number"),
        (line.replace(b'"patches":1', b'"patches":2,"patches":1'), "the key 'patches' occurs twice"),
        (line.replace(b'"patches":1', b'"patches":1' + b"0" * 5000), "digits"),
        (line.replace(b'"fit":"squash"', b'"fit":"squish"'), "SHA-256 does not match its content"),
        (to_line(_without(record, "rule")), "it lacks 'rule'"),
        (to_line(_without(record, "verdict", "margin")), "its verdict lacks 'margin'"),
        (to_line({**record, "note": "trust me"}), "it has the unknown field 'note'"),
        (to_line({**record, "model": {**record["model"], "note": ""}}), "its model has the unknown field 'note'"),
        (to_line({**record, "threat": []}), "its threat is not a JSON object"),
        (to_line({**record, "source": 5}), "its source is not text"),
        (to_line({**record, "environment": {**ENVIRONMENT, "dtype": ["x"]}}), "its environment.dtype is not text"),
        (line.replace(b'"scale":2047.0', b'"scale":1e999'), "JSON compliant"),
        (b" " * (MOST_LINE_BYTES + 1), "more than 67,108,864 bytes"),
    ):
        with pytest.raises(ValueError, match=r".") as error:
            from_line(content)
        assert words in str(error.value), words


def test_a_sealed_forgery_has_the_right_form() -> None:
    record = make()
    forged = seal({**record, "verdict": {**record["verdict"], "margin": 10**6, "certified": True}})
    assert from_line(to_line(forged)) == forged
    assert not verify_record(forged).ok


def test_lines_of_a_file_that_is_none(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing.jsonl"):
        refused(UnreadableError, "cannot be read", list, lines(path))


# Files


def _file(path: Path, resume: bool = False, **changes: Any) -> RecordFile:
    settings = {"rules": ["vote", "detection"], "patches": ["2"], "environment": ENVIRONMENT, **changes}
    return RecordFile(path, settings.pop("model", tiny.color_model()), resume=resume, **settings)


@cache
def _images() -> list[list[dict[str, Any]]]:
    return [[make(f"{name}.png", rule) for rule in ("vote", "detection")] for name in "abc"]


def _write(path: Path, resume: bool = False) -> list[str]:
    """Does what is not done yet; the names of those."""
    done = []
    with _file(path, resume) as file:
        for records in _images():
            if not file.holds(photo(records[0]["source"])):
                file.append(records)
                done.append(records[0]["source"])
    return done


def test_resume_of_a_file_cut_anywhere(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    assert _write(path) == ["a.png", "b.png", "c.png"]
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == 10]
    assert len(ends) == 6
    group = ends[1::2]  # where the two records of an image are there
    cuts = {0, 1, 18, ends[0] - 1, ends[0], ends[1] - 1, ends[1], ends[2], ends[4] + 40, len(whole)}
    for cut in sorted(cuts | set(np.random.default_rng(0).integers(0, len(whole), 4).tolist())):
        path.write_bytes(whole[:cut])
        done = _write(path, resume=True)
        assert len(done) == 3 - sum(end <= cut for end in group)
        assert path.read_bytes() == whole


def test_a_name_given_twice_is_done_twice(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = _images()[0]
    with _file(path) as file:
        file.append(first)
        file.append(first)
    with _file(path, resume=True) as file:
        assert file.kept == 2
        assert [file.holds(photo("a.png")) for _ in range(3)] == [True, True, False]
        assert not file.holds(photo("b.png"))
        assert (file.held, file.changed) == (2, [])
        brighter = Photo(photo("a.png").pixels | 1, source="a.png")
        turned = Photo(photo("a.png").pixels, 3, "a.png")
        assert not file.holds(brighter)
        assert not file.holds(turned)
        assert (file.held, file.changed) == (2, ["a.png", "a.png"])


def test_a_file_of_another_run_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    _write(path)
    whole = path.read_bytes()
    refused(UsageError, "already exists; use --resume to continue it or choose another --record", _file, path)
    other = tiny.color_model()
    other.weights_sha256 = "0" * 64
    for changes, words in (
        ({"model": other}, "line 1 of .* has the model"),
        ({"environment": {**ENVIRONMENT, "dtype": "bfloat16"}}, "has the environment .*dtype float32.*dtype bfloat16"),
        ({"fit": "center-crop"}, "has the fit squash; this run has center-crop"),
        ({"rules": ["vote"]}, "line 2 of .* is for detection against 2; this run expects vote against 2"),
        ({"rules": ["detection", "vote"]}, "line 1 of .* is for vote against 2; this run expects detection against 2"),
        ({"patches": ["3"]}, "is for vote against 2; this run expects vote against 3"),
        ({"patches": ["9"]}, "is for vote against 2; this run expects vote against 9"),
    ):
        refused(UsageError, words, _file, path, resume=True, **changes)
        assert path.read_bytes() == whole


def test_a_mistake_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    for changes in ({"rules": ["votes"]}, {"patches": ["five"]}):
        refused(UsageError, None, _file, path, **changes)
        assert not path.exists()
    with _file(path):
        pass
    assert _write(path) == ["a.png", "b.png", "c.png"], "an empty file is no run to go on with"


def test_another_file_is_never_cut(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    for content in (b"no newline at the end", b"a line\nanother", b'{"a": 1}\n', b"\n", b"\0" * 40):
        path.write_bytes(content)
        refused(UnreadableError, "line", _file, path, resume=True)
        assert path.read_bytes() == content
    whole = b"".join(map(to_line, _images()[0]))
    for content in (whole[:100] + whole[101:] + whole, whole.replace(b'"threads":1', b'"threads":2')):
        path.write_bytes(content)
        with pytest.raises((UnreadableError, UsageError), match="line 1"):
            _file(path, resume=True)
        assert path.read_bytes() == content
    other = make("a.png", "detection")
    other["image"] |= {"pixels_sha256": "0" * 64}
    for second in (_images()[1][1], seal(other)):
        path.write_bytes(to_line(_images()[0][0]) + to_line(second))
        refused(UnreadableError, r"line 2 .* is of another image than the line before", _file, path, resume=True)


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    with _file(path) as file:
        file.append(_images()[0])
        whole = path.read_bytes()
        raw = file._file

        class Full:
            room = 100

            def write(self, content: memoryview) -> int:
                if not self.room:
                    raise OSError(28, "No space left on device")
                taken, self.room = min(self.room, 60), max(0, self.room - 60)
                return raw.write(content[:taken])

            def close(self) -> None:
                raw.close()

        monkeypatch.setattr(file, "_file", Full())
        refused(BagcertError, r"r\.jsonl cannot be written: No space left on device", file.append, _images()[1])
    assert path.read_bytes()[: len(whole)] == whole
    assert len(path.read_bytes()) == len(whole) + 100
    assert _write(path, resume=True) == ["b.png", "c.png"]
