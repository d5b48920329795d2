"""Mutates certificate records and compares what the checker accepts with a brute force over the mutated content.

python -m tests.properties.records --cases 20000 --json
"""

import base64
import copy
import hashlib
import json
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from math import prod
from typing import Any

import numpy as np
import torch

from bagcert.proofs.certificate_record import readout_fields
from bagcert.proofs.lines import from_line
from bagcert.proofs.verify import verify_readout, verify_record
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from tests import oracle
from tests.properties.cases import build, from_generator
from tests.properties.command import run
from tests.properties.pooling import PoolingCase
from tests.unit.proofs.forged import record_of

MOST_SECONDS = 2.0
MATRICES = ("first", "first_bias", "second", "skip", "bias")
NUMBERS = (0, 1, -1, 2, 7, 64, 255, 256, 2**15, 2**31, -(2**31), 2**63, 10**30, 10**400)
THINGS = (None, [], {}, "", "x", "2", True, False, 0.5, 2.0, -0.0, 1e300, [[]], {"a": 1}, [None] * 4)
TEXTS = (
    "\ud800",
    "\u0665",
    "2\u00d72",
    "\u202e",
    "a\nb",
    "\x00",
    "é" * 5000,
    "9" * 5000,
    "area:3",
    "1*2",
    "1+1",
    "50%",
)


# Brute force


def agrees(record: dict[str, Any], readout: dict[str, Any] | None) -> bool:
    """Whether prediction, margin, certificate and worst placement follow from what the record and readout hold."""
    try:
        return _agrees(record, readout)
    except Exception:  # what cannot be read does not follow
        return False


def _agrees(record: dict[str, Any], readout: dict[str, Any] | None) -> bool:
    verdict, pooled = record["verdict"], record["record_version"] == 3
    threat = _Threat(record)
    measure = _pooling(record, readout, threat) if pooled else _sums(record, threat)
    if measure is None:
        return False
    label, margin, attained = measure
    types = type(verdict["prediction"]), type(verdict["margin"]), type(verdict["certified"])
    said = verdict["prediction"], verdict["margin"], verdict["certified"]
    return types == (int, int, bool) and said == (label, margin, margin >= 0) and attained == margin


class _Threat:
    """Windows, masks and worst placements of a record, in plain loops."""

    def __init__(self, record: dict[str, Any]) -> None:
        threat, self.rule = record["threat"], record["rule"]
        height, width = record["image"]["size_px"]
        self.rows, self.cols = (
            _seen(runs, pixels)
            for runs, pixels in zip(
                (record["geometry"]["rows"], record["geometry"]["cols"]), (height, width), strict=True
            )
        )
        self.shape = len(self.rows), len(self.cols)
        self.patches, widest = _widest(threat["notation"], height, width)
        shapes = [(h, widest[h]) for h in range(1, height + 1) if widest[h] > widest[h + 1]]
        assert self.patches == threat["patches"]
        assert [list(shape) for shape in shapes] == threat["shapes"]
        allowed = None
        if threat["allowed"] is not None:
            assert record["record_version"] in (2, 3)
            bits = np.frombuffer(_inflated(threat["allowed"]), np.uint8)
            assert len(bits) == -(-height * width // 8)
            allowed = np.unpackbits(bits)[: height * width].reshape(height, width) > 0
        else:
            assert record["record_version"] in (1, 3)
        most = record["geometry"].get("masks_per_axis")
        assert most is None or (type(most) is int and most >= 1)
        if allowed is not None or most is not None:
            self.windows = oracle.mask_set(self.rows, self.cols, shapes, allowed, most)
        else:
            self.windows = []
            for h, w in shapes:
                self.windows += [np.outer(r, c) for r in _largest(self.rows, h) for c in _largest(self.cols, w)]
        self.masks = oracle.unions(self.windows, self.patches)
        places = record["verdict"]["worst_placement"]
        count = self.patches * (2 if self.rule == "double-masking" else 1)
        places = [places] if count == 1 else places
        assert len(places) == count
        self.worst = []
        for top, left, h, w in places:
            assert min(top, left) >= 0 < min(h, w)
            assert top + h <= height
            assert left + w <= width
            assert w <= widest[h]
            assert allowed is None or allowed[top : top + h, left : left + w].all()
            reach = np.outer(self.rows[:, top : top + h].any(1), self.cols[:, left : left + w].any(1))
            if most is not None:
                some = [(h, w)] if allowed is None else shapes
                masks = oracle.merged_masks(self.rows, self.cols, some, allowed, most)
                (reach,) = [mask for mask, members in masks if any((reach == member).all() for member in members)]
            self.worst.append((h, w, reach))
        self.hidden = np.logical_or.reduce([reach for *_, reach in self.worst])


def _seen(axis: list, pixels: int) -> np.ndarray:
    seen = np.zeros((len(axis), pixels), dtype=bool)
    for region, runs in enumerate(axis):
        last = -1
        for start, stop in runs:
            assert last < start < stop <= pixels
            assert type(start) is type(stop) is int
            seen[region, start:stop] = True
            last = stop
    return seen


def _largest(seen: np.ndarray, side: int) -> list[np.ndarray]:
    lines = list(dict.fromkeys(map(tuple, (seen[:, p : p + side].any(1) for p in range(seen.shape[1] - side + 1)))))
    return [np.array(a) for a in lines if not any(a != b and (np.array(a) <= np.array(b)).all() for b in lines)]


def _widest(notation: str, height: int, width: int) -> tuple[int, dict[int, int]]:
    assert notation.isascii()
    number, star, text = notation.rpartition("*")
    widest = dict.fromkeys(range(1, height + 2), 0)
    for term in text.split("+"):
        if term.startswith("area:"):
            most = int(term.removeprefix("area:"))
            found = {h: min(width, most // h) for h in range(1, height + 1)}
        else:
            h, _, w = term.partition("x")
            if term.endswith("%"):
                side = 1
                while side * side < Fraction(term[:-1]) * height * width / 100:
                    side += 1
                h = w = str(side)
            assert 1 <= int(h) <= height
            assert 1 <= int(w or h) <= width
            found = dict.fromkeys(range(1, int(h) + 1), int(w or h))
        for h, w in found.items():
            widest[h] = max(widest[h], w)
    return int(number) if star else 1, widest


def _inflated(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text, validate=True))


def _numbers(text: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(_inflated(text), dtype).astype(int).reshape(shape)


def _sums(record: dict[str, Any], threat: _Threat) -> tuple[int, int, int] | None:
    """(label, margin, margin that the worst placements leave) of a rule of sums."""
    said = record["scores"]
    low, high, shape = said["low"], said["high"], tuple(said["shape"])
    scores = _numbers(said["data"], "<i2", shape)
    assert shape[1:] == threat.shape
    assert low < high
    assert low <= scores.min() <= scores.max() <= high
    assert record["locality"] == ("exact" if said["slack"] is None else "measured")
    label, margin, attained = _rule(scores, low, high, threat)
    if said["slack"] is not None:
        slack = _numbers(said["slack"], "<i2", shape)
        assert slack.min() >= 0
        worst = scores + slack
        worst[label] = scores[label] - slack[label]
        other, *under = _rule(worst.clip(low, high), low, high, threat)
        margin, attained = under if other == label else (min(margin, -1), min(attained, -1))
    return label, margin, attained


def _rule(scores: np.ndarray, low: int, high: int, threat: _Threat) -> tuple[int, int, int]:
    rule, masks = threat.rule, threat.masks
    if rule in ("vote", "levine-feizi"):
        label, margin = getattr(oracle, rule.replace("-", "_"))(scores, threat.windows, low, high, threat.patches)
        if rule == "vote":
            reaches = list({(h, w, reach.tobytes()): reach for h, w, reach in threat.worst}.values())
            damages = [scores[label] - each + high - low for each in scores]
        else:
            reaches = [reach for *_, reach in threat.worst]
            damages = [np.full_like(each, 2 * (high - low)) for each in scores]
        left = [
            int((scores[label] - scores[c]).sum())
            - (c < label)
            - sum(int(damages[c][reach].sum()) for reach in reaches)
            for c in range(len(scores))
            if c != label
        ]
        return label, margin, min(left)
    label, margin = getattr(oracle, rule.replace("-", "_"))(scores, masks)
    if rule == "robust-masking":
        evidence = np.maximum(scores, 0)
        own = min(int(evidence[label][~(threat.hidden | mask)].sum()) for mask in masks)
        left = [own - int(evidence[c][~threat.hidden].sum()) - (c < label) for c in range(len(scores)) if c != label]
    else:
        kept = (scores[label] - scores)[:, ~threat.hidden].sum(1)
        left = [int(kept[c]) - (c < label) for c in range(len(scores)) if c != label]
    return label, margin, min(*left, -1) if _completed(rule, masks) else min(left)


def _completed(rule: str, masks: list[np.ndarray]) -> bool:
    """Whether a mask, or a pair of masks, leaves no region."""
    if rule == "detection":
        return any(mask.all() for mask in masks)
    return any((a | b).all() for a in masks for b in masks)


def _pooling(record: dict[str, Any], readout: dict[str, Any] | None, threat: _Threat) -> tuple[int, int, int] | None:
    """(label, margin, margin that the worst placements leave) of attention pooling."""
    assert readout is not None
    said = record["evidence"]
    values, heads, *shape = said["shape"]
    sizes = [readout[name] for name in ("values", "heads", "hidden", "classes")]
    assert [values, heads] == sizes[:2]
    assert tuple(shape) == threat.shape
    assert record["locality"] == "exact"
    hidden, classes = sizes[2:]
    shapes = ((hidden, values), (hidden,), (classes, hidden), (classes, values), (classes,))
    matrices = {name: _numbers(readout[name], "<i4", each) for name, each in zip(MATRICES, shapes, strict=True)}
    content = b"".join(np.array(part, "<i4").tobytes() for part in (sizes, *matrices.values()))
    assert hashlib.sha256(content).hexdigest() == readout["sha256"] == said["readout_sha256"]
    products = _numbers(said["products"], "<i4", (values, *shape))
    weights = _numbers(said["weights"], "u1", (heads, *shape))
    assert weights.min() >= 1
    repeated = np.repeat(weights, values // heads, 0)
    each = products // repeated
    assert (each * repeated == products).all()
    assert np.abs(each).max() <= 511
    plain = {name: matrix.tolist() for name, matrix in matrices.items()}
    score = partial(oracle.readout_scores, each, weights, plain)
    masks = threat.masks
    if threat.rule == "detection":
        label = oracle.any_masked_prediction(score, np.zeros(shape, dtype=bool))
        margin = oracle.any_margin(score, masks, label)
    else:
        assert threat.rule == "double-masking"
        label = oracle.any_double_masking_prediction(score, masks, shape)
        single = oracle.any_margin(score, [mask for mask in masks if not mask.all()], label)
        pairs = [a | b for number, a in enumerate(masks) for b in masks[number:]]
        margin = oracle.any_margin(score, pairs, label) if single is None or single >= 0 else single
    attained = oracle.any_margin(score, [threat.hidden], label)
    empty = _completed(threat.rule, masks)
    return label, min(margin, -1) if empty else margin, min(attained, -1) if empty else attained


# Honest records


@dataclass
class Honest:
    """A record that holds, and its readout."""

    record: dict[str, Any]
    readout: dict[str, Any] | None = None


def honest(random: np.random.Generator) -> Honest:
    """A record of a random rule on a random tiny map: a sum, with or without slack, or attention pooling."""
    if random.random() < 0.4:
        case = PoolingCase(random)
        while len(case.masks) > 12 or prod(case.weights.shape[1:]) > 20:
            case = PoolingCase(random)
        rule = ("double-masking", "detection")[random.integers(2)]
        found = record_of(case.score_map, RULES[rule].certify(case.score_map, case.threat))
        return Honest(_completed_record(found), copy.deepcopy(dict(readout_fields(case.score_map.readout))))
    plain = build(from_generator(random), most_masks=12)
    while len(plain.masks) > 30:
        plain = build(from_generator(random), most_masks=12)
    score_map = plain.score_map
    if random.random() < 0.25:
        slack = torch.as_tensor((random.integers(0, 12, score_map.scores.shape) == 0) * 1)
        score_map = ScoreMap(score_map.scores, score_map.low, score_map.high, score_map.grid, slack)
    rule = list(RULES)[random.integers(len(RULES))]
    certificate = RULES[rule].certify(score_map, plain.threat)
    return Honest(_completed_record(record_of(score_map, certificate, int(random.integers(2)))))


def _completed_record(record: dict[str, Any]) -> dict[str, Any]:
    """With the fields that the checker of the proof does not read."""
    record = copy.deepcopy(record)
    record["image"] |= {"exif_orientation": 1, "pixels_sha256": "0" * 64}
    record["verdict"]["class_name"] = "a"
    environment = {"device": "cpu", "backend": "torch", "dtype": "float32", "threads": 1, "versions": {"torch": "2"}}
    return {
        **record,
        "source": "a.png",
        "network": {"size_px": [8, 8], "fit": "squash", "pixels_sha256": "0" * 64},
        "model": {"name": "a", "weights_sha256": "0" * 64, "head": "fixed-point", "scale": 1.0},
        "environment": environment,
    }


# Mutations of the content


def places(content: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) inside of a JSON value."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield content, key
        yield from places(value)


def _some(random: np.random.Generator, choices):
    return choices[int(random.integers(len(choices)))]


def change_integer(case: Honest, random: np.random.Generator) -> None:
    """One integer of the JSON becomes another."""
    found = [(inside, key) for inside, key in places(_either(case, random)) if type(inside[key]) is int]
    if found:
        inside, key = _some(random, found)
        near = inside[key] + int(random.integers(-3, 4))
        inside[key] = _some(random, (near, near, near, -inside[key], _some(random, NUMBERS)))


def change_packed(case: Honest, random: np.random.Generator) -> None:
    """One integer of packed data becomes another."""
    inside, key, dtype = _some(random, list(_packed(case)))
    try:
        numbers = np.frombuffer(_inflated(inside[key]), dtype).astype(np.int64)
    except (ValueError, TypeError, zlib.error):
        return
    if not len(numbers):
        return
    at = random.integers(len(numbers))
    moved = numbers[at] + _some(random, (1, -1, int(random.integers(-50, 51))))
    numbers[at] = _some(random, (moved, moved, moved, 0, 2**31 - 1, numbers[random.integers(len(numbers))]))
    inside[key] = _pack(numbers.astype(dtype).tobytes())


def change_region(case: Honest, random: np.random.Generator) -> None:
    """A region gets another attention weight or another value, with the product that belongs to it."""
    said = case.record.get("evidence")
    try:
        values, heads, rows, cols = said["shape"]
        products = _numbers(said["products"], "<i4", (values, rows, cols))
        weights = _numbers(said["weights"], "u1", (heads, rows, cols)).clip(1)
        each = products // np.repeat(weights, values // heads, 0)
    except (ValueError, TypeError, LookupError, ArithmeticError, zlib.error):
        return
    if not (each.size and weights.size):
        return
    at = random.integers(each.shape[1]), random.integers(each.shape[2])
    if random.random() < 0.5:
        weights[random.integers(len(weights)), *at] = random.integers(1, 256)
    else:
        each[random.integers(len(each)), *at] = _some(random, (random.integers(-511, 512), 511, -511, 512))
    said["weights"] = _pack(weights.astype("u1").tobytes())
    said["products"] = _pack((each * np.repeat(weights, values // heads, 0)).astype("<i4").tobytes())


def change_readout(case: Honest, random: np.random.Generator) -> None:
    """An integer of the readout becomes another, under the hash that belongs to it."""
    if case.readout is None:
        return
    try:
        name = _some(random, MATRICES)
        numbers = np.frombuffer(_inflated(case.readout[name]), "<i4").copy()
        if not len(numbers):
            return
        at = random.integers(len(numbers))
        moved = int(numbers[at]) + _some(random, (1, -1, 40, -40))
        numbers[at] = _some(random, (moved, moved, moved, 2**31 - 1, -(2**31)))
        case.readout[name] = _pack(numbers.tobytes())
        sizes = np.array([case.readout[size] for size in ("values", "heads", "hidden", "classes")], "<i4")
        content = b"".join([sizes.tobytes(), *(_inflated(case.readout[part]) for part in MATRICES)])
        case.readout["sha256"] = case.record["evidence"]["readout_sha256"] = hashlib.sha256(content).hexdigest()
    except (ValueError, TypeError, LookupError, OverflowError, zlib.error):
        return


def change_shape(case: Honest, random: np.random.Generator) -> None:
    """A list loses, repeats or gains an item, or two items change places."""
    found = [inside[key] for inside, key in places(case.record) if isinstance(inside[key], list) and inside[key]]
    if not found:
        return
    items, kind = _some(random, found), random.integers(4)
    at, other = random.integers(len(items)), random.integers(len(items))
    if kind == 0:
        del items[at]
    elif kind == 1:
        items.insert(at, copy.deepcopy(items[at]))
    elif kind == 2:
        items[at], items[other] = items[other], items[at]
    else:
        items.append(_some(random, NUMBERS))


def change_type(case: Honest, random: np.random.Generator) -> None:
    """Something becomes something of another kind."""
    found = list(places(_either(case, random)))
    if found:
        inside, key = _some(random, found)
        inside[key] = copy.deepcopy(_some(random, THINGS))


def change_size(case: Honest, random: np.random.Generator) -> None:
    """Sizes grow, with zeros in the place of the data."""
    large = int(_some(random, (3, 7, 40, 400, 8192, 8193, 10**9)))
    name = _some(random, ("image", "scores", "evidence", "threat", "readout"))
    part = case.readout if name == "readout" else case.record.get(name)
    if not isinstance(part, dict):
        return
    if name == "image":
        part["size_px"] = _some(random, ([large, large], [large, 5], [5, large]))
    elif name == "threat":
        part["notation"] = _some(
            random, (str(large), f"area:{large}", f"{large}*1", "+".join(["1"] * min(large, 9000)))
        )
    elif name == "readout":
        part[_some(random, ("values", "heads", "hidden", "classes"))] = large
    else:
        shape = part.get("shape")
        if isinstance(shape, list) and shape:
            shape[random.integers(len(shape))] = large
    bomb = _pack(bytes(int(_some(random, (0, 1, 2**10, 2**20, 2**23)))))
    for inside, key, _ in _packed(case):
        if random.random() < 0.3:
            inside[key] = bomb


def change_keys(case: Honest, random: np.random.Generator) -> None:
    """A field is missing, is unknown, or has another name."""
    found = [(inside, key) for inside, key in places(_either(case, random)) if isinstance(inside, dict)]
    if not found:
        return
    inside, key = _some(random, found)
    value = inside[key]
    if random.random() < 0.7:
        del inside[key]
    if random.random() < 0.5:
        inside[_some(random, ("note", key + " ", key.upper(), "\u0430"))] = value


def change_text(case: Honest, random: np.random.Generator) -> None:
    """Text becomes other text: of other alphabets, with control characters, long, or in the notation of patches."""
    found = [(inside, key) for inside, key in places(_either(case, random)) if isinstance(inside[key], str)]
    if found:
        inside, key = _some(random, found)
        inside[key] = _some(random, (*TEXTS, inside[key] + _some(random, TEXTS), inside[key][:-1]))


def change_verdict(case: Honest, random: np.random.Generator) -> None:
    """Another conclusion, rule or placement, each of the right form."""
    verdict, kind = case.record.get("verdict"), random.integers(4)
    if not isinstance(verdict, dict) or type(verdict.get("margin")) is not int:
        return
    if kind == 0:
        verdict["margin"] += int(_some(random, (1, -1, 10)))
        verdict["certified"] = verdict["margin"] >= 0
    elif kind == 1:
        verdict["certified"] = True
    elif kind == 2:
        case.record["rule"] = _some(random, list(RULES))
    else:
        verdict["prediction"] = int(random.integers(4))


def change_threat(case: Honest, random: np.random.Generator) -> None:
    """Another patch, with the shapes it stands for."""
    notation, shapes, patches = _some(
        random, (("1", [[1, 1]], 1), ("2", [[2, 2]], 1), ("1x2", [[1, 2]], 1), ("2*1", [[1, 1]], 2), ("3", [[3, 3]], 1))
    )
    if isinstance(case.record.get("threat"), dict):
        case.record["threat"] |= {"notation": notation, "shapes": shapes, "patches": patches}


CHANGES: tuple[Callable[[Honest, np.random.Generator], None], ...] = (
    change_integer,
    change_packed,
    change_region,
    change_readout,
    change_shape,
    change_type,
    change_size,
    change_keys,
    change_text,
    change_verdict,
    change_threat,
)


def _either(case: Honest, random: np.random.Generator) -> dict[str, Any]:
    return case.readout if case.readout is not None and random.random() < 0.3 else case.record


def _packed(case: Honest) -> Iterator[tuple[dict[str, Any], str, str]]:
    """Every packed field: where it is and of which type."""
    for part, names, dtype in (
        (case.record.get("scores"), ("data", "slack"), "<i2"),
        (case.record.get("evidence"), ("products",), "<i4"),
        (case.record.get("evidence"), ("weights",), "u1"),
        (case.record.get("threat"), ("allowed",), "u1"),
        (case.readout, MATRICES, "<i4"),
    ):
        for name in names:
            if isinstance(part, dict) and part.get(name) is not None:
                yield part, name, dtype
    yield {"nothing": _pack(b"")}, "nothing", "u1"


def _pack(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content)).decode()


# Mutations of the text


def line_of(content: dict[str, Any], random: np.random.Generator) -> bytes:
    """The line of a record or readout, most often with the hash that belongs to it, sometimes altered as text."""
    if "record_version" in content and random.random() < 0.95:
        body = {name: value for name, value in content.items() if name != "sha256"}
        text = json.dumps(body, sort_keys=True, separators=(",", ":"))
        content = {**body, "sha256": hashlib.sha256(text.encode("ascii")).hexdigest()}
    line = json.dumps(content, separators=(",", ":")).encode("ascii")
    if random.random() < 0.9:
        return line
    at = int(random.integers(len(line)))
    depth = int(_some(random, (50, 900, 2000, 100_000)))
    return _some(
        random,
        (
            line[:at],
            line[:at] + bytes(random.integers(0, 256, 3).tolist()) + line[at + 3 :],
            line.replace(b":1,", b":NaN,", 1),
            line.replace(b":1,", b":-Infinity,", 1),
            line.replace(b":1,", b":1e999,", 1),
            line.replace(b":1,", b":" + b"1" * 5000 + b",", 1),
            line.replace(b":1,", b":" + b"[" * depth + b"]" * depth + b",", 1),
            line.replace(b":1,", b":" + b'{"a":' * depth + b"1" + b"}" * depth + b",", 1),
            line.replace(b'"rule":', b'"rule":"vote","rule":', 1),
            line.replace(b'"margin":', b'"margin":5,"margin":', 1),
            line + line,
            b"[" + line + b"]",
            b"\xef\xbb\xbf" + line,
        ),
    )


# The count


def check(lines: list[bytes], totals: dict[str, int]) -> None:
    """Reads the lines as `bagcert verify` does, and compares what is accepted with the brute force."""
    readout = None
    for line in lines:
        started = time.process_time()
        content, accepted = None, False
        try:
            with suppress(ValueError):  # refused by its form
                content = from_line(line)
            if content is not None and "readout_version" in content:
                readout, verdict = content, verify_readout(content)
            elif content is not None:
                verdict = verify_record(content, readout)
                accepted = verdict.ok
            if content is not None:
                assert verdict.ok or (verdict.reason and verdict.fault in ("proof", "record", "limit"))
        except Exception:
            totals["crashed"] += 1
        totals["over_time_limit"] += time.process_time() - started > MOST_SECONDS
        if accepted:
            totals["accepted"] += 1
            totals["wrongly_accepted"] += not agrees(content, readout)


def count(cases: int, seed: int = 0, mutations_each: int = 20) -> dict[str, int]:
    """Mutates `cases` times, each honest record `mutations_each` times; each honest record must be accepted first."""
    random = np.random.default_rng(seed)
    totals = {"cases": 0, "accepted": 0, "wrongly_accepted": 0, "crashed": 0, "over_time_limit": 0}
    totals |= {"honest": 0, "honest_refused": 0}
    while totals["cases"] < cases:
        original = honest(random)
        totals["honest"] += 1
        held = verify_record(original.record, original.readout).ok
        totals["honest_refused"] += not (held and agrees(original.record, original.readout))
        for _ in range(min(mutations_each, cases - totals["cases"])):
            case = copy.deepcopy(original)
            for _ in range(int(random.integers(1, 4))):
                _some(random, CHANGES)(case, random)
            contents = [case.record] if case.readout is None else [case.readout, case.record]
            totals["cases"] += 1
            check([line_of(content, random) for content in contents], totals)
    return totals


if __name__ == "__main__":
    run(count, "records", __doc__, cases=2000)
