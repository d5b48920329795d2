"""Reference implementation of the definitions in docs/method.md, in numpy loops that share no code with the package.

Slow and literal on purpose. A map is an integer array [classes, rows, cols]; a mask is a boolean [rows, cols].
"""

from fractions import Fraction
from itertools import combinations_with_replacement, product
from math import floor

import numpy as np

# ---------------------------------------------------------------- geometry


def lines(seen, side):
    """For each start of a run of `side` pixels: which regions see one of its pixels."""
    return [
        tuple(bool(region[start : start + side].any()) for region in seen) for start in range(seen.shape[1] - side + 1)
    ]


def promised(image_size, shapes, allowed=None):
    """(shape, top, left) of every patch that a threat allows: all rectangles that fit inside one of the shapes."""
    height, width = image_size
    found = []
    for h in range(1, height + 1):
        for w in range(1, width + 1):
            if not any(h <= most_h and w <= most_w for most_h, most_w in shapes):
                continue
            for top in range(height - h + 1):
                for left in range(width - w + 1):
                    if allowed is None or allowed[top : top + h, left : left + w].all():
                        found.append(((h, w), top, left))
    return found


def maximal(rectangles):
    """Those (shape, top, left) that lie in no other."""

    def inside(one, other):
        ((h, w), top, left), ((h2, w2), top2, left2) = one, other
        return top2 <= top and left2 <= left and top + h <= top2 + h2 and left + w <= left2 + w2

    return [one for one in rectangles if not any(one != other and inside(one, other) for other in rectangles)]


def reaches(rows_seen, cols_seen, shapes, allowed=None):
    """R(l) for every patch a threat allows, straight from which region sees which pixel."""
    found = []
    for (h, w), top, left in promised((rows_seen.shape[1], cols_seen.shape[1]), shapes, allowed):
        rows = rows_seen[:, top : top + h].any(1)
        cols = cols_seen[:, left : left + w].any(1)
        found.append((((h, w), top, left), np.outer(rows, cols)))
    return found


def _first_maximal(line, every):
    """The first line, in order of placement, that contains this one and lies in no other."""

    def within(one, another):
        return all(b or not a for a, b in zip(one, another, strict=True))

    for other in every:
        if within(line, other) and not any(third != other and within(other, third) for third in every):
            return other
    raise AssertionError("every line lies in a maximal one")


def mask_set(rows_seen, cols_seen, shapes, allowed=None, masks_per_axis=None):
    """The windows: what votes are reckoned over, and the masks of the masking rules, in their order."""
    if masks_per_axis is not None:
        return [mask for mask, _ in merged_masks(rows_seen, cols_seen, shapes, allowed, masks_per_axis)]
    if allowed is not None:
        return _mask_set_within(rows_seen, cols_seen, shapes, allowed)
    masks = []
    for h, w in sorted(shapes):
        rows, cols = lines(rows_seen, h), lines(cols_seen, w)
        found = {(_first_maximal(row, rows), _first_maximal(col, cols)) for row in rows for col in cols}
        for row, col in sorted(found, key=lambda window: (rows.index(window[0]), cols.index(window[1]))):
            masks.append(np.outer(row, col))
    return masks


def _mask_set_within(rows_seen, cols_seen, shapes, allowed):
    """Every reach that lies in no other, sorted by the strings of 0 and 1 of its rows, then of its columns."""
    found = {mask.tobytes(): mask for _, mask in reaches(rows_seen, cols_seen, shapes, allowed)}.values()
    most = [mask for mask in found if not any((mask <= other).all() and (mask != other).any() for other in found)]

    def bits(mask):
        return mask.any(1).tolist(), mask.any(0).tolist()

    return sorted(most, key=bits, reverse=True)


def merged_masks(rows_seen, cols_seen, shapes, allowed, masks_per_axis):
    """(mask, windows in it): neighboring windows merged into at most `masks_per_axis` masks per axis and shape."""
    found = []
    for some in [[shape] for shape in sorted(shapes)] if allowed is None else [shapes]:
        windows = _window_lines(rows_seen, cols_seen, some, allowed)
        groups = [_groups([window[axis] for window in windows], masks_per_axis, allowed is not None) for axis in (0, 1)]
        for row_group, col_group in product(*groups):
            members = [(row, col) for row, col in windows if row in row_group and col in col_group]
            if members:
                mask = np.outer(np.any(row_group, axis=0), np.any(col_group, axis=0))
                found.append((mask, [np.outer(*member) for member in members]))
    return found


def _window_lines(rows_seen, cols_seen, shapes, allowed):
    """(row line, column line) of every window, in order."""
    if allowed is not None:
        masks = _mask_set_within(rows_seen, cols_seen, shapes, allowed)
        return [(tuple(mask.any(1).tolist()), tuple(mask.any(0).tolist())) for mask in masks]
    ((h, w),) = shapes
    rows, cols = (list(dict.fromkeys(every)) for every in (lines(rows_seen, h), lines(cols_seen, w)))
    largest = [sorted({_first_maximal(line, every) for line in every}, key=every.index) for every in (rows, cols)]
    return list(product(*largest))


def _groups(every, most, descending):
    """The distinct lines of an axis in order, cut into at most `most` groups: line i of n is in group i k // n."""
    distinct = sorted(set(every), reverse=True) if descending else list(dict.fromkeys(every))
    count = min(most, len(distinct))
    return [[line for i, line in enumerate(distinct) if i * count // len(distinct) == group] for group in range(count)]


def unions(masks, patches):
    """Every union of `patches` masks, repetition allowed."""
    return [np.logical_or.reduce(chosen) for chosen in combinations_with_replacement(masks, patches)]


# ---------------------------------------------------------------- predictions


def argmax(values):
    """The lowest index of the largest value."""
    best = 0
    for index, value in enumerate(values):
        if value > values[best]:
            best = index
    return best


def plain_prediction(scores):
    return argmax([int(scores[c].sum()) for c in range(len(scores))])


def masked_prediction(scores, mask):
    """The label from what a mask leaves over; None if it leaves nothing."""
    if mask.all():
        return None
    return argmax([int(scores[c][~mask].sum()) for c in range(len(scores))])


def double_masking_prediction(scores, masks):
    first = [masked_prediction(scores, mask) for mask in masks]
    labels = [label for label in first if label is not None]
    if not labels:
        return plain_prediction(scores)
    if len(labels) == len(first) and len(set(labels)) == 1:
        return labels[0]
    majority = argmax([labels.count(c) for c in range(len(scores))])
    for mask, label in zip(masks, first, strict=True):
        if label is None or label == majority:
            continue
        if all(masked_prediction(scores, mask | other) == label for other in masks):
            return label
    return majority


def robust_masking_prediction(scores, masks, threshold=0):
    sums = []
    for c in range(len(scores)):
        evidence = np.maximum(scores[c].astype(object), 0)
        total, most = evidence.sum(), max(evidence[mask].sum() for mask in masks)
        sums.append(total - most if most > Fraction(threshold) * total else total)
    return argmax(sums)


# ---------------------------------------------------------------- certificates: (prediction, margin)


def _rivals(scores, label):
    for c in range(len(scores)):
        if c != label:
            difference = scores[label].astype(np.int64) - scores[c].astype(np.int64)
            yield c, difference, int(difference.sum()) - (1 if c < label else 0)


def vote(scores, windows, low, high, patches=1):
    label = plain_prediction(scores)
    margins = []
    for _, difference, lead in _rivals(scores, label):
        damages = sorted((int((difference[w] + high - low).sum()) for w in windows), reverse=True)
        margins.append(lead - sum(damages[:patches]))
    return label, min(margins)


def levine_feizi(scores, windows, low, high, patches=1):
    label = plain_prediction(scores)
    largest = max(int(w.sum()) for w in windows)
    return label, min(lead for _, _, lead in _rivals(scores, label)) - 2 * (high - low) * patches * largest


def double_masking(scores, masks):
    label = double_masking_prediction(scores, masks)
    margin = None
    for c, difference, _ in _rivals(scores, label):
        for first in masks:
            for second in masks:
                left = int(difference[~(first | second)].sum()) - (1 if c < label else 0)
                margin = left if margin is None else min(margin, left)
                if (first | second).all():
                    margin = min(margin, -1)
    return label, margin


def double_masking_certified(scores, masks):
    """The condition itself: every pair gives the deployed prediction."""
    label = double_masking_prediction(scores, masks)
    return all(masked_prediction(scores, a | b) == label for a in masks for b in masks)


def detection(scores, masks):
    label = plain_prediction(scores)
    margin = None
    for c, difference, _ in _rivals(scores, label):
        for mask in masks:
            left = int(difference[~mask].sum()) - (1 if c < label else 0)
            margin = left if margin is None else min(margin, left)
            if mask.all():
                margin = min(margin, -1)
    return label, margin


def robust_masking(scores, masks, threshold=0):
    label = robust_masking_prediction(scores, masks, threshold)
    evidence = np.maximum(scores.astype(object), 0)
    margin = None
    for mask in masks:
        lower = min(evidence[label][~(mask | other)].sum() for other in masks)
        for c in range(len(scores)):
            if c == label:
                continue
            upper = Fraction(int(evidence[c][~mask].sum())) / (1 - Fraction(threshold))
            left = int(lower) - floor(upper) - (1 if c < label else 0)
            margin = left if margin is None else min(margin, left)
            if any((mask | other).all() for other in masks):
                margin = min(margin, -1)
    return label, margin


def alert(scores, masks):
    """Does detection raise the alarm?"""
    label = plain_prediction(scores)
    return any(masked_prediction(scores, mask) != label for mask in masks)


# ---------------------------------------------------------------- attention pooling, in Python integers


def readout_scores(values, weights, readout, mask):
    """Integer class scores of what a mask leaves over; None if it leaves nothing.

    `values` [D, rows, cols] and `weights` [heads, rows, cols] are those of every region, `readout` holds the integer
    matrices by name.
    """
    kept = [tuple(cell) for cell in np.argwhere(~mask)]
    if not kept:
        return None
    each = len(values) // len(weights)
    pooled = []
    for d in range(len(values)):
        weight = [int(weights[d // each][cell]) for cell in kept]
        total = sum(e * int(values[d][cell]) for e, cell in zip(weight, kept, strict=True))
        pooled.append(max(-127, min(127, round(Fraction(total, sum(weight))))))
    hidden = []
    for row, bias in zip(readout["first"], readout["first_bias"], strict=True):
        total = sum(int(a) * q for a, q in zip(row, pooled, strict=True)) + int(bias)
        hidden.append(max(0, min(127, round(Fraction(total, 128)))))
    scores = []
    for c, bias in enumerate(readout["bias"]):
        from_hidden = sum(int(b) * t for b, t in zip(readout["second"][c], hidden, strict=True))
        scores.append(
            from_hidden + sum(int(a) * q for a, q in zip(readout["skip"][c], pooled, strict=True)) + int(bias)
        )
    return scores


def any_masked_prediction(score, mask):
    """The label of any masked predictor `score(mask)` that returns class scores, or None where nothing is left."""
    scores = score(mask)
    return None if scores is None else argmax(scores)


def any_double_masking_prediction(score, masks, shape):
    """The double-masking prediction for any function of the kept regions."""
    first = [any_masked_prediction(score, mask) for mask in masks]
    labels = [label for label in first if label is not None]
    if not labels:
        return any_masked_prediction(score, np.zeros(shape, dtype=bool))
    if len(labels) == len(first) and len(set(labels)) == 1:
        return labels[0]
    majority = min(set(labels), key=lambda label: (-labels.count(label), label))
    for mask, label in zip(masks, first, strict=True):
        if label in (None, majority):
            continue
        if all(any_masked_prediction(score, mask | other) == label for other in masks):
            return label
    return majority


def any_margin(score, masks, label):
    """The least lead of a label over its rivals under some masks, less 1 over earlier ones; -1 if nothing is left."""
    margin = None
    for mask in masks:
        scores = score(mask)
        if scores is None:
            lead = -1
        else:
            lead = min(scores[label] - z - (c < label) for c, z in enumerate(scores) if c != label)
        margin = lead if margin is None else min(margin, lead)
    return margin


# ---------------------------------------------------------------- attacks


def every_content(scores, reach, low, high, limit=4096):
    """The map under every content of a reach made of `low` and `high`; nothing if that is too many."""
    cells = [(c, *cell) for c in range(len(scores)) for cell in np.argwhere(reach)]
    if 2 ** len(cells) > limit:
        return
    for values in product((low, high), repeat=len(cells)):
        attacked = scores.copy()
        for cell, value in zip(cells, values, strict=True):
            attacked[tuple(cell)] = value
        yield attacked


def one_class_up(scores, reach, low, high):
    """The worst contents for sums: one class at `high`, all others at `low`; and everything alike."""
    for c in range(len(scores)):
        attacked = scores.copy()
        attacked[:, reach] = low
        attacked[c, reach] = high
        yield attacked
    for value in (low, high):
        attacked = scores.copy()
        attacked[:, reach] = value
        yield attacked
