"""Rechecks certificate records: a second reading of the definitions, in numpy and the standard library alone.

It shares no code with what it checks. Every placement, rival class, mask and pair of masks is gone through; all sums
are of integers far below 2^53, which float64 holds exactly. docs/records.md says what this proves and what it does not.
"""

import base64
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement, islice, product
from math import ceil, comb, inf, isqrt, prod

import numpy as np

MOST_SIDE, MOST_SCORES = 8192, 2**25  # of a record: the side of an image, a score map or a list of classes
MOST_WORK, MOST_TRIES = 2**38, 2**12  # of the checker: products for pairs of masks, ways to attain the margin


@dataclass(frozen=True)
class Verdict:
    """Whether a record holds and why; if not, what failed: the "record", its "proof", or a "limit" of the checker."""

    ok: bool
    reason: str
    fault: str = ""


def verify_record(record: dict) -> Verdict:
    """Rederives prediction, margin and certificate from the scores and the geometry that a record states."""
    try:
        claim, rule = _Claim(record), _RULES[record["rule"]]
        label, margin, attained = rule(claim)
        if claim.slack is not None:  # every score as bad for the label as it may be
            sign = np.where(np.arange(len(claim.scores)) == label, -1, 1)[:, None, None]
            claim.scores = (claim.scores + sign * claim.slack).clip(claim.low, claim.low + claim.span)
            other, *worst = rule(claim)
            margin, attained = worst if other == label else (min(margin, -1), min(attained, -1))
        for name, found in (("prediction", int(label)), ("margin", int(margin)), ("certified", bool(margin >= 0))):
            said = record["verdict"][name]
            _need(type(said) is type(found) and said == found, f"the {name} is {found}, not {said}", "proof")
        _need(attained == margin, f"the worst placement leaves {attained}, the margin is {margin}", "proof")
    except _FaultError as error:
        return Verdict(False, *error.args)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError, zlib.error) as error:
        return Verdict(False, f"the record is malformed ({type(error).__name__}: {str(error)[:200]!r})", "record")
    return Verdict(True, f"{'' if margin >= 0 else 'not '}certified, with margin {int(margin)}, as recorded")


class _FaultError(Exception): ...  # of a reason and a fault


def _need(holds: object, otherwise: str, fault: str = "record") -> None:
    if not holds:
        raise _FaultError(otherwise, fault)


def _int(value, low: int, high: int, what: str) -> int:
    _need(type(value) is int and low <= value <= high, f"{what} must be an integer from {low} to {high}, got {value!r}")
    return value


def _unpack(text: str, shape: list[int], dtype: str) -> np.ndarray:
    stream, size = zlib.decompressobj(), prod(shape) * int(dtype[-1])
    content = stream.decompress(base64.b64decode(text, validate=True), size + 1)  # inflates no more than asked for
    _need(len(content) == size and stream.eof and not stream.unused_data, f"packed data must be of {size} bytes")
    return np.frombuffer(content, dtype).reshape(shape)


class _Claim:
    """A record as numbers, with R(l) of every placement; refuses what is not of the proper form."""

    def __init__(self, record: dict) -> None:
        _need(record["record_version"] == 1, f"the record version is {record['record_version']}, this checks 1")
        threat, scores, self.rule = record["threat"], record["scores"], record["rule"]
        height, width = size = [_int(side, 1, MOST_SIDE, "a side in px") for side in record["image"]["size_px"]]
        shape = [_int(length, 1, MOST_SIDE, "a side of the score map") for length in scores["shape"]]
        _need(len(shape) == 3 and shape[0] > 1 and prod(shape) <= MOST_SCORES, f"scores of shape {shape}")
        low, high = (_int(scores[end], -(2**15), 2**15 - 1, f"the {end} score") for end in ("low", "high"))
        self.low, self.span, self.scores = low, high - low, _unpack(scores["data"], shape, "<i2").astype(float)
        self.slack = None if scores["slack"] is None else _unpack(scores["slack"], shape, "<i2")
        _need(low < high and low <= self.scores.min() and self.scores.max() <= high, f"scores leave [{low}, {high}]")
        _need(record["locality"] == ("exact" if self.slack is None else "measured"), "slack means measured locality")
        _need(self.slack is None or self.slack.min() >= 0, "slack must be at least 0")
        seen = record["geometry"]["rows"], record["geometry"]["cols"]
        _need([len(axis) for axis in seen] == shape[1:], f"the geometry must have {shape[1:]} rows and columns")
        for runs, pixels in ((runs, pixels) for axis, pixels in zip(seen, size, strict=True) for runs in axis):
            ends = [_int(end, 0, pixels, "an end of a run of pixels") for start, stop in runs for end in (start, stop)]
            _need(ends == sorted(set(ends)), f"the pixels of a region must be ascending runs [start, stop), got {runs}")
        self.patches, self.allowed = _int(threat["patches"], 1, 64, "the number of patches"), None
        if threat["allowed"] is not None:
            bits = _unpack(threat["allowed"], [-(-height * width // 8)], "u1")
            self.allowed = np.unpackbits(bits, count=height * width).reshape(height, width) > 0
        shapes = _shapes(threat["notation"], self.patches, height, width, self.allowed is None)
        _need(threat["shapes"] == shapes, f"the threat {threat['notation']} means the shapes {shapes}", "proof")
        _need(shapes and all(1 <= h <= height and 1 <= w <= width for h, w in shapes), "a patch does not fit")
        self.reaches = {(h, w): _Reaches(seen, size, (h, w), self.allowed) for h, w in shapes}
        self.worst, places = [], record["verdict"]["worst_placement"]  # of worst: (shape, row line, column line)
        count = self.patches * (2 if self.rule == "double-masking" else 1)
        for _, (top, left, h, w) in zip(range(count), [places] if count == 1 else places, strict=True):
            there = (h, w) in self.reaches and self.reaches[h, w].free[top : top + 1, left : left + 1].any()
            _need(there and min(top, left) >= 0, f"the worst placement {[top, left, h, w]} is not allowed", "proof")
            self.worst.append(((h, w), self.reaches[h, w].of[0][top], self.reaches[h, w].of[1][left]))

    def cells(self, shape: tuple[int, int], i: np.integer, j: np.integer) -> np.ndarray:
        """The regions of two lines, 0 or 1, flattened."""
        return np.outer(self.reaches[shape].lines[0][i], self.reaches[shape].lines[1][j]).ravel()


def _shapes(notation: str, patches: int, height: int, width: int, anywhere: bool) -> list[list[int]]:
    """The shapes meant by 5, 2x8, 2%, 5+2x8, area:25 or 2*5, without those inside another if they may lie anywhere."""
    number, _, terms = notation.rpartition("*")
    _need(int(number or 1) == patches, f"the threat {notation} is not of {patches} patches", "proof")
    found: set[tuple[int, int]] = set()
    for term in terms.split("+"):
        ((area, share, h, w),) = re.findall(r"\A(?:area:(\d+)|(\d+(?:\.\d+)?)%|(\d+)(?:x(\d+))?)\Z", term)
        side = isqrt(ceil(Fraction(share) * height * width / 100) - 1) + 1 if share else int(h or 0)
        of_area = {(h, min(width, int(area) // h)) for h in range(1, min(height, int(area)) + 1)} if area else set()
        found |= of_area or {(side, int(w or side))}
    inside = {s for s in found for t in found if s != t and s[0] <= t[0] and s[1] <= t[1]} if anywhere else set()
    return sorted([h, w] for h, w in found - inside)


class _Reaches:
    """R(l) of every placement l of one shape: the regions in lines[0][of[0][top]] and in lines[1][of[1][left]]."""

    def __init__(self, seen: tuple, size: list[int], shape: tuple[int, int], allowed: np.ndarray | None) -> None:
        self.lines, self.of, self.inside = [], [], []
        for regions, pixels, side in zip(seen, size, shape, strict=True):
            touched = np.zeros((pixels - side + 1, len(regions)))
            for region, (start, stop) in ((region, run) for region, runs in enumerate(regions) for run in runs):
                touched[max(0, start - side + 1) : stop, region] = 1  # where a patch of this side meets the run
            _, first, of = np.unique(touched, axis=0, return_index=True, return_inverse=True)
            lines = touched[np.sort(first)]  # each once, in the order of placements
            self.lines.append(lines)
            self.of.append(first.argsort().argsort()[of.reshape(-1)])
            self.inside.append(lines @ lines.T == lines.sum(1)[:, None])  # [a, b]: line a lies inside line b
        self.maximal = [inside.sum(1) == 1 for inside in self.inside]  # lines inside no other
        self.free = np.broadcast_to(True, [len(of) for of in self.of])  # [top, left]: may a patch lie there?
        self.kept = np.ones([len(lines) for lines in self.lines], dtype=bool)  # [line, line]: is it some patch's reach?
        if allowed is not None:
            across = np.lib.stride_tricks.sliding_window_view(allowed, shape[1], 1).min(2)
            self.free = np.lib.stride_tricks.sliding_window_view(across, shape[0], 0).min(2)
            self.kept[:] = False
            self.kept[tuple(of[at] for of, at in zip(self.of, self.free.nonzero(), strict=True))] = True


def _vote(claim: _Claim) -> tuple[int, float, float]:
    """Each rival at `high` and the label at `low` in R(l); levine-feizi: in as many regions as the largest R(l) has."""
    sums, vote, margins, attained = claim.scores.sum((1, 2)), claim.rule == "vote", [], []
    label = int(sums.argmax())  # the lowest index among equals
    several = claim.patches > 1 and claim.allowed is None  # distinct maximal reaches hold all that patches reach
    for rival in set(range(len(sums))) - {label}:
        lead = sums[label] - sums[rival] - (rival < label)
        gap = claim.scores[label] - claim.scores[rival] if vote else np.full_like(claim.scores[0], claim.span)
        damage = {s: r.lines[0] @ (claim.span + gap) @ r.lines[1].T for s, r in claim.reaches.items()}
        each = [damage[s][r.kept & np.outer(*r.maximal) if several else r.kept] for s, r in claim.reaches.items()]
        most = np.sort(np.concatenate(each))[::-1][: claim.patches]
        margins.append(lead - (most.sum() if vote else most[0] * claim.patches))
        places = set(claim.worst) if vote else claim.worst  # repeated where there are fewer than patches
        attained.append(lead - sum(damage[shape][i, j] for shape, i, j in places))
    return label, min(margins), min(attained)


def _masks(claim: _Claim) -> tuple[int, float, float]:
    """One mask (detection) or any two must leave the label on top; K patches: the masks are unions of K masks."""
    double, robust, masks = claim.rule == "double-masking", claim.rule == "robust-masking", list[tuple]()
    for shape, reach in claim.reaches.items():  # in the order (shape, top, left); every reach lies in a maximal one
        rows, cols = ((inside & most).argmax(1) for inside, most in zip(reach.inside, reach.maximal, strict=True))
        masks += [(shape, i, j) for i, j in sorted({(rows[a], cols[b]) for a, b in np.argwhere(reach.kept)})]
    count = comb(len(masks) + claim.patches - 1, claim.patches)
    _need(count**2 * claim.scores.size <= MOST_WORK, f"{count:,} masks are too many to go through in pairs", "limit")
    off = {mask: 1 - claim.cells(*mask) for mask in masks}
    outside = np.array([np.prod(each, axis=0) for each in combinations_with_replacement(off.values(), claim.patches)])
    flat = (claim.scores.clip(0) if robust else claim.scores).reshape(len(claim.scores), -1).T
    label = int(((outside @ flat).min(0) if robust else flat.sum(0)).argmax())  # robust: each less its strongest mask
    if double:
        first = np.where(outside.any(1), (outside @ flat).argmax(1), -1)  # -1: no label where no region is left
        label = common = int(np.bincount(first[first >= 0]).argmax()) if (first >= 0).any() else label
        for keep, other in zip(outside, first, strict=True):
            second = outside * keep
            if other not in (-1, common) and second.any(1).all() and ((second @ flat).argmax(1) == other).all():
                label = int(other)
                break

    def lead(keep: np.ndarray) -> tuple[float, float]:  # the label's least, and -1 where nothing is left to prove it
        own = outside * keep if robust else keep  # robust: what is left of the label loses its strongest mask as well
        left = own @ flat[:, [label]] - keep @ flat - (np.arange(flat.shape[1]) < label)
        return np.delete(left, label, 1).min(), inf if own.any(1).all() else -1.0

    rounds = ((keep[None] if robust else outside * keep) for keep in outside) if double or robust else [outside]
    least, empty = np.min([lead(keep) for keep in rounds], axis=0)
    holders = [[k for m, k in off.items() if m[0] == at[0] and not (k * claim.cells(*at)).any()] for at in claim.worst]
    tries = islice(product(*holders), MOST_TRIES)
    return label, min(least, empty), min(empty, *(lead(np.prod(each, axis=0)[None])[0] for each in tries))


_RULES = {"vote": _vote, "levine-feizi": _vote, "double-masking": _masks, "detection": _masks, "robust-masking": _masks}
