"""`bagcert certify --record` and `bagcert verify`: from image files to a rechecked proof, and what forgers meet."""

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bagcert.data import load_dataset
from bagcert.grid import RegionGrid
from bagcert.proofs.lines import seal, to_line
from bagcert.rules import get_rule
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import tiny
from tests.command import check_error, run
from tests.unit.proofs.forged import packed, record_of, scores_in

RULES = ("vote", "levine-feizi", "double-masking", "detection")
EVERY_RULE = [option for rule in RULES for option in ("--rule", rule)]
MODEL = ("--model", "digits", "--device", "cpu")

RULES = ("vote", "levine-feizi", "double-masking", "detection")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three digits in files, and their records by every rule."""
    folder = tmp_path_factory.mktemp("records")
    (folder / "photos").mkdir()
    digits = load_dataset("digits", "test", 5)
    for number in (0, 2, 4):
        Image.fromarray(digits.read([number])[0].pixels).save(folder / "photos" / f"{number}.png")
    certify = ("certify", folder / "photos", *MODEL, *EVERY_RULE, "--json")
    code, out, err = run(*certify, "--record", folder / "r.jsonl")
    assert (code, err) == (0, "")
    assert len(json.loads(out)["results"]) == 3
    return folder


@pytest.fixture
def records(home: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (home / "r.jsonl").read_text().splitlines()]


def write(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_bytes(b"".join(to_line(seal(record)) for record in records))
    return path


def test_restricted_placements(home: Path, tmp_path: Path) -> None:
    mask = np.zeros((8, 8), dtype=np.uint8)
    mask[:3, :3] = 255
    Image.fromarray(mask).save(tmp_path / "corner.png")
    options = (*MODEL, "--patch", 5, "--placements", tmp_path / "corner.png")
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
    check_error(run("verify", old), 5, words)
    resumed = run("certify", home / "photos", *options, "--record", old, "--resume")
    check_error(resumed, 2, words.replace("version 1 ", "record version 1, which "))
    record["verdict"]["margin"] += 1
    forged = write(tmp_path / "forged.jsonl", [record])
    check_error(run("verify", forged), 4, "double-masking, 5 within the allowed placements): the margin is")


def test_repeated_records_counted(home: Path, records: list[dict[str, Any]], tmp_path: Path) -> None:
    _, out, _ = run("verify", home / "r.jsonl")
    assert out.endswith(" not; 3 distinct images, 0 repeated records\n")
    same = {**records[1], "source": "elsewhere.png"}  # the same pixels, rule and patch under another name
    path = write(tmp_path / "again.jsonl", [*records[:2], records[0], same])
    _, out, _ = run("verify", path)
    assert out.endswith(" not; 1 distinct image, 2 repeated records\n")
    found = json.loads(run("verify", path, "--json")[1])
    assert (found["records"], found["distinct_images"], found["repeated"]) == (4, 1, 2)
    assert [result["repeats_line"] for result in found["results"]] == [None, None, 1, 2]


def test_verified_with_and_without_the_model(home: Path, records: list[dict[str, Any]]) -> None:
    certified = sum(record["verdict"]["certified"] for record in records)
    assert 0 < certified < len(records) == 12
    code, out, err = run("verify", home / "r.jsonl")
    assert (code, err) == (0, "")
    basis = "given the recorded scores and geometry"
    counted = f"{certified} certified, {12 - certified} not; 3 distinct images, 0 repeated records"
    assert out == f"12 of 12 records hold, {basis}: {counted}\n"
    code, out, err = run("verify", home / "r.jsonl", *MODEL, "--images", home / "photos", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert next(iter(found)) == "schema_version"
    assert (found["records"], found["verified"], found["certified"]) == (12, 12, certified)
    first = records[0]
    assert found["results"][0] == {
        "line": 1,
        "source": first["source"],
        "rule": "vote",
        "threat": "2",
        **{name: first["verdict"][name] for name in ("prediction", "certified", "margin")},
        "locality": "exact",
        "verified": True,
        "fault": None,
        "reason": "pixels, geometry and scores are those of the model",
        "repeats_line": None,
    }


def test_resume_leaves_the_same_bytes(home: Path, tmp_path: Path) -> None:
    whole = (home / "r.jsonl").read_bytes()
    path = tmp_path / "r.jsonl"
    certify = ("certify", home / "photos", *MODEL, *EVERY_RULE, "--record", path, "--json")
    path.write_bytes(whole[: len(whole) // 2])
    check_error(run(*certify), 2, "already exists; use --resume")
    code, out, err = run(*certify, "--resume")
    assert code == 0
    assert "already held 1 of 3 images" in err
    assert len(json.loads(out)["results"]) == 2
    assert path.read_bytes() == whole
    code, out, _ = run(*certify, "--resume")
    assert (code, json.loads(out)["results"]) == (0, [])
    assert path.read_bytes() == whole


@pytest.mark.parametrize("case", ["replaced", "another of that name"])
def test_resume_with_another_image(case: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "r.jsonl"
    certify = ("certify", "x.png", *MODEL, "--record", record)
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


def test_resume_after_a_kill(home: Path, tmp_path: Path) -> None:
    """A real kill -9 in mid-run; tests/unit/proofs/test_record.py cuts the file everywhere else."""
    source = (home / "photos" / "0.png").read_bytes()
    for number in range(30):
        (tmp_path / f"{number:02}.png").write_bytes(source)
    certify = ("certify", tmp_path, *MODEL, "--json")
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


def _certify(record: dict[str, Any]) -> None:
    record["verdict"]["certified"] = True


def _certify_with_margin(record: dict[str, Any]) -> None:
    record["verdict"] |= {"certified": True, "margin": 5}


def _other_class(record: dict[str, Any]) -> None:
    record["verdict"]["prediction"] = (record["verdict"]["prediction"] + 1) % 10


def _better_margin(record: dict[str, Any]) -> None:
    record["verdict"]["margin"] += 1


def _one_score(record: dict[str, Any]) -> None:
    scores = scores_in(record)
    scores[record["verdict"]["prediction"]] += 1
    record["scores"]["data"] = packed(scores.clip(-2047, 2047))


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
def test_forged_record_refused(
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
    grid = RegionGrid.from_axis(1, 1, 0, (8, 8))
    score_map = ScoreMap(torch.as_tensor(scores_in(record))[None], -2047, 2047, grid)
    certificate = get_rule(record["rule"]).certify(score_map, PatchThreatModel.parse("2", (8, 8)))
    said = record_of(score_map, certificate)
    verdict = {**said["verdict"], "class_name": record["verdict"]["class_name"]}
    return {**record, "geometry": said["geometry"], "verdict": verdict}


def test_forged_premises(home: Path, records: list[dict[str, Any]], tmp_path: Path) -> None:
    """What docs/records.md says of premises: consistent forgeries of them pass the proof and fail against the model."""
    model = (*MODEL, "--images", home / "photos")
    less = _forged_for_less(next(r for r in records if r["rule"] == "double-masking"))
    forged = write(tmp_path / "less.jsonl", [less])
    assert run("verify", forged)[0] == 0
    words = "its geometry is not the network's: rows differ from number 0 on"
    check_error(run("verify", forged, *model), 4, words)

    # A rival far behind may gain a unit without moving the margin.
    record = next(r for r in records if r["rule"] == "vote")
    scores = scores_in(record)
    last = int(scores.sum((1, 2)).argmin())
    scores[last, 0, 0] += 1 if scores[last, 0, 0] < 2047 else -1
    record["scores"]["data"] = packed(scores)
    forged = write(tmp_path / "score.jsonl", [record])
    assert run("verify", forged)[0] == 0
    words = "the scores differ from the network's here in 1 of 640 places by up to 1"
    check_error(run("verify", forged, *model), 4, words)


def test_other_model_or_image(home: Path, records: list[dict[str, Any]], tmp_path: Path) -> None:
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
        found = run("verify", write(tmp_path / "r.jsonl", [{**first, **change}]), *MODEL)
        check_error(found, 4 if words else 0, words)
    (tmp_path / "other").mkdir()
    name = Path(first["source"]).name
    Image.fromarray(tiny.pixels(np.array([1]))[0]).save(tmp_path / "other" / name)
    verify = ("verify", write(tmp_path / "r.jsonl", [first]), *MODEL, "--images")
    check_error(run(*verify, tmp_path / "other"), 4, "the pixels_sha256 of its image is")
    check_error(run(*verify, tmp_path), 5, f"there is no file {tmp_path / name}")


def test_exit_codes(home: Path, records: list[dict[str, Any]], tmp_path: Path) -> None:
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
    words = "its SHA-256 does not match its content; it was damaged or altered"
    check_error(run("verify", path), 5, words)

    _certify_with_margin(records[0])
    path.write_bytes(to_line(seal(records[0])) + b"{}\n")
    assert run("verify", path)[0] == 4, "a false proof outweighs a damaged line"

    path.write_bytes(b"")
    assert run("verify", path)[0] == 5
    assert run("verify", tmp_path / "missing.jsonl")[0] == 5
    assert run("verify", tmp_path)[0] == 5
    assert run("verify", home / "r.jsonl", "--images", home)[0] == 2
    assert run("certify", home / "photos", "--model", "digits", "--resume")[0] == 2
