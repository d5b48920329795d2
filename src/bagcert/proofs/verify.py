"""Rechecks certificate records: a second reading of the definitions, in numpy and the standard library alone.

It shares no code with what it checks. Every placement, rival class, mask and pair of masks is gone through; all sums
are of integers far below 2^53, which float64 holds exactly. docs/records.md says what this proves and what it does not.
"""

import base64
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations_with_replacement
from math import ceil, comb, inf, isqrt, prod
from operator import index

import numpy as np

MOST_SIDE, MOST_SCORES = 8192, 2**25  # of a record: the side of an image, a score map or a list of classes
MOST_TERMS, MOST_LINES, MOST_CELLS = 2**8, 2**11, 2**24  # shapes of a notation, lines of an axis, sizes of tables
MOST_LOOKS, MOST_WORK = 2**27, 2**38  # pixels looked at for placements, products for rivals or pairs of masks


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
    """A record as numbers, with the windows that its patches reach; refuses what is not of the proper form."""

    def __init__(self, record: dict) -> None:
        threat, scores, self.rule = record["threat"], record["scores"], record["rule"]
        version, masked = record["record_version"], threat["allowed"] is not None
        _need(version in (1, 2) and type(version) is int, f"the record version is {version}, this checks 1 and 2")
        _need(masked or version == 1, "a record of version 2 must restrict placements")
        _need(not masked or version == 2, "version 1 left out smaller patches within a mask; certify the image again")
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
        self.patches, allowed = _int(threat["patches"], 1, 64, "the number of patches"), None
        if masked:
            bits = _unpack(threat["allowed"], [-(-height * width // 8)], "u1")
            allowed = np.unpackbits(bits, count=height * width).reshape(height, width) > 0
        widest = _widest(threat["notation"], self.patches, height, width)
        shapes = [[h, int(widest[h])] for h in range(1, height + 1) if widest[h] > widest[h + 1]]
        _need(threat["shapes"] == shapes, f"the threat {threat['notation']} means the shapes {shapes}", "proof")
        rows, cols = [_Axis(regions, pixels) for regions, pixels in zip(seen, size, strict=True)]
        # Lines of rows, lines of columns, and which of their products are windows.
        self.blocks = _anywhere(shapes, rows, cols) if allowed is None else [_within(widest, allowed, rows, cols)]
        _need(sum(keep.size for *_, keep in self.blocks) <= MOST_CELLS, "too many windows to go through", "limit")
        self.worst, places = [], record["verdict"]["worst_placement"]
        count = self.patches * (2 if self.rule == "double-masking" else 1)
        for _, place in zip(range(count), [places] if count == 1 else places, strict=True):
            top, left, h, w = map(index, place)
            there = min(top, left, h - 1, w - 1) >= 0 and h <= height - top and w <= min(width - left, widest[h])
            there = there and (allowed is None or allowed[top : top + h, left : left + w].all())
            _need(there, f"the worst placement {place} is not allowed", "proof")
            self.worst.append((h, w, rows.line(top, h), cols.line(left, w)))


def _widest(notation: str, patches: int, height: int, width: int) -> np.ndarray:
    """By height: the width of the widest patch that 5, 2x8, 2%, 5+2x8, area:25 or 2*5 stands for; 0 for none."""
    number, _, text = notation.rpartition("*")
    _need(int(number or 1) == patches, f"the threat {notation} is not of {patches} patches", "proof")
    terms, widest = text.split("+"), np.zeros(height + 2, dtype=int)
    _need(len(terms) <= MOST_TERMS, f"{len(terms):,} shapes are too many to go through", "limit")
    for term in terms:
        ((area, share, h, w),) = re.findall(r"\A(?:area:(\d+)|(\d+(?:\.\d+)?)%|(\d+)(?:x(\d+))?)\Z", term)
        if area:
            wide = np.minimum(width, min(int(area), height * width) // np.arange(1, height + 1))
        else:
            tall = isqrt(ceil(Fraction(share) * height * width / 100) - 1) + 1 if share else int(h)
            _need(1 <= tall <= height and 1 <= int(w or tall) <= width, "a patch does not fit")
            wide = np.where(np.arange(1, height + 1) <= tall, int(w or tall), 0)
        widest[1:-1] = np.maximum(widest[1:-1], wide)
    _need(widest[1] > 0, "a patch must be of at least 1 px")
    return widest


class _Axis:
    """The lines of an axis: the sets of regions that see a pixel of some run of pixels, numbered."""

    def __init__(self, regions: list, pixels: int) -> None:
        _need(len(regions) * pixels <= MOST_CELLS, "the geometry is too large to go through", "limit")
        self.count = np.zeros((pixels + 1, len(regions)), np.int16)
        self.ids, self.left = dict[bytes, int](), 2**3 * MOST_LOOKS
        for region, (start, stop) in ((region, run) for region, runs in enumerate(regions) for run in runs):
            self.count[start + 1 : stop + 1, region] = 1
        self.count = self.count.cumsum(0, dtype=np.int16)

    def line(self, first: int, side: int) -> np.ndarray:
        return (self.count[first + side] > self.count[first]).astype(float)

    def of(self, side: int) -> np.ndarray:
        """The number of the line that each run of `side` pixels has."""
        self.left -= self.count.size + 2**6 * len(self.count)
        _need(self.left >= 0, "the shapes are too many to go through", "limit")
        lines = np.packbits(self.count[side:] > self.count[:-side], axis=1)
        new = np.append(True, (lines[1:] != lines[:-1]).any(1))
        ids = [self.ids.setdefault(line.tobytes(), len(self.ids)) for line in lines[new]]
        _need(len(self.ids) < 2**15, "the sets of rows or columns are too many to go through", "limit")
        return np.array(ids)[new.cumsum() - 1]

    def lines(self, numbers: list[int]) -> np.ndarray:
        _need(len(numbers) <= MOST_LINES, f"{len(numbers):,} sets of rows or columns are too many", "limit")
        packed = np.frombuffer(b"".join(self.ids), np.uint8).reshape(len(self.ids), -1)[numbers]
        return np.unpackbits(packed, axis=1, count=self.count.shape[1]).astype(np.float32)


def _inside(lines: np.ndarray) -> np.ndarray:
    """[a, b]: line a lies inside line b."""
    return (lines @ lines.T == lines.sum(1)[:, None]).astype(np.float32)


def _anywhere(shapes: list, rows: _Axis, cols: _Axis) -> list[tuple[np.ndarray, ...]]:
    """The windows of each shape: products of lines that lie in no other, in the order of their placements."""
    blocks = []
    for h, w in shapes:
        lines = [axis.lines(list(dict.fromkeys(axis.of(side).tolist()))) for axis, side in ((rows, h), (cols, w))]
        most = [own[_inside(own).sum(1) == 1] for own in lines]
        blocks.append((*most, np.ones([len(own) for own in most], dtype=bool)))
    return blocks


def _within(widest: np.ndarray, allowed: np.ndarray, rows: _Axis, cols: _Axis) -> tuple[np.ndarray, ...]:
    """Every R(l) of a patch in the white part that lies in no other, those with earlier rows, then columns, first."""
    width, looks = allowed.shape[1], MOST_LOOKS
    _need(allowed.any(), "no patch lies in the white part")
    row_of = [rows.of(h) for h in range(1, int(np.flatnonzero(widest)[-1]) + 1)]
    col_of = np.zeros((widest[1] + 1, width), dtype=np.int16)  # by width and first column
    for w in range(1, widest[1] + 1):
        col_of[w, : width - w + 1] = cols.of(w)
    order = [sorted(axis.ids.values(), key=list(axis.ids).__getitem__, reverse=True) for axis in (rows, cols)]
    lines = [axis.lines(numbers) for axis, numbers in zip((rows, cols), order, strict=True)]
    reached = np.zeros([len(own) for own in lines], dtype=bool)
    tall = white = np.packbits(allowed, axis=1)  # by top: where a column of h pixels is white
    for h, row in enumerate(row_of, 1):
        taller, new = tall[:-1] & white[h:], np.array(tall.any(1))
        if widest[h] == widest[h + 1]:  # where a row more takes nothing, the higher patches say it all
            new[:-1] &= (tall[:-1] != taller).any(1)
            new[1:] &= (tall[1:] != taller).any(1)
        looks -= allowed.size // 2**8 + int(new.sum()) * width
        _need(looks >= 0, "the mask leaves too many placements to go through", "limit")
        for tops in np.array_split(new.nonzero()[0], int(new.sum()) * width // 2**22 + 1):  # to bound memory
            black = np.unpackbits(tall[tops], axis=1, count=width) == 0
            end = np.minimum.accumulate(np.where(black, np.arange(width), width)[:, ::-1], axis=1)[:, ::-1]
            wide = np.minimum(end - np.arange(width), widest[h])  # of the widest patch from each pixel on
            top, left = wide.nonzero()
            reached[row[tops[top]], col_of[wide[top, left], left]] = True
        tall = taller
    reached = reached[np.ix_(*order)]
    some = reached & np.outer(lines[0].any(1), lines[1].any(1))  # a product with an empty line holds no region
    keep = some & (_inside(lines[0]) @ some.astype(np.float32) @ _inside(lines[1]).T == 1)
    if not some.any():
        keep[tuple(np.argwhere(reached)[0])] = True  # one window, of no region
    used = keep.any(1), keep.any(0)
    return lines[0][used[0]], lines[1][used[1]], keep[np.ix_(*used)]


def _vote(claim: _Claim) -> tuple[int, float, float]:
    """Each rival at `high` and the label at `low` in R(l); levine-feizi: in as many regions as the largest R(l) has."""
    sums, vote, margins, attained = claim.scores.sum((1, 2)), claim.rule == "vote", [], []
    work = sum((rows.size + keep.size) * cols.shape[1] + 2**6 * keep.size for rows, cols, keep in claim.blocks)
    _need(len(sums) * work <= MOST_WORK, f"{len(sums):,} classes are too many to go through", "limit")
    label = int(sums.argmax())  # the lowest index among equals
    places = {(h, w, *map(bytes, lines)): lines for h, w, *lines in claim.worst}  # repeated where there are too few
    worst = list(places.values()) if vote else [lines for _, _, *lines in claim.worst]
    for rival in set(range(len(sums))) - {label}:
        lead = sums[label] - sums[rival] - (rival < label)
        gap = claim.scores[label] - claim.scores[rival] if vote else np.full_like(claim.scores[0], claim.span)
        damage = np.concatenate([(rows @ (claim.span + gap) @ cols.T)[keep] for rows, cols, keep in claim.blocks])
        most = np.partition(damage, -min(claim.patches, len(damage)))[-claim.patches :]
        margins.append(lead - (most.sum() if vote else most.max() * claim.patches))
        attained.append(lead - sum(rows @ (claim.span + gap) @ cols for rows, cols in worst))
    return label, min(margins), min(attained)


def _masks(claim: _Claim) -> tuple[int, float, float]:
    """One mask (detection) or any two must leave the label on top; K patches: the masks are unions of K masks."""
    double, robust = claim.rule == "double-masking", claim.rule == "robust-masking"
    count = comb(sum(int(keep.sum()) for *_, keep in claim.blocks) + claim.patches - 1, claim.patches)
    fits = count**2 * claim.scores.size <= MOST_WORK and count * claim.scores[0].size <= MOST_CELLS
    _need(fits, f"{count:,} masks are too many to go through in pairs", "limit")
    off = [1 - np.outer(rows[i], cols[j]).ravel() for rows, cols, keep in claim.blocks for i, j in np.argwhere(keep)]
    outside = np.array([np.prod(each, axis=0) for each in combinations_with_replacement(off, claim.patches)], float)
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
    worst = np.prod([1 - np.outer(rows, cols).ravel() for *_, rows, cols in claim.worst], axis=0)
    return label, min(least, empty), min(empty, lead(worst[None])[0])


_RULES = {"vote": _vote, "levine-feizi": _vote, "double-masking": _masks, "detection": _masks, "robust-masking": _masks}
