"""Records of attention pooling: the checker agrees with plain Python integers, and whatever was altered shows."""

import copy
import hashlib
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from bagcert.aggregation import PRODUCT_LIMIT, AttentionPooling
from bagcert.grid import RegionGrid
from bagcert.proofs.certificate_record import geometry_fields, readout_fields
from bagcert.proofs.maps import read_readout, rounded_quotient
from bagcert.proofs.verify import VerifyResult, verify_readout, verify_record
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle
from tests.properties.pooling import PoolingCase, evidence
from tests.properties.records import agrees
from tests.unit.proofs.forged import altered, packed, record_of, unpacked
from tests.unit.proofs.forged import check_refused as refused
from tests.unit.proofs.test_verify import in_seconds

MATRICES = ("first", "first_bias", "second", "skip", "bias")


def small(rule: str = "double-masking", seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """A certified record and its readout: 3 classes, 4 values, 2 heads, 6x6 regions, patches of 2 px."""
    random = np.random.default_rng(seed)
    readout = AttentionPooling(
        *(torch.as_tensor(random.integers(-90, 91, shape)) for shape in ((3, 4), (3,), (3, 3), (3, 4))),
        torch.tensor([100, 0, 0]),
        2,
    )
    weights, values = random.integers(1, 200, (2, 6, 6)), random.integers(-40, 41, (4, 6, 6))
    values += readout.skip[1].numpy()[:, None, None] // 2  # class 1 leads
    scores = torch.as_tensor(evidence(weights, values.clip(-511, 511)))[None]
    grid = RegionGrid.from_axis(1, 1, 0, (6, 6))
    score_map = ScoreMap(scores, -PRODUCT_LIMIT, PRODUCT_LIMIT, grid, readout=readout)
    record = record_of(score_map, RULES[rule].certify(score_map, PatchThreatModel.parse("2", (6, 6))))
    assert record["verdict"]["certified"]
    return record, dict(readout_fields(readout))


def hashed(readout: dict[str, Any]) -> dict[str, Any]:
    """A readout with the hash of its integers, computed by docs/records.md."""
    sizes = np.array([readout[name] for name in ("values", "heads", "hidden", "classes")], "<i4")
    parts = [sizes, *(unpacked(readout[name], "<i4") for name in MATRICES)]
    return {**readout, "sha256": hashlib.sha256(b"".join(part.tobytes() for part in parts)).hexdigest()}


def expected(record: dict[str, Any], readout: dict[str, Any], masks: list[np.ndarray]) -> tuple[int, int]:
    """Prediction and margin in Python integers, of what the record and the readout hold."""
    values, heads, rows, cols = record["evidence"]["shape"]
    products = unpacked(record["evidence"]["products"], "<i4").reshape(values, rows, cols)
    weights = unpacked(record["evidence"]["weights"], "u1").astype(int).reshape(heads, rows, cols)
    of_region = products // np.repeat(weights, values // heads, 0)
    hidden, classes = readout["hidden"], readout["classes"]
    shapes = ((hidden, values), (hidden,), (classes, hidden), (classes, values), (classes,))
    matrices = {
        name: unpacked(readout[name], "<i4").reshape(shape).tolist()
        for name, shape in zip(MATRICES, shapes, strict=True)
    }

    def score(mask: np.ndarray) -> Any:
        return oracle.readout_scores(of_region, weights, matrices, mask)

    if record["rule"] == "detection":
        label = oracle.any_masked_prediction(score, np.zeros((rows, cols), dtype=bool))
        return label, oracle.any_margin(score, masks, label)
    label = oracle.any_double_masking_prediction(score, masks, (rows, cols))
    pairs = [a | b for number, a in enumerate(masks) for b in masks[number:]]
    margin = oracle.any_margin(score, pairs, label)
    single = oracle.any_margin(score, [mask for mask in masks if not mask.all()], label)
    if single is not None and single < 0:  # then the margin is over single masks
        margin = min(single, -1)
    return label, margin


# Arithmetic


def test_quotients() -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(-3000, 3001, 4000), random.integers(1, 40, 4000)
    a[::2] = b[::2] * random.integers(-60, 61, 2000) + b[::2] // 2  # many halves
    found = rounded_quotient(a, b)
    assert found.tolist() == [round(Fraction(int(x), int(y))) for x, y in zip(a, b, strict=True)]


@pytest.mark.parametrize("seed", range(3))
def test_readout(seed: int) -> None:
    case = PoolingCase(np.random.default_rng(seed))
    readout = read_readout(dict(readout_fields(case.score_map.readout)))
    kept = np.random.default_rng(seed).integers(0, 2, (20, *case.weights.shape[1:]))
    for keep in kept:
        if keep.any():
            sums = (np.repeat(case.weights, len(case.values) // case.heads, 0) * case.values * keep).sum((1, 2))
            weights = (case.weights * keep).sum((1, 2))
            assert readout.class_scores(sums[None], weights[None])[0].tolist() == case.score(keep == 0)


# Agreement


def test_agrees_with_rules_on_random_cases() -> None:
    random = np.random.default_rng(5)
    seen = {"certified": 0, "not": 0, "several": 0, "allowed": 0}
    for _ in range(60):
        case = PoolingCase(random)
        if len(case.masks) > 40:
            continue
        readout = dict(readout_fields(case.score_map.readout))
        for rule in ("double-masking", "detection"):
            record = record_of(case.score_map, RULES[rule].certify(case.score_map, case.threat))
            verdict = verify_record(record, readout)
            assert verdict.ok, (verdict, record)
            said = record["verdict"]
            assert (said["prediction"], said["margin"]) == expected(record, readout, case.masks)
            seen["certified" if said["certified"] else "not"] += 1
            seen["several"] += case.threat.patches > 1
            seen["allowed"] += case.threat.allowed is not None
            for name, value in (
                ("certified", not said["certified"]),
                ("margin", said["margin"] + 1),
                ("margin", said["margin"] - 1),
                ("prediction", (said["prediction"] + 1) % len(case.matrices["bias"])),
            ):
                refused(verify_record(altered(record, "verdict", name, value=value), readout), "proof", f"{name} is")
    assert min(seen.values()) > 10


@pytest.mark.parametrize("rule", ["double-masking", "detection"])
def test_altered_integers_refused(rule: str) -> None:
    record, readout = small(rule)
    masks = oracle.mask_set(np.eye(6, dtype=bool), np.eye(6, dtype=bool), ((2, 2),))
    said = record["verdict"]["prediction"], record["verdict"]["margin"]
    assert expected(record, readout, masks) == said
    outcomes = {"changed": 0, "same": 0}
    random = np.random.default_rng(1)

    def check(altered_record: dict[str, Any], altered_readout: dict[str, Any]) -> None:
        same = expected(altered_record, altered_readout, masks) == said
        verdict = verify_record(altered_record, altered_readout)
        if not same:
            refused(verdict, "proof")
        elif not verdict.ok:  # the worst placement may be another one now
            assert "the worst placement leaves" in verdict.reason
        outcomes["same" if same else "changed"] += 1

    weights = unpacked(record["evidence"]["weights"], "u1").reshape(2, 36)
    products = unpacked(record["evidence"]["products"], "<i4").reshape(2, 2, 36)
    values = products // weights[:, None].astype(int)
    for _ in range(14):
        changed = values.copy()
        head, each, region = random.integers(2), random.integers(2), random.integers(36)
        changed[head, each, region] = random.integers(-511, 512)
        text = packed(changed * weights[:, None].astype(int), "<i4")
        check(altered(record, "evidence", "products", value=text), readout)
        heavier = weights.copy()
        heavier[head, region] = random.integers(1, 256)
        other = altered(record, "evidence", "weights", value=packed(heavier, "u1"))
        other["evidence"]["products"] = packed(values * heavier[:, None].astype(int), "<i4")
        check(other, readout)
    for name in MATRICES:
        numbers = unpacked(readout[name], "<i4")
        for at in range(len(numbers)):
            moved = numbers.copy()
            moved[at] += int(random.choice([-70, -1, 1, 70]))
            forged = hashed({**readout, name: packed(moved, "<i4")})
            check(altered(record, "evidence", "readout_sha256", value=forged["sha256"]), forged)
            refused(verify_record(record, forged), "record", "the record uses the readout", "the one before it is")
            refused(verify_readout({**readout, name: packed(moved, "<i4")}), "record", "the hash of the readout is")
    assert min(outcomes.values()) > 3


@pytest.mark.parametrize("rule", ["double-masking", "detection"])
def test_worst_placements_must_leave_the_margin(rule: str) -> None:
    record, readout = small(rule)
    pair = record["verdict"]["worst_placement"]
    refusals = 0
    for top in range(5):
        for left in range(5):
            place = [top, left, 2, 2]
            other = altered(record, "verdict", "worst_placement", value=place if rule == "detection" else [place] * 2)
            verdict = verify_record(other, readout)
            assert verdict.ok is agrees(other, readout)
            if not verdict.ok:
                refused(verdict, "proof", "the worst placement leaves")
                refusals += 1
    assert refusals > 10
    outside = [[5, 0, 2, 2], *pair[1:]] if rule == "double-masking" else [5, 0, 2, 2]
    forged = altered(record, "verdict", "worst_placement", value=outside)
    refused(verify_record(forged, readout), "proof", "not allowed")


# Form


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("record_version",), 1, "malformed"),
        (("record_version",), 4, "this checks 1, 2 and 3"),
        (("rule",), "vote", "the rule vote needs class scores that are sums"),
        (("rule",), "robust-masking", "the rule robust-masking needs class scores that are sums"),
        (("rule",), "votes", "malformed"),
        (("rule",), ["vote"], "malformed"),
        (("locality",), "measured", "attention pooling requires exact locality"),
        (("evidence",), None, "malformed"),
        (("evidence", "shape"), [4, 2, 6], "evidence of shape"),
        (("evidence", "shape"), [4, 2, 6, 7], "packed data must be of 84 bytes"),
        (("evidence", "shape"), [2, 4, 6, 6], "the readout has [4, 2] values and heads, the evidence has [2, 4]"),
        (("evidence", "shape"), [4, 2, 6, 10**9], "an integer from 1 to 8192"),
        (("evidence", "shape"), [8192, 8192, 8192, 8192], "evidence of shape"),
        (("evidence", "shape"), [4, 2, 6.0, 6], "must be an integer"),
        (("evidence", "readout_sha256"), "0" * 64, "the one before it is"),
        (("evidence", "readout_sha256"), None, "must state the hash of its readout"),
        (("evidence", "products"), "", "packed data must be of 576 bytes"),
        (("evidence", "products"), None, "malformed"),
        (("evidence", "products"), packed(np.zeros(143), "<i4"), "packed data must be of 576 bytes"),
        (("evidence", "products"), packed(np.full(144, 10**9), "<i4"), "a product must be its weight times an"),
        (("evidence", "products"), packed(np.full(144, -(2**31)), "<i4"), "a product must be its weight times an"),
        (("evidence", "weights"), packed(np.zeros(72), "u1"), "must lie in [1, 255], found 0"),
        (("evidence", "weights"), packed(np.ones(72), "<i2"), "packed data must be of 72 bytes"),
        (("evidence", "weights"), packed(np.ones(72), "u1"), "values must lie in [-511, 511], found"),
        (("geometry", "rows"), [[[0, 1]]] * 5, "must have [6, 6] rows and columns"),
    ],
)
def test_record_of_another_form_refused(path: tuple[str, ...], value: Any, words: str) -> None:
    record, readout = small()
    refused(verify_record(altered(record, *path, value=value), readout), "record", words)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("readout_version", 2, "the readout version is 2, this checks 1"),
        ("readout_version", True, "the readout version is True"),
        ("classes", 1, "an integer from 2 to 8192"),
        ("classes", 4, "packed data must be of 48 bytes"),
        ("values", 0, "an integer from 1 to 8192"),
        ("heads", 5, "an integer from 1 to 4"),
        ("heads", 3, "4 values are not a multiple of 3 attention heads"),
        ("heads", 1, "the hash of the readout is"),
        ("hidden", 10**30, "an integer from 1 to 8192"),
        ("hidden", None, "must be an integer"),
        ("sha256", "0" * 64, "the hash of the readout is"),
        ("sha256", None, "the hash of the readout is"),
        ("first", None, "malformed"),
        ("first", "????", "malformed"),
        ("bias", packed(np.zeros(4), "<i4"), "packed data must be of 12 bytes"),
        ("bias", packed(np.full(3, 2**23), "<i4"), "but must stay below 8,388,608"),
        ("bias", packed(np.full(3, -(2**31)), "<i4"), "but must stay below 8,388,608"),
        ("first", packed(np.full(12, 2**31 - 1), "<i4"), "but must stay below 8,388,608"),
        ("second", packed(np.full(9, -(2**31)), "<i4"), "but must stay below 8,388,608"),
    ],
)
def test_readout_of_another_form_refused(name: str, value: Any, words: str) -> None:
    record, readout = small()
    changed = {**readout, name: value}
    refused(verify_readout(changed), "record", words)
    refused(verify_record(record, changed), "record", words)


def test_record_without_its_readout_refused() -> None:
    record, readout = small()
    refused(verify_record(record), "record", "no readout is given before it")
    _, other = small(seed=1)
    refused(verify_record(record, other), "record", "the one before it is")
    assert verify_record(record, readout).ok
    assert verify_readout(readout).ok


def test_fields_missing_or_anything() -> None:
    record, readout = small()
    values = (None, [], {}, "x", -1, 1e300, [[]], [None] * 4, "\ud800", 10**400)
    for name in readout:
        for value in values:
            assert not verify_readout({**readout, name: value}).ok
        refused(verify_readout({key: readout[key] for key in readout if key != name}), "record", "malformed")
    for name in record["evidence"]:
        for value in values:
            assert not verify_record(altered(record, "evidence", name, value=value), readout).ok
        missing = copy.deepcopy(record)
        del missing["evidence"][name]
        refused(verify_record(missing, readout), "record", "malformed")


# Limits


def test_limit_of_masks() -> None:
    record, readout = small()
    side = 64
    record["image"]["size_px"] = [side, side]
    record["geometry"] = geometry_fields(RegionGrid.from_axis(1, 1, 0, (side, side)))
    record["evidence"] |= {
        "shape": [4, 2, side, side],
        "products": packed(np.zeros(4 * side * side), "<i4"),
        "weights": packed(np.ones(2 * side * side), "u1"),
    }

    def verdict() -> VerifyResult:
        return in_seconds(verify_record, record, readout, most=1.5)

    refused(verdict(), "limit", "3,969 masks are too many to check in pairs")
    record["threat"] |= {"notation": "3*2", "patches": 3}
    record["verdict"]["worst_placement"] *= 3
    refused(verdict(), "limit", "masks are too many to check in pairs")


def test_bomb_not_inflated() -> None:
    record, readout = small()
    bomb = packed(np.zeros(2**24), "u1")
    for name in ("products", "weights"):
        refused(verify_record(altered(record, "evidence", name, value=bomb), readout), "record", "must be of")
    refused(verify_readout({**readout, "first": bomb}), "record", "must be of")
    large = {**readout, "values": 8192, "hidden": 8192, "first": bomb}
    refused(in_seconds(verify_readout, large, most=1), "limit", "the readout is too large to check")
