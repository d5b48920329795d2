"""The checker of certificate records: agrees with the rules on what is right, refuses whatever is not."""

import ast
import base64
import sys
import time
import zlib
from collections.abc import Callable
from itertools import combinations, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bagcert.grid import RegionGrid
from bagcert.proofs.certificate_record import geometry_fields
from bagcert.proofs.lines import seal
from bagcert.proofs.verify import VerifyResult, verify_record
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests.properties.cases import build, from_generator
from tests.unit.proofs.forged import altered, check_refused, packed, record_of, scores_in, with_scores

CHECKER = ("bagcert.proofs.claim", "bagcert.proofs.maps", "bagcert.proofs.verify")
PIXELS = RegionGrid.from_axis(1, 1, 0, (8, 8))


def certified_record(rule: str, patch: str = "2", allowed: np.ndarray | None = None, lead: int = 60) -> dict[str, Any]:
    """Of an 8x8 map over 8x8 px, receptive field 3, on which class 1 leads class 0 by `lead` nearly everywhere."""
    grid = RegionGrid.from_axis(3, 1, -1, (8, 8))
    random = np.random.default_rng(0)
    scores = random.integers(0, 5, (1, 3, 8, 8))
    scores[0, 1] += lead
    score_map = ScoreMap(torch.as_tensor(scores.clip(0, 64).astype(np.int16)), 0, 64, grid)
    threat = PatchThreatModel.parse(patch, (8, 8), allowed)
    return record_of(score_map, RULES[rule].certify(score_map, threat))


def refused(record: dict[str, Any], fault: str, *words: str) -> None:
    check_refused(verify_record(record), fault, *words)


# The module


@pytest.mark.parametrize("module", CHECKER)
def test_checker_imports_nothing_of_the_package(module: str) -> None:
    text = Path(str(sys.modules[module].__file__)).read_text()
    assert len(text.splitlines()) <= 400
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module))
    assert {name.split(".")[0] for name in imported - {"numpy", *CHECKER}} <= set(sys.stdlib_module_names)


# Agreement with the rules


@pytest.mark.parametrize("slack", [False, True], ids=["exact", "measured"])
@pytest.mark.parametrize("seed", range(2))
def test_agrees_with_rules_on_random_cases(seed: int, slack: bool) -> None:
    generator = np.random.default_rng(100 * seed + slack)
    choose = from_generator(generator)
    seen = {"certified": 0, "not": 0, "several": 0, "allowed": 0}
    for number in range(40):
        case = build(choose)
        score_map = case.score_map
        if slack:
            rare = generator.integers(0, 12, score_map.scores.shape) == 0
            moves = torch.as_tensor(rare * (3 if seed else 1))
            score_map = ScoreMap(score_map.scores, score_map.low, score_map.high, score_map.grid, moves)
        for rule in RULES.values():
            certificate = rule.certify(score_map, case.threat)
            for image in range(len(score_map)):
                record = record_of(score_map, certificate, image)
                assert record["locality"] == ("measured" if slack else "exact")
                verdict = verify_record(record)
                assert verdict.ok, (verdict, record)
                said = record["verdict"]
                seen["certified" if said["certified"] else "not"] += 1
                seen["several"] += case.threat.patches > 1
                seen["allowed"] += case.threat.allowed is not None
                if (number + image) % 2:
                    continue
                refused(altered(record, "verdict", "certified", value=not said["certified"]), "proof", "certified is")
                for step in (-1, 1):
                    refused(altered(record, "verdict", "margin", value=said["margin"] + step), "proof", "margin is")
                other = (said["prediction"] + 1) % score_map.classes
                refused(altered(record, "verdict", "prediction", value=other), "proof", "prediction is")
    assert min(seen.values()) > 20


@pytest.mark.parametrize("rule", RULES)
def test_cifar_sized_maps(rule: str) -> None:
    grid = RegionGrid.from_axis(10, 2, -4, (32, 32))
    random = np.random.default_rng(3)
    scores = random.integers(-2047, 2048, (4, 10, *grid.map_size)).astype(np.int16)
    scores[1::2, 4] = 2047
    score_map = ScoreMap(torch.as_tensor(scores), -2047, 2047, grid)
    certificate = RULES[rule].certify(score_map, PatchThreatModel.parse("5", (32, 32)))
    verdicts = [verify_record(record_of(score_map, certificate, image)) for image in range(4)]
    assert all(verdict.ok for verdict in verdicts), verdicts
    if rule in ("double-masking", "detection"):
        assert certificate.certified.tolist() == [False, True, False, True]


@pytest.mark.parametrize("patch", ["5", "2x8", "2%", "10.5%", "5+2x8", "3x2+2x3+1", "area:7", "2*2", "2*1x3+3x1"])
@pytest.mark.parametrize("restricted", [False, True])
def test_patch_notation(patch: str, restricted: bool) -> None:
    allowed = np.arange(64).reshape(8, 8) < 63 if restricted else None
    for rule in ("vote", "levine-feizi", "double-masking", "detection"):
        if rule not in ("vote", "levine-feizi") and patch.startswith("2*"):
            continue  # too many pairs of unions, which is tested below
        verdict = verify_record(certified_record(rule, patch, allowed))
        assert verdict.ok, verdict


def test_limit_of_masks() -> None:
    record = certified_record("vote", "2*2")
    refused(altered(record, "rule", value="nothing"), "record", "nothing")
    record = altered(record, "rule", value="double-masking")
    record["verdict"]["worst_placement"] *= 2
    large = RegionGrid.from_axis(3, 1, -1, (40, 40))
    record["image"]["size_px"] = [40, 40]
    record["geometry"] = geometry_fields(large)
    record["scores"]["shape"] = [3, 40, 40]
    refused(with_scores(record, np.zeros((3, 40, 40))), "limit", "masks are too many")


def in_seconds(check: Callable[..., VerifyResult], *content: dict[str, Any], most: float) -> VerifyResult:
    started = time.process_time()
    verdict = check(*content)
    assert time.process_time() - started < most, verdict
    return verdict


def large(record: dict[str, Any], side: int, regions: int, classes: int = 2) -> dict[str, Any]:
    """The record of an image of `side` px in which every row and column of pixels is seen by other regions."""
    codes = list(islice(combinations(range(regions), regions // 2), side))
    runs = []
    for region in range(regions):
        seen = np.array([region in code for code in codes] + [False]).astype(int)
        edges = np.flatnonzero(np.diff(seen, prepend=0))
        runs.append(edges.reshape(-1, 2).tolist())
    scores = np.zeros((classes, regions, regions))
    return {
        **record,
        "locality": "exact",
        "image": {**record["image"], "size_px": [side, side]},
        "geometry": {"rows": runs, "cols": runs},
        "threat": {**record["threat"], "notation": "1", "shapes": [[1, 1]]},
        "scores": {"shape": list(scores.shape), "low": 0, "high": 1, "data": packed(scores), "slack": None},
        "verdict": {**record["verdict"], "worst_placement": [0, 0, 1, 1]},
    }


@pytest.mark.parametrize("shapes", [300, 8000, 30_000])
def test_limit_of_shapes(shapes: int) -> None:
    terms = "+".join(f"{i}x{shapes + 1 - i}" for i in range(1, shapes + 1))
    record = altered(certified_record("detection"), "threat", "notation", value=terms)
    verdict = in_seconds(verify_record, record, most=0.5)
    assert (verdict.fault, verdict.reason) == ("limit", f"{shapes:,} shapes are too many to check")


@pytest.mark.parametrize("rule", ["detection", "double-masking", "robust-masking", "vote", "levine-feizi"])
@pytest.mark.parametrize("side", [1024, 2048, 8192])
def test_limit_of_windows(side: int, rule: str) -> None:
    record = large(certified_record(rule), side, 16)
    if rule == "double-masking":
        record["verdict"]["worst_placement"] = [[0, 0, 1, 1]] * 2
    verdict = in_seconds(verify_record, record, most=2)
    if rule in ("vote", "levine-feizi") and side <= 2048:
        assert verdict.fault == "proof"  # of the two classes, every window was gone through
    else:
        assert (verdict.ok, verdict.fault) == (False, "limit")


def test_limit_of_classes_and_lines() -> None:
    record = large(certified_record("vote"), 2000, 16, classes=8192)
    verdict = in_seconds(verify_record, record, most=2)
    assert (verdict.fault, verdict.reason) == ("limit", "8,192 classes are too many to check")
    record = large(certified_record("vote"), 8192, 14)
    shapes = [[h, min(8192, 8192 // h)] for h in range(1, 8193)]
    shapes = [shape for shape, after in zip(shapes, [*shapes[1:], [0, 0]], strict=True) if shape[1] > after[1]]
    record["threat"] |= {"notation": "area:8192", "shapes": shapes}
    verdict = in_seconds(verify_record, record, most=3)
    assert (verdict.ok, verdict.fault) == (False, "limit")


def test_limit_of_placements() -> None:
    """A mask of 67 million pixels packs into a few kB."""
    record = {**large(certified_record("vote"), 8192, 4), "record_version": 2}
    stripes = (np.add.outer(np.arange(8192), np.arange(8192)) % 64) < 32
    allowed = packed(np.packbits(stripes), "u1")
    for side, words in ((40, "the mask leaves too many placements"), (8192, "the shapes are too many")):
        record["threat"] |= {"notation": str(side), "shapes": [[side, side]], "allowed": allowed}
        verdict = in_seconds(verify_record, record, most=8)
        assert (verdict.fault, verdict.reason) == ("limit", f"{words} to check")


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("rule", ["vote", "levine-feizi"])
def test_thousand_classes_at_224_px(rule: str, restricted: bool) -> None:
    grid = RegionGrid.from_axis(17, 8, -4, (224, 224))
    scores = np.random.default_rng(0).integers(0, 2, (1, 1000, *grid.map_size)).astype(np.int16)
    scores[:, 3] = 1
    score_map = ScoreMap(torch.as_tensor(scores), 0, 1, grid)
    allowed = np.hypot(*np.indices((224, 224)) - 112.0) < 90 if restricted else None
    threat = PatchThreatModel.parse("area:25", (224, 224), allowed)
    record = record_of(score_map, RULES[rule].certify(score_map, threat))
    assert in_seconds(verify_record, record, most=30).ok


# Forged records


@pytest.mark.parametrize("rule", RULES)
def test_smaller_lead_refused(rule: str) -> None:
    record = certified_record(rule)
    assert record["verdict"]["certified"], "the forger starts from a certificate"
    scores = scores_in(record)
    scores[1, 2:, :] -= 40
    refused(with_scores(record, scores.clip(0)), "proof")


@pytest.mark.parametrize("rule", RULES)
def test_larger_lead_refused(rule: str) -> None:
    record = certified_record(rule, lead=40)
    scores = scores_in(record)
    for columns in (slice(0, 5), slice(3, 8), slice(0, 8)):  # wider than two masks
        changed = scores.copy()
        changed[1, :, columns] += 1
        refused(with_scores(record, changed), "proof", "the margin is")


def test_larger_threat_refused() -> None:
    record = certified_record("vote")
    refused(altered(record, "threat", "shapes", value=[[3, 3]]), "proof", "means the shapes [[2, 2]]")
    refused(altered(record, "threat", "notation", value="3"), "proof", "means the shapes [[3, 3]]")
    refused(altered(record, "threat", "patches", value=2), "proof", "is not of 2 patches")
    for notation, shapes, patches in (("3", [[3, 3]], 1), ("2*2", [[2, 2]], 2)):
        larger = altered(record, "threat", value={**record["threat"], "notation": notation, "shapes": shapes})
        larger["threat"]["patches"] = patches
        place = larger["verdict"]["worst_placement"]
        larger["verdict"]["worst_placement"] = [place] * 2 if patches == 2 else [*place[:2], *shapes[-1]]
        refused(larger, "proof", "the margin is")


def test_dropped_placement_refused() -> None:
    everywhere = np.ones((8, 8), dtype=bool)
    for rule in ("vote", "detection", "double-masking"):
        record = certified_record(rule, "2", everywhere)
        places = np.reshape(record["verdict"]["worst_placement"], (-1, 4))
        top, left = places[0][:2]
        fewer = everywhere.copy()
        fewer[top, left] = False
        allowed = packed(np.packbits(fewer), "u1")
        refused(altered(record, "threat", "allowed", value=allowed), "proof", "worst placement")


def test_other_rule_refused() -> None:
    for rule in RULES:
        record = certified_record(rule)
        for other in RULES:
            if other != rule:
                assert not verify_record(altered(record, "rule", value=other)).ok


@pytest.mark.parametrize("rule", RULES)
def test_ties(rule: str) -> None:
    grid = RegionGrid.from_axis(1, 1, 0, (3, 3))
    scores = np.zeros((1, 3, 3, 3), dtype=np.int16)
    scores[0, 1:] = 1
    score_map = ScoreMap(torch.as_tensor(scores), 0, 1, grid)
    record = record_of(score_map, RULES[rule].certify(score_map, PatchThreatModel.parse("1", (3, 3))))
    assert record["verdict"]["prediction"] == 1
    assert verify_record(record).ok
    refused(altered(record, "verdict", "prediction", value=2), "proof", "the prediction is 1, not 2")


@pytest.mark.parametrize("rule", RULES)
def test_worst_placement_must_be_one(rule: str) -> None:
    record = certified_record(rule, lead=30)
    places = np.reshape(record["verdict"]["worst_placement"], (-1, 4)).tolist()

    def placed(*place: int) -> dict[str, Any]:
        value = [list(place), *places[1:]] if len(places) > 1 else list(place)
        return altered(record, "verdict", "worst_placement", value=value)

    for bad in ([7, 0, 2, 2], [-1, 0, 2, 2], [0, 0, 3, 3], [0, 7, 2, 2]):
        refused(placed(*bad), "proof", "is not allowed")
    found = {verify_record(placed(top, left, 2, 2)).ok for top in range(0, 7, 2) for left in range(0, 7, 2)}
    assert found | {verify_record(record).ok} == {True, False}


def test_slack_negative_or_hidden_refused() -> None:
    random = np.random.default_rng(1)
    grid = RegionGrid.from_axis(3, 1, -1, (6, 6))
    scores = torch.as_tensor(random.integers(0, 30, (1, 3, 6, 6)).astype(np.int16))
    scores[:, 1] += 30
    score_map = ScoreMap(scores, 0, 64, grid, torch.full(scores.shape, 2))
    record = record_of(score_map, RULES["vote"].certify(score_map, PatchThreatModel.parse("2", (6, 6))))
    assert verify_record(record).ok
    negative = packed(np.full((3, 6, 6), -2))
    refused(altered(record, "scores", "slack", value=negative), "record", "at least 0")
    refused(altered(record, "scores", "slack", value=None), "record", "measured")
    refused(altered(altered(record, "scores", "slack", value=None), "locality", value="exact"), "proof", "margin is")


def test_smaller_geometry() -> None:
    """Documented in docs/records.md: without the model, the geometry is a premise."""
    record = certified_record("vote", lead=30)
    smaller = altered(record, "geometry", value=geometry_fields(PIXELS))
    refused(smaller, "proof", "the margin is")  # a smaller reach leaves a larger margin, so all of it must be forged
    score_map = ScoreMap(torch.as_tensor(scores_in(record))[None], 0, 64, PIXELS)
    forged = record_of(score_map, RULES["vote"].certify(score_map, PatchThreatModel.parse("2", (8, 8))))
    assert verify_record(forged).ok


# Form


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("record_version",), 4, "version is 4, this checks 1, 2 and 3"),
        (("record_version",), "1", "version is 1, this checks 1, 2 and 3"),
        (("record_version",), 2, "version 2 must restrict placements"),
        (("threat", "allowed"), "AAAA", "version 1 left out smaller patches within a mask; certify the image again"),
        (("locality",), "hoped for", "locality"),
        (("image", "size_px"), [8, 8, 8], "malformed"),
        (("image", "size_px"), [8, 0], "from 1 to 8192, got 0"),
        (("image", "size_px"), [8, 10**9], "from 1 to 8192"),
        (("image", "size_px"), [8.0, 8], "must be an integer"),
        (("scores", "shape"), [3, 8], "scores of shape [3, 8]"),
        (("scores", "shape"), [1, 8, 8], "scores of shape [1, 8, 8]"),
        (("scores", "shape"), [8000, 8000, 8000], "scores of shape"),
        (("scores", "shape"), [3, 8, 9], "packed data must be of 432 bytes"),
        (("scores", "low"), 1, "scores leave [1, 64]"),
        (("scores", "high"), 63, "scores leave [0, 63]"),
        (("scores", "high"), 0, "scores leave [0, 0]"),
        (("scores", "high"), 10**30, "an integer from"),
        (("scores", "low"), True, "an integer from"),
        (("scores", "data"), "????", "malformed"),
        (("scores", "data"), "", "must be of 384 bytes"),
        (("scores", "data"), None, "malformed"),
        (("geometry", "rows"), [[[0, 2]]] * 7, "must have [8, 8] rows and columns"),
        (("geometry", "rows"), [[[0, 9]]] * 8, "from 0 to 8, got 9"),
        (("geometry", "rows"), [[[-1, 2]]] * 8, "from 0 to 8, got -1"),
        (("geometry", "cols"), [[[2, 2]]] * 8, "ascending runs"),
        (("geometry", "cols"), [[[3, 4], [0, 1]]] * 8, "ascending runs"),
        (("geometry", "cols"), [[[0, 1, 2]]] * 8, "malformed"),
        (("geometry", "cols"), [[[0.5, 1]]] * 8, "must be an integer"),
        (("geometry", "cols"), 8, "malformed"),
        (("threat", "patches"), 0, "from 1 to 64"),
        (("threat", "patches"), 10**6, "from 1 to 64"),
        (("threat", "notation"), "five", "malformed"),
        (("threat", "notation"), None, "malformed"),
        (("verdict",), {}, "malformed"),
        (("verdict", "worst_placement"), [0, 0, 2], "malformed"),
        (("verdict", "worst_placement"), None, "malformed"),
        (("verdict", "worst_placement"), [[0], 0, 2, 2], "malformed"),
        (("rule",), ["vote"], "malformed"),
        (("rule",), "votes", "malformed"),
    ],
)
def test_record_of_another_form_refused(path: tuple[str, ...], value: Any, words: str) -> None:
    refused(altered(certified_record("vote"), *path, value=value), "record", words)


@pytest.mark.parametrize(("name", "value"), [("certified", 1), ("margin", 2.0), ("margin", True), ("prediction", "1")])
def test_verdict_of_another_type_refused(name: str, value: Any) -> None:
    refused(altered(certified_record("vote"), "verdict", name, value=value), "proof", f"the {name} is")


def test_patch_too_large_refused() -> None:
    for notation, shape in (("9", [9, 9]), ("0", [0, 0]), ("0x3", [0, 3])):
        threat = {"notation": notation, "shapes": [shape], "patches": 1, "allowed": None}
        refused(altered(certified_record("vote"), "threat", value=threat), "record", "does not fit")


def test_packed_data_not_inflated() -> None:
    record = certified_record("vote", allowed=np.ones((8, 8), dtype=bool))
    bomb = packed(np.zeros(2**22), "u1")
    refused(altered(record, "threat", "allowed", value=bomb), "record", "must be of 8 bytes")
    more = base64.b64encode(zlib.compress(scores_in(record).tobytes()) + b"more").decode()
    record = certified_record("vote")
    for data in (bomb, packed(np.zeros(383), "u1"), more):
        refused(altered(record, "scores", "data", value=data), "record", "must be of 384 bytes")


def test_fields_missing_or_anything() -> None:
    record = certified_record("vote")
    paths = [(name,) for name in record]
    paths += [(name, inner) for name, value in record.items() if isinstance(value, dict) for inner in value]
    for path in paths:
        for value in (None, [], {}, "x", -1, 1e300, [[]], {"a": 1}, [None] * 4, "\ud800", 10**400):
            verdict = verify_record(altered(record, *path, value=value))
            assert isinstance(verdict, VerifyResult)
            assert verdict.ok is (value is None and path in (("threat", "allowed"), ("scores", "slack"))), (path, value)
        missing = altered(record, *path, value=None)
        place = missing if len(path) == 1 else missing[path[0]]
        del place[path[-1]]
        refused(missing, "record", "malformed")


def test_hash_no_part_of_the_proof() -> None:
    record = seal({**certified_record("vote"), "source": "a.png"})
    assert verify_record(record).ok
    refused(seal(altered(record, "verdict", "margin", value=0)), "proof", "margin is")
