"""`bagcert certify --record` and `bagcert verify` with a model that pools regions by attention."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bagcert.nets.saved_model import write_model
from bagcert.proofs.lines import from_line, lines, seal, to_line
from tests import tiny
from tests.command import check_error, run
from tests.unit.proofs.forged import packed, unpacked


def model_folder(folder: Path, seed: int) -> Path:
    """A model with random weights that favors one color."""
    torch.manual_seed(seed)
    config = tiny.attention_config(name="pooled", padded=True, image_size=[12, 12])
    scorer = config.build()
    with torch.no_grad():
        scorer.readout.skip.bias[1] = 1.5
    folder.mkdir()
    write_model(folder, scorer, config)
    return folder


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, three photos and their records by one of the models."""
    folder = tmp_path_factory.mktemp("pooled")
    model_folder(folder / "model", 0)
    model_folder(folder / "other", 1)
    (folder / "photos").mkdir()
    for number, pixels in enumerate(tiny.pixels(np.arange(3), (16, 14))):
        Image.fromarray(pixels).save(folder / "photos" / f"{number}.png")
    mask = np.zeros((16, 14), dtype=np.uint8)
    mask[:8] = 255
    Image.fromarray(mask).save(folder / "mask.png")
    assert run(*certify(folder), "--record", folder / "r.jsonl")[::2] == (0, "")
    return folder


def certify(home: Path, model: str = "model") -> tuple[object, ...]:
    rules = ("--rule", "double-masking", "--rule", "detection", "--patch", "2", "--patch", "1x3")
    return ("certify", home / "photos", "--model", home / model, "--device", "cpu", *rules)


def contents(path: Path) -> list[dict[str, Any]]:
    return [from_line(line) for line in lines(path)]


def write(path: Path, readout: dict[str, Any] | None, records: list[dict[str, Any]]) -> Path:
    first = [] if readout is None else [to_line(readout)]
    path.write_bytes(b"".join([*first, *(to_line(seal(record)) for record in records)]))
    return path


def test_readout_is_the_first_line(home: Path) -> None:
    readout, *records = contents(home / "r.jsonl")
    assert (readout["readout_version"], readout["values"], readout["heads"], readout["hidden"]) == (1, 8, 2, 6)
    assert len(records) == 12
    for record in records:
        assert (record["record_version"], record["model"]["head"]) == (3, "attention-pooling")
        assert record["evidence"]["readout_sha256"] == readout["sha256"]
        assert "scores" not in record


def test_verified_with_and_without_the_model(home: Path) -> None:
    certified = sum(record["verdict"]["certified"] for record in contents(home / "r.jsonl")[1:])
    assert certified > 0
    code, out, err = run("verify", home / "r.jsonl")
    assert (code, err) == (0, "")
    assert out.startswith(f"12 of 12 records hold, given the recorded scores and geometry: {certified} certified")
    code, out, err = run("verify", home / "r.jsonl", "--model", home / "model", "--device", "cpu", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert (found["records"], found["verified"], found["distinct_images"]) == (12, 12, 3)
    assert [result["line"] for result in found["results"]] == list(range(2, 14))
    assert found["results"][0]["reason"] == "pixels, geometry and scores are those of the model"


def test_records_under_a_mask(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "masked.jsonl"
    assert run(*certify(home), "--placements", home / "mask.png", "--record", path)[::2] == (0, "")
    assert {record["record_version"] for record in contents(path)[1:]} == {3}
    assert run("verify", path, "--model", home / "model", "--device", "cpu")[0] == 0


def test_masks_per_axis_recorded_and_verified(home: Path, tmp_path: Path) -> None:
    path, limit = tmp_path / "merged.jsonl", ("--masks-per-axis", "2")
    assert run(*certify(home), *limit, "--record", path)[::2] == (0, "")
    readout, *records = contents(path)
    assert {record["geometry"]["masks_per_axis"] for record in records} == {2}
    whole = [record["verdict"] for record in contents(home / "r.jsonl")[1:]]
    assert [record["verdict"]["margin"] for record in records] != [verdict["margin"] for verdict in whole]
    assert run("verify", path, "--model", home / "model", "--device", "cpu")[0] == 0
    for most in (1, 3, None):
        changed = [{**record, "geometry": {**record["geometry"], "masks_per_axis": most}} for record in records]
        assert run("verify", write(tmp_path / "changed.jsonl", readout, changed))[0] == 4
    code, _, err = run(*certify(home), "--record", path, "--resume")
    assert (code, err.count("has the number of masks per axis 2; this run has None")) == (2, 1)


def test_resume_of_a_run_cut_anywhere(home: Path, tmp_path: Path) -> None:
    whole = (home / "r.jsonl").read_bytes()
    first = whole.index(b"\n") + 1
    path = tmp_path / "r.jsonl"
    for cut in (0, 5, first - 1, first, first + 30, len(whole) // 2, len(whole) - 1, len(whole)):
        path.write_bytes(whole[:cut])
        assert run(*certify(home), "--record", path, "--resume")[0] == 0
        assert path.read_bytes() == whole


def test_resume_with_another_model_refused(home: Path, tmp_path: Path) -> None:
    readout, *records = contents(home / "r.jsonl")
    path = tmp_path / "r.jsonl"
    for content, model, words in (
        ([readout, *records], "other", "line 1 of {} is the readout of another model"),
        (records, "model", "line 1 of {} is not a readout; the model pools regions by attention"),
        ([readout, readout, *records], "model", "line 2 of {} is the readout of another model"),
    ):
        path.write_bytes(b"".join(map(to_line, content)))
        before = path.read_bytes()
        check_error(run(*certify(home, model), "--record", path, "--resume"), 2, words.format(path))
        assert path.read_bytes() == before
    path.write_bytes(b"".join(map(to_line, [readout, *records])))
    other = ("certify", home / "photos", "--model", "digits", "--patch", "2", "--device", "cpu")
    check_error(run(*other, "--record", path, "--resume"), 2, "line 1 of")


def test_rules_that_need_sums_refused(home: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    found = run(*certify(home), "--rule", "vote", "--record", path)
    check_error(found, 2, "the rule vote needs class scores that are sums over regions")
    assert not path.exists()


def test_files_of_two_models(home: Path, tmp_path: Path) -> None:
    assert run(*certify(home, "other"), "--record", tmp_path / "other.jsonl")[0] == 0
    path = tmp_path / "both.jsonl"
    path.write_bytes((home / "r.jsonl").read_bytes() + (tmp_path / "other.jsonl").read_bytes())
    code, out, _ = run("verify", path)
    assert code == 0
    assert out.startswith("24 of 24 records hold")


def test_hostile_readouts_refused(home: Path, tmp_path: Path) -> None:
    readout, *records = contents(home / "r.jsonl")
    changed = {**readout, "bias": packed(unpacked(readout["bias"], "<i4") + 1, "<i4")}
    lost = [{**record, "evidence": {**record["evidence"], "readout_sha256": "0" * 64}} for record in records]
    for first, rest, words in (
        (None, records, "no readout is given before it"),
        (changed, records, "line 1: the hash of the readout is"),
        ({**readout, "sha256": "0" * 64}, records, "line 1: the hash of the readout is"),
        ({**readout, "heads": 3}, records, "line 1: 8 values are not a multiple of 3 attention heads"),
        ({**readout, "hidden": 7}, records, "line 1: packed data must be of 224 bytes"),
        ({**readout, "readout_version": 2}, records, "line 1: its readout_version is 2; this reads 1"),
        ({**readout, "note": ""}, records, "line 1: it has the unknown field 'note'"),
        ({**readout, "sha256": 5}, records, "line 1: its sha256 is not text"),
        (readout, lost, "the record uses the readout '000"),
    ):
        found = run("verify", write(tmp_path / "hostile.jsonl", first, rest))
        check_error(found, 5, words)
        assert found.out.startswith("0 of 1")
    path = write(tmp_path / "only.jsonl", readout, [])
    check_error(run("verify", path), 5, "only.jsonl holds no records")


def test_forged_verdict_refused(home: Path, tmp_path: Path) -> None:
    readout, *records = contents(home / "r.jsonl")
    for change in ({"margin": records[0]["verdict"]["margin"] + 1}, {"prediction": 2}, {"certified": "yes"}):
        forged = {**records[0], "verdict": {**records[0]["verdict"], **change}}
        found = run("verify", write(tmp_path / "forged.jsonl", readout, [forged, records[1]]))
        check_error(found, 4)
        assert found.out.startswith("1 of 2 records hold")


def test_forged_premises(home: Path, tmp_path: Path) -> None:
    """A record consistent in itself is a premise; against the model it fails."""
    readout, *records = contents(home / "r.jsonl")
    model = ("--model", home / "model", "--device", "cpu")
    path = tmp_path / "other.jsonl"
    assert run(*certify(home, "other"), "--record", path)[0] == 0
    assert run("verify", path)[0] == 0
    check_error(run("verify", path, *model), 4, "its weights_sha256 is")
    named = [{**record, "model": records[0]["model"]} for record in contents(path)[1:]]
    found = run("verify", write(path, contents(path)[0], named), *model)
    check_error(found, 4, "the readout_sha256 of its evidence is")
    # A value may move by 1 without moving a rounded mean.
    record = next(record for record in records if record["rule"] == "detection")
    weights = unpacked(record["evidence"]["weights"], "u1")
    products = unpacked(record["evidence"]["products"], "<i4")
    products[0] += weights[0] if products[0] < 0 else -int(weights[0])
    record["evidence"]["products"] = packed(products, "<i4")
    forged = write(path, readout, [record])
    assert run("verify", forged)[0] == 0
    words = "the products of the evidence differ from the network's here in 1 of"
    check_error(run("verify", forged, *model), 4, words)
