"""`bagcert certify --record` and `bagcert verify`: from image files to a rechecked proof, and what forgers meet."""

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bagcert.proofs.lines import seal, to_line
from tests import tiny
from tests.command import run

RULES = ("vote", "levine-feizi", "double-masking", "detection")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits in files, and their records by every rule."""
    from bagcert.data import load_dataset

    folder = tmp_path_factory.mktemp("records")
    (folder / "photos").mkdir()
    digits = load_dataset("digits", "test", 5)
    for number in (0, 2, 4):
        Image.fromarray(digits.read([number])[0].pixels).save(folder / "photos" / f"{number}.png")
    rules = [option for rule in RULES for option in ("--rule", rule)]
    code, out, err = run(
        *("certify", folder / "photos", "--model", "digits", "--device", "cpu", *rules, "--json"),
        *("--record", folder / "r.jsonl"),
    )
    assert (code, err) == (0, "")
    assert len(json.loads(out)["results"]) == 3
    return folder


@pytest.fixture
def records(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "r.jsonl").read_text().splitlines()]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(to_line(seal(record)) for record in records))
    return path


def test_a_record_of_a_part_of_the_image_says_so(home: Path, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:3, :3] = 255
    Image.fromarray(mask).save(tmp_path / "corner.png")
    options = ("--model", "digits", "--patch", 5, "--placements", tmp_path / "corner.png", "--device", "cpu")
    code, out, _ = run("certify", home / "photos" / "0.png", *options, "--record", tmp_path / "c.jsonl", "--json")
    (said,) = json.loads(out)["results"][0]["results"]
    assert (code, said["threat"]) == (0, "5 within the allowed placements")
    code, out, _ = run("verify", tmp_path / "c.jsonl", "--json")
    (found,) = json.loads(out)["results"]
    assert (code, found["verified"], found["threat"]) == (0, True, "5 within the allowed placements")
    record = json.loads((tmp_path / "c.jsonl").read_text())
    assert (record["record_version"], record["threat"]["shapes"]) == (2, [[5, 5]])
    old = write(tmp_path / "old.jsonl", [{**record, "record_version": 1}])
    words = "version 1 left out smaller patches within a mask"
    code, _, err = run("verify", old)
    assert code == 5
    assert words in err
    code, _, err = run("certify", home / "photos", *options, "--record", old, "--resume")
    assert code == 2
    assert words.replace("version 1 ", "record version 1, which ") in err
    record["verdict"]["margin"] += 1
    code, _, err = run("verify", write(tmp_path / "forged.jsonl", [record]))
    assert code == 4
    assert "double-masking, 5 within the allowed placements): the margin is" in err


def test_repeated_records_and_distinct_images_are_counted(
    home: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    _, out, _ = run("verify", home / "r.jsonl")
    assert out.endswith(" not; 3 distinct images, 0 repeated records\n")
    same = {**records[1], "source": "elsewhere.png"}  # the same pixels, rule and patch under another name
    path = write(tmp_path / "again.jsonl", [*records[:2], records[0], same])
    _, out, _ = run("verify", path)
    assert out.endswith(" not; 1 distinct image, 2 repeated records\n")
    found = json.loads(run("verify", path, "--json")[1])
    assert (found["records"], found["distinct_images"], found["repeated"]) == (4, 1, 2)
    assert [result["repeats_line"] for result in found["results"]] == [None, None, 1, 2]


def test_records_are_verified_with_and_without_the_model(home: Path, records: list[dict[str, Any]]) -> None:
    certified = sum(record["verdict"]["certified"] for record in records)
    assert 0 < certified < len(records) == 12
    code, out, err = run("verify", home / "r.jsonl")
    assert (code, err) == (0, "")
    basis = "given the recorded scores and geometry"
    counted = f"{certified} certified, {12 - certified} not; 3 distinct images, 0 repeated records"
    assert out == f"12 of 12 records hold, {basis}: {counted}\n"
    options = ("--model", "digits", "--images", home / "photos", "--device", "cpu", "--json")
    code, out, err = run("verify", home / "r.jsonl", *options)
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert next(iter(found)) == "schema_version"
    assert (found["records"], found["verified"], found["certified"]) == (12, 12, certified)
    assert found["results"][0] == {
        "line": 1,
        "source": records[0]["source"],
        "rule": "vote",
        "threat": "2",
        "prediction": records[0]["verdict"]["prediction"],
        "certified": records[0]["verdict"]["certified"],
        "margin": records[0]["verdict"]["margin"],
        "locality": "exact",
        "verified": True,
        "fault": None,
        "reason": "pixels, geometry and scores are those of the model",
        "repeats_line": None,
    }


def test_a_run_resumed_leaves_the_same_bytes(home: Path, tmp_path: Path) -> None:
    whole = (home / "r.jsonl").read_bytes()
    path = tmp_path / "r.jsonl"
    rules = [option for rule in RULES for option in ("--rule", rule)]
    certify = ("certify", home / "photos", "--model", "digits", "--device", "cpu", *rules, "--record", path, "--json")
    path.write_bytes(whole[: len(whole) // 2])
    code, _, err = run(*certify)
    assert code == 2
    assert "already exists; use --resume" in err
    code, out, err = run(*certify, "--resume")
    assert code == 0
    assert "already held 1 of 3 images" in err
    assert len(json.loads(out)["results"]) == 2
    assert path.read_bytes() == whole
    code, out, _ = run(*certify, "--resume")
    assert (code, json.loads(out)["results"]) == (0, [])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("case", ["replaced", "another of that name"])
def test_a_resumed_run_certifies_an_image_that_is_not_the_recorded_one(
    case: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = tmp_path / "r.jsonl"
    certify = ("certify", "x.png", "--model", "digits", "--device", "cpu", "--record", record)
    for folder, number in (("a", 0), ("b", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.png").write_bytes((home / "photos" / f"{number}.png").read_bytes())
    monkeypatch.chdir(tmp_path / "a")
    assert run(*certify)[0] == 0
    if case == "replaced":
        (tmp_path / "a" / "x.png").write_bytes((tmp_path / "b" / "x.png").read_bytes())
    else:
        monkeypatch.chdir(tmp_path / "b")
    code, out, err = run(*certify, "--resume")
    assert code == 0
    assert "x.png" in out
    assert err == f"Warning: {record} holds a certificate for a different image named x.png; this one was certified\n"
    hashes = [json.loads(line)["image"]["pixels_sha256"] for line in record.read_bytes().splitlines()]
    pixels = [np.asarray(Image.open(home / "photos" / f"{number}.png").convert("RGB")) for number in (0, 2)]
    assert hashes == [hashlib.sha256(each.tobytes()).hexdigest() for each in pixels]
    whole = record.read_bytes()
    code, out, err = run(*certify, "--resume")
    assert (code, out, record.read_bytes()) == (0, "", whole)
    assert "already held 1 of 1 images" in err


def test_a_killed_run_is_completed(home: Path, tmp_path: Path) -> None:
    """A real kill -9 in mid-run; tests/unit/proofs/test_record.py cuts the file everywhere else."""
    source = (home / "photos" / "0.png").read_bytes()
    for number in range(30):
        (tmp_path / f"{number:02}.png").write_bytes(source)
    certify = ("certify", tmp_path, "--model", "digits", "--device", "cpu", "--json")
    path = tmp_path / "killed.jsonl"
    command = [sys.executable, "-m", "bagcert", *map(str, certify), "--record", str(path)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    with open(os.devnull, "w") as nowhere:
        process = subprocess.Popen(command, env=environment, stdout=nowhere, stderr=nowhere)
        while process.poll() is None and not (path.exists() and path.stat().st_size):
            time.sleep(0.005)
        process.kill()
        process.wait()
    there = path.read_bytes()
    assert run(*certify, "--record", path, "--resume")[0] == 0
    completed = path.read_bytes()
    kept = there[: there.rfind(b"\n") + 1]
    assert completed.startswith(kept)
    assert kept
    lines = completed.splitlines()
    assert [Path(json.loads(line)["source"]).name for line in lines] == [f"{n:02}.png" for n in range(30)]
    assert run("verify", path)[0] == 0


def _pack(scores: np.ndarray) -> str:
    return base64.b64encode(zlib.compress(scores.astype("<i2").tobytes())).decode()


def _scores(record: dict[str, Any]) -> np.ndarray:
    content = zlib.decompress(base64.b64decode(record["scores"]["data"]))
    return np.frombuffer(content, "<i2").reshape(record["scores"]["shape"]).copy()


def _certify(record: dict[str, Any]) -> None:
    record["verdict"]["certified"] = True


def _certify_with_margin(record: dict[str, Any]) -> None:
    record["verdict"] |= {"certified": True, "margin": 5}


def _other_class(record: dict[str, Any]) -> None:
    record["verdict"]["prediction"] = (record["verdict"]["prediction"] + 1) % 10


def _better_margin(record: dict[str, Any]) -> None:
    record["verdict"]["margin"] += 1


def _one_score(record: dict[str, Any]) -> None:
    scores = _scores(record)
    scores[record["verdict"]["prediction"]] += 1
    record["scores"]["data"] = _pack(scores.clip(-2047, 2047))


def _larger_threat(record: dict[str, Any]) -> None:
    record["threat"] |= {"notation": "3", "shapes": [[3, 3]]}
    for place in np.reshape(record["verdict"]["worst_placement"], (-1, 4)).tolist():
        assert place[2:] == [2, 2]


def _smaller_fields(record: dict[str, Any]) -> None:
    record["geometry"] = {axis: [[[i, i + 1]] for i in range(8)] for axis in ("rows", "cols")}


def _another_rule(record: dict[str, Any]) -> None:
    record["rule"] = "detection"
    record["verdict"]["worst_placement"] = record["verdict"]["worst_placement"][0]


FORGERIES: list[Callable[[dict[str, Any]], None]] = [
    _certify,
    _certify_with_margin,
    _other_class,
    _better_margin,
    _one_score,
    _larger_threat,
    _smaller_fields,
    _another_rule,
]


@pytest.mark.parametrize("forge", FORGERIES, ids=lambda forge: forge.__name__.strip("_"))
def test_a_forged_record_with_a_fresh_hash_fails_by_its_proof(
    forge: Callable[[dict[str, Any]], None], records: list[dict[str, Any]], tmp_path: Path
) -> None:
    (record,) = [r for r in records if r["rule"] == "double-masking" and not r["verdict"]["certified"]][:1]
    forge(record)
    code, out, err = run("verify", write(tmp_path / "forged.jsonl", [records[0], record]))
    assert code == 4, err
    assert out.startswith("1 of 2 records hold")
    assert "line 2" in err
    assert "SHA" not in err


def _forged_for_less(record: dict[str, Any]) -> dict[str, Any]:
    """A whole false record: the same scores over receptive fields of one pixel, certified by the rules themselves."""
    from bagcert.grid import RegionGrid
    from bagcert.proofs.certificate_record import geometry_fields
    from bagcert.records import Record
    from bagcert.rules import get_rule
    from bagcert.scores import ScoreMap
    from bagcert.threat import PatchThreatModel

    grid = RegionGrid.from_axis(1, 1, 0, (8, 8))
    score_map = ScoreMap(torch.as_tensor(_scores(record))[None], -2047, 2047, grid)
    certificate = get_rule(record["rule"]).certify(score_map, PatchThreatModel.parse("2", (8, 8)))
    (said,) = Record.each(certificate)
    verdict = {
        "prediction": said.prediction,
        "class_name": record["verdict"]["class_name"],
        "certified": said.certified,
        "margin": said.margin,
        "worst_placement": said.worst_placement,
    }
    return {**record, "geometry": geometry_fields(grid), "verdict": verdict}


def test_only_the_model_shows_a_false_geometry_or_score(
    home: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    """What docs/records.md says of premises: consistent forgeries of them pass the proof and fail against the model."""
    model = ("--model", "digits", "--images", home / "photos", "--device", "cpu")
    less = _forged_for_less(next(r for r in records if r["rule"] == "double-masking"))
    forged = write(tmp_path / "less.jsonl", [less])
    assert run("verify", forged)[0] == 0
    code, _, err = run("verify", forged, *model)
    assert code == 4
    assert "its geometry is not the network's: rows differ from number 0 on" in err

    # A rival far behind may gain a unit without moving the margin.
    record = next(r for r in records if r["rule"] == "vote")
    scores = _scores(record)
    last = int(scores.sum((1, 2)).argmin())
    scores[last, 0, 0] += 1 if scores[last, 0, 0] < 2047 else -1
    record["scores"]["data"] = _pack(scores)
    forged = write(tmp_path / "score.jsonl", [record])
    assert run("verify", forged)[0] == 0
    code, _, err = run("verify", forged, *model)
    assert code == 4
    assert "the scores differ from the network's here in 1 of 640 places by up to 1" in err


def test_the_model_and_the_image_must_be_those_of_the_record(
    home: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    model = ("--model", "digits", "--device", "cpu")
    first = records[0]
    for change, words in (
        ({"model": {**first["model"], "weights_sha256": "0" * 64}}, "its weights_sha256 is 000"),
        ({"model": {**first["model"], "scale": 1.0}}, "its scale is 1.0"),
        ({"network": {**first["network"], "fit": "center-crop"}}, ""),
        ({"network": {**first["network"], "fit": "stretch"}}, "its fit is 'stretch'"),
        ({"network": {**first["network"], "pixels_sha256": "0" * 64}}, "pixels_sha256 of the network's input"),
        ({"image": {**first["image"], "exif_orientation": 3}}, "exif_orientation of its image is 3"),
        ({"verdict": {**first["verdict"], "class_name": "cat"}}, "not 'cat'"),
    ):
        code, _, err = run("verify", write(tmp_path / "r.jsonl", [{**first, **change}]), *model)
        assert (code, words in err) == ((4, True) if words else (0, True)), err
    (tmp_path / "other").mkdir()
    name = Path(first["source"]).name
    Image.fromarray(tiny.pixels(np.array([1]))[0]).save(tmp_path / "other" / name)
    path = write(tmp_path / "r.jsonl", [first])
    code, _, err = run("verify", path, *model, "--images", tmp_path / "other")
    assert code == 4
    assert "the pixels_sha256 of its image is" in err
    code, _, err = run("verify", path, *model, "--images", tmp_path)
    assert code == 5
    assert f"there is no file {tmp_path / name}" in err


def test_what_cannot_be_read_and_what_does_not_hold_have_their_codes(
    home: Path, records: list[dict[str, Any]], tmp_path: Path
) -> None:
    whole = (home / "r.jsonl").read_bytes()
    path = tmp_path / "r.jsonl"
    path.write_bytes(whole[:-20])
    code, out, err = run("verify", path, "--json")
    assert code == 5
    found = json.loads(out)
    assert (found["records"], found["verified"]) == (12, 11)
    assert (found["results"][-1]["fault"], found["results"][-1]["source"]) == ("record", None)
    (line,) = err.splitlines()
    assert line.startswith("Error: 1 of 12 records are not verified; line 12: it is not JSON, or is cut short")

    path.write_bytes(whole.replace(b'"certified":false', b'"certified":true', 1))
    code, _, err = run("verify", path)
    assert code == 5
    assert "its SHA-256 does not match its content; it was damaged or altered" in err

    _certify_with_margin(records[0])
    path.write_bytes(to_line(seal(records[0])) + b"{}\n")
    assert run("verify", path)[0] == 4, "a false proof outweighs a damaged line"

    path.write_bytes(b"")
    assert run("verify", path)[0] == 5
    assert run("verify", tmp_path / "missing.jsonl")[0] == 5
    assert run("verify", tmp_path)[0] == 5
    assert run("verify", home / "r.jsonl", "--images", home)[0] == 2
    assert run("certify", home / "photos", "--model", "digits", "--resume")[0] == 2
