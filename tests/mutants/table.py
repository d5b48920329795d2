"""The mistakes: what is wrong, and the edit that makes it. Mutants that change no answer are not listed."""

from tests.mutants.copies import Mutant

THREAT = {
    "the last row is no placement": [
        (
            "np.ones((self.image_size[0] - h + 1, self.image_size[1] - w + 1)",
            "np.ones((self.image_size[0] - h, self.image_size[1] - w + 1)",
        )
    ],
    "the last column is no placement": [
        (
            "np.ones((self.image_size[0] - h + 1, self.image_size[1] - w + 1)",
            "np.ones((self.image_size[0] - h + 1, self.image_size[1] - w)",
        )
    ],
    "tops without the last": [("self.image_size[0] - shape[0] + 1", "self.image_size[0] - shape[0]")],
    "lefts without the last": [("self.image_size[1] - shape[1] + 1", "self.image_size[1] - shape[1]")],
    "one forbidden pixel under a patch is allowed": [("integral[:-h, :-w]) == 0", "integral[:-h, :-w]) <= 1")],
    "the part of a mask image that is forbidden counts as allowed": [(">= 2**7", "< 2**7")],
    "a mask of 16 bits is white from less than 1 % on": [(">= 2**15", ">= 2**8")],
    "the mask is the array of the caller": [
        ('np.array(self.allowed, dtype=bool, order="C")', "np.asarray(self.allowed, dtype=bool)")
    ],
    "only the largest shapes under a mask": [
        (
            "self.shapes if self.allowed is None else tuple(self._maximal)",
            "tuple(shape for shape in self.shapes if self.allowed is None or shape in self._maximal)",
        )
    ],
    "several patches read as one": [
        ("patches, shapes_text = int(match[1]), match[2]", "patches, shapes_text = 1, match[2]")
    ],
    "height and width swapped": [
        ("return [(int(match[1]), int(match[2]))]", "return [(int(match[2]), int(match[1]))]")
    ],
    "percentages rounded down": [("side += side**2 < share", "side += 0")],
    "areas without the tallest rectangle": [("range(1, min(height, area) + 1)", "range(1, min(height, area))")],
    "shapes dropped though they are wider than the taller ones": [("if shape[1] > widest:", "if widest == 0:")],
    "equally wide shapes kept though they lie in another": [("if shape[1] > widest:", "if shape[1] >= widest:")],
    "threats equal whatever their allowed placements, so that cached windows are mixed up": [
        (
            "return (self.image_size, self.shapes, self.patches, mask)",
            "return (self.image_size, self.shapes, self.patches, mask is None)",
        )
    ],
    "threats equal whatever their number of patches": [
        ("return (self.image_size, self.shapes, self.patches, mask)", "return (self.image_size, self.shapes, mask)")
    ],
    "a patch wider than the image is accepted": [("if h > height or w > width:", "if h > height and w > width:")],
    "a patch of height 0 is accepted": [("if h < 1 or w < 1:", "if h < 1 and w < 1:")],
}

RECTANGLES = {
    "rectangles dropped that begin beside a white pixel": [
        ("(run[:, :-1] == 0) | (wide[:, 1:] == widest[height])", "run[:, :-1] == 0")
    ],
    "rectangles dropped that are a pixel wider than what is white below or above": [
        ("maximal[rows] &= reach < wide[rows]", "maximal[rows] &= reach + 1 < wide[rows]")
    ],
    "rectangles dropped though a higher one is no patch": [("if widest[height + 1] == widest[height]:", "if height:")],
    "heights looked at only in rows that are black throughout": [
        ("(column & ~lower).any(1) & (column & ~upper).any(1)", "(column & ~lower).all(1) & (column & ~upper).all(1)")
    ],
    "rectangles kept though they may be a pixel higher": [
        ("maximal[rows] &= reach < wide[rows]", "maximal[rows] &= reach < wide[rows] + 1")
    ],
    "the last part of the rows forgotten": [("for some in np.array_split(", "for some in [[]] + np.array_split(")],
}

CLAIM = {
    "checker: a merged mask is only what its windows share": [
        ("lines[np.array(group) == number].max(0)", "lines[np.array(group) == number].min(0)")
    ],
    "checker: a worst placement stands for its own window only": [("rows=rows[row_groups[row]]", "rows=reach.rows")],
    "checker: of each height only the widest patch within a mask": [
        (
            "np.minimum(end - np.arange(width), widest[h])",
            "np.where(end - np.arange(width) >= widest[h], widest[h], 0)",
        )
    ],
    "checker: only the largest shapes within a mask": [
        ("look[:-1] &= (tall[:-1] != taller).any(1)", "look[:] = False")
    ],
    "checker: within a mask a row too many is left out": [
        ("look[1:] &= (tall[1:] != taller).any(1)", "look[1:] &= ~tall[:-1].any(1)")
    ],
    "checker: windows kept though they lie in another": [("(holders == 1)", "(holders >= 1)")],
}

MAPS = {
    "checker: halves rounded up": [("((2 * rest == b) & (quotient % 2 == 1))", "(2 * rest == b)")],
    "checker: pooled values not clipped": [(".clip(-MOST_POOLED, MOST_POOLED)", "")],
    "checker: a readout may have any hash": [("need(said == hashed,", "need(said,")],
    "checker: a record may use any readout": [('stated == readout["sha256"],', "stated,")],
    "checker: weights may be 0": [("need(e.min() >= 1,", "need(e.min() >= 0,")],
    "checker: values may be any": [("need(largest <= MOST_VALUE,", "need(largest >= 0,")],
}

VERIFY = {
    "checker: no pairs of masks with attention pooling": [
        ("    if margin >= 0:\n        margin = min(", "    if False:\n        margin = min(")
    ],
    "checker: ties cost nothing outside masks": [("(z[:, [y]] - z - (np.arange(z.shape[1]) < y))", "(z[:, [y]] - z)")],
    "checker: any disagreeing mask decides": [
        ("set(answers(scores, outside * keep)) == {label}", "set(answers(scores, outside * keep)) >= {label}")
    ],
    "checker: a mask that leaves no region agrees": [
        ("empty = -1.0 if leaves_nothing(outside) else inf", "empty = inf"),
    ],
    "checker: a worst placement may be any": [("need(attained == margin, f", "need(attained >= margin, f")],
}

GRID = {
    "the last region is missing": [("// stride + 1", "// stride")],
    "receptive fields one pixel short": [("pixel < first + receptive_field", "pixel < first + receptive_field - 1")],
    "receptive fields start one pixel late": [("(pixel >= first)", "(pixel > first)")],
    "no padding at the far side": [("pixels - 2 * start - receptive_field", "pixels - start - receptive_field")],
    "regions counted as if padding were not clipped": [("first = start + stride", "first = abs(start) + stride")],
    "patches one pixel smaller than declared": [
        ("return count[side:] > count[:-side]", "return count[side - 1 : -1] > count[:-side]")
    ],
    "the last placement of an axis is missing": [
        ("return count[side:] > count[:-side]", "return count[side:-1] > count[: -side - 1]")
    ],
    "regions touched only where they see the whole patch": [
        ("return count[side:] > count[:-side]", "return count[side:] >= count[:-side] + side")
    ],
    "strided windows hold too few positions": [
        ("return count[side:] > count[:-side]", "return count[side:] > count[:-side] + (seen.sum(1) > 1)")
    ],
    "touched columns from the height of the patch": [("self._shape(patch)[1]", "self._shape(patch)[0]")],
    "minimal windows instead of maximal ones": [
        ("is_maximal = _inside(distinct).sum(1) == 1", "is_maximal = _inside(distinct).sum(0) == 1")
    ],
    "the last maximal window dropped": [
        (
            "is_maximal = _inside(distinct).sum(1) == 1",
            "is_maximal = (_inside(distinct).sum(1) == 1) & (np.arange(len(distinct)) < max(1, len(distinct) - 1))",
        )
    ],
    "windows kept though they lie in another": [
        ("is_maximal = _inside(distinct).sum(1) == 1", "is_maximal = _inside(distinct).sum(1) >= 1")
    ],
    "windows kept under a mask though they lie in another": [("keep = found & (holders == 1)", "keep = found.copy()")],
    "windows kept under a mask whose rows hold another's, not those that lie in none": [
        ("holders = _inside(row_lines).astype", "holders = _inside(row_lines).T.astype")
    ],
    "the order of windows under a mask is that of their columns": [("return distinct[::-1], {", "return distinct, {")],
    "only the smallest shape under a mask": [("for shape in reversed(shapes):", "for shape in shapes[:1]:")],
    "only the largest shape under a mask": [("for shape in reversed(shapes):", "for shape in shapes[-1:]:")],
    "inside and outside confused": [("counts.sum(1)[:, None]", "counts.sum(1)[None, :]")],
    "windows in another order than placements": [("order = np.argsort(first)", "order = np.argsort(-first)")],
    "runs of equal lines end only where every region changes": [
        ("(touched[1:] != touched[:-1]).any(1)", "(touched[1:] != touched[:-1]).all(1)")
    ],
    "all windows kept where placements are restricted": [("keep = found & (holders == 1)", "keep = holders >= 0")],
    "only the first shape of a set": [("for shape in threat.shapes:", "for shape in threat.shapes[:1]:")],
    "only the last shape of a set": [("for shape in threat.shapes:", "for shape in threat.shapes[-1:]:")],
    "resizing narrows what a pixel reaches": [("inner.astype(np.float32)) > 0", "inner.astype(np.float32)) > 1")],
    "a grid covers another if it does in one direction": [("and not (other.cols_seen", "or not (other.cols_seen")],
    "a transposed grid is the same grid": [
        ("rows_seen=self.cols_seen, cols_seen=self.rows_seen", "rows_seen=self.rows_seen, cols_seen=self.cols_seen")
    ],
    "a merged mask is only the first of its windows": [
        ("np.logical_or.reduceat(lines, np", "lines.take(axis=0, indices=np")
    ],
    "a merged mask misses the last window of the axis": [
        (
            "union_of = np.arange(len(lines)) * count // len(lines)",
            "union_of = np.minimum(np.arange(len(lines)), count)",
        )
    ],
    "merged masks are kept only where the last window is": [
        ("keep[row_of[row], col_of[col]] = True", "keep[row_of[row[:1]], col_of[col[:1]]] = True")
    ],
    "the placement of a merged mask is its last": [
        ("(index[::-1] for index in block.keep.nonzero())", "block.keep.nonzero()")
    ],
    "the witness of a window is a placement that reaches another": [("first[is_maximal]", "first[: is_maximal.sum()]")],
    "windows one row smaller than they are": [
        ("np.outer(self.rows.sum(1), self.cols.sum(1))", "np.outer(self.rows.sum(1) - 1, self.cols.sum(1))")
    ],
    "a threat for another image size is accepted": [
        ("if threat.image_size != grid.image_size:", "if threat.image_size < grid.image_size:")
    ],
}

GUARD = {
    "slack forgotten": [
        ("worst = certify(score_map.worst_case(found.prediction), threat)", "worst = found"),
    ],
    "the certificate of another label, on the worst map": [
        ("margin = torch.where(same, worst.margin, found.margin.clamp(max=-1))", "margin = worst.margin"),
    ],
    "a label that slack can turn keeps its margin": [("found.margin.clamp(max=-1)", "found.margin")],
    "the prediction of the worst map": [
        ("found.prediction,\n            margin >= 0", "worst.prediction,\n            margin >= 0")
    ],
    "a measured certificate called exact": [('"measured",\n', '"exact",\n')],
}

TIE_PENALTY = "device=prediction.device)[None, :] < prediction[:, None]"
HIGHEST = "return values.shape[1] - 1 - values.flip(1).max(1).indices"

SCORES = {
    "ties to the highest class in the prediction": [("return values.max(1).indices", HIGHEST)],
    "ties to the wrong side in the margin": [(TIE_PENALTY, TIE_PENALTY.replace("<", ">"))],
    "ties to the highest class in both": [
        ("return values.max(1).indices", HIGHEST),
        (TIE_PENALTY, TIE_PENALTY.replace("<", ">")),
    ],
    "ties cost nothing in the margin": [(TIE_PENALTY, TIE_PENALTY.replace("<", "< 0 *"))],
    "the range of scores taken for its upper end": [("return self.high - self.low", "return self.high")],
    "class sums in 16 bits": [("dtype=torch.int64)\n\n    @cached", "dtype=torch.int16)\n\n    @cached")],
    "float32 sums beyond 2^24": [
        (
            "return torch.float32 if 4 * span * regions < 2**24 else torch.float64",
            "return torch.float32",
        )
    ],
    "float32 sums up to four times what is exact": [("if 4 * span * regions < 2**24", "if span * regions < 2**24")],
    "large scores rounded before they are shifted": [
        ("if max(abs(self.low), abs(self.high)) < 2**24:", "if self.low <= self.high:")
    ],
    "many classes: rows of windows for their columns": [(".permute(0, 3, 1, 2)", ".permute(0, 3, 2, 1)")],
    "levels do not start at 0": [
        ("return scores.to(self.exact_dtype) - self.low", "return scores.to(self.exact_dtype)")
    ],
    "NaN quantized to the highest score": [("nan=-FIXED_POINT_LIMIT", "nan=FIXED_POINT_LIMIT")],
    "infinity quantized to the lowest score": [("posinf=FIXED_POINT_LIMIT", "posinf=-FIXED_POINT_LIMIT")],
    "the clip forgotten": [(".clamp(-FIXED_POINT_LIMIT, FIXED_POINT_LIMIT)", "")],
    "the clip at one end only": [(".clamp(-FIXED_POINT_LIMIT, FIXED_POINT_LIMIT)", ".clamp(max=FIXED_POINT_LIMIT)")],
    "scores cut off instead of rounded": [("scaled.round()", "scaled.trunc()")],
    "the scale forgotten": [("z.float() * scale", "z.float()")],
    "a score of exactly 0 counts as 1": [("return (z > 0)", "return (z >= 0)")],
    "NaN counts as 1": [("return (z > 0)", "return (~(z <= 0))")],
    "scores below their range accepted": [("self.low <= self.scores.min() and self.scores.max()", "self.scores.max()")],
    "scores above their range accepted": [
        ("self.low <= self.scores.min() and self.scores.max() <= self.high", "self.low <= self.scores.min()")
    ],
    "rules under the autocast of the caller": [("torch.autocast(device.type, enabled=False), ", "")],
    "ranges accepted whose sums round": [("regions >= EXACT_SUMS:", "regions < 0:")],
    "slack helps the label": [
        ("torch.where(own, scores - slack, scores + slack)", "torch.where(own, scores + slack, scores - slack)")
    ],
    "slack counted for the label only": [("scores - slack, scores + slack)", "scores - slack, scores)")],
    "slack counted for the rivals only": [("torch.where(own, scores - slack, ", "torch.where(own, scores, ")],
    "slack upwards only": [
        ("torch.maximum(head(above) - scores, scores - head(below))", "head(above) - scores"),
    ],
    "NaN has no slack": [("return slack.masked_fill(~z.isfinite(), span)", "return slack")],
    "devices that cannot count trusted": [
        ("if (found := sums.tolist()) != expected:", "if not (found := sums.tolist()):")
    ],
}

FULL_PRECISION = {
    "reduced precision of products left on": [
        ("            _set(_FULL)\n            self._inside += 1", "            self._inside += 1")
    ],
    "precision put back while another thread sums": [
        ("_set(_FULL if self._inside else self._users)", "_set(self._users)")
    ],
    "a change of precision in another thread goes unnoticed": [("return self._changes == changes", "return True")],
}

MODEL_FOLDER = {
    "a normalization beside that of the config is accepted": [("in normalization(tensors, config):", "in ():")],
    "negative variances are accepted": [('if name.endswith("running_var") and', 'if name == "running_var" and')],
}

REGION_SCORER = {
    "deviations that float32 cannot divide by are accepted": [
        ("if not all(map(is_normal, std)):", "if not all(value > 0 for value in std):")
    ],
}

PROBES = {
    "NaN before and after has not moved": [
        ("moved = (before != after) & mask", "moved = (before != after) & ~(before.isnan() & after.isnan()) & mask")
    ],
    "scores that are not finite left out of the largest": [
        ("float(magnitude(scores).max())", "float(scores.abs().nan_to_num(0.0, 0.0, 0.0).max())")
    ],
    "what becomes infinite has moved a finite way": [
        (
            "values.double().abs().masked_fill(values.isnan(), torch.inf)",
            "values.double().abs().nan_to_num(nan=torch.inf)",
        )
    ],
}

REPORT = {
    "scores of clean images may be infinite": [("not self.is_finite or (self.nan_spreads", "(self.nan_spreads")],
}

OVERFLOW = {
    "the bound on activations with the sign of the deviation": [("centered / std.abs()", "centered / std")],
    "the bound on activations with the sign of the weights": [("take(parameter.abs_())", "take(parameter)")],
    "the bound on activations with the sign of running means": [(".abs_().neg_()", "")],
    "the bound on activations without the image": [("for value in (mean, centered, image):", "for value in ():")],
    "the bound on activations without the weights": [("take(parameter.abs_())", "parameter.abs_()")],
}

EXPORT_MODULE = {
    "a file certifies what is no image": [("margin = self.image_range.refuse(margin, in_range)", "")],
    "infinite scores have no slack in a file": [("torch.where(z.abs() <= LARGEST, ", "torch.where(~z.isnan(), ")],
}

IMAGE_RANGE = {
    "an image below the range is one": [("(images >= -ROUNDING) & ", "")],
    "an image above the range is one": [(" & (images <= 1 + ROUNDING)", "")],
    "an image with NaN is one": [
        (
            "fine = (images >= -ROUNDING) & (images <= 1 + ROUNDING)",
            "fine = ~((images < -ROUNDING) | (images > 1 + ROUNDING))",
        )
    ],
    "an image is one if any pixel is": [(".amin(1)", ".amax(1)")],
}

WINDOWS = {
    "an empty remainder counts as agreement": [
        ("missing.sum(1, keepdim=True)).any(1)", "missing.sum(1, keepdim=True)).all(1)")
    ],
    "gaps between allowed windows count as windows": [
        ("return values if self.gaps is None else values.masked_fill(self.gaps, fill)", "return values")
    ],
    "majority ties to the highest class": [
        (
            "lowest_argmax(counts[:, 1:])",
            "classes - 1 - lowest_argmax(counts[:, 1:].flip(1))",
        )
    ],
    "majority ties to the label seen first": [
        (
            "lowest_argmax(counts[:, 1:])",
            "labels.gather(1, lowest_argmax(counts.gather(1, labels + 1) * (labels >= 0))[:, None])[:, 0]",
        )
    ],
    "no label counts as a label in the majority": [
        ("lowest_argmax(counts[:, 1:]), otherwise", "lowest_argmax(counts).sub(1).clamp(min=0), otherwise")
    ],
    "the last image forgotten": [("range(0, count, step)", "range(0, count - 1, step)")],
    "the worst of the margins found, not the least": [('margin, "amin")', 'margin, "amax")')],
}

LEAD = "_own(sums, label) - sums - tie_penalty(label, score_map.classes)"

VOTE = {
    ">= for >: certified at margin -1": [("margin >= 0", "margin >= -1")],
    "> for >=: a margin of 0 is refused": [("margin >= 0", "margin > 0")],
    "ties forgotten in the margin of the vote": [(LEAD, "_own(sums, label) - sums")],
    "window damage without u": [("_own(sums, label) + span * windows.sizes", "_own(sums, label) + 0 * windows.sizes")],
    "u halved": [("+ span * windows.sizes", "+ span * windows.sizes // 2")],
    "the runner-up only": [
        (
            "margin[images], rival = left.min(1)",
            "rival = sums.scatter(1, label[:, None], -1).max(1).indices; margin[images] = _own(left, rival)[:, 0]",
        )
    ],
    "what the rival holds in the window forgotten": [
        ("windows.sizes)[:, None] - sums", "windows.sizes)[:, None] - 0 * sums")
    ],
    "what the label holds in the window forgotten": [("(_own(sums, label) + span", "(0 * _own(sums, label) + span")],
    "the last window missing": [
        ("damage.amax(2, keepdim=True)", "damage[..., : max(1, damage.shape[2] - 1)].amax(2, keepdim=True)")
    ],
    "the first window missing": [
        ("damage.amax(2, keepdim=True)", "damage[..., min(1, damage.shape[2] - 1) :].amax(2, keepdim=True)")
    ],
    "the weakest window": [("damage.amax(2, keepdim=True)", "damage.amin(2, keepdim=True)")],
    "K patches counted as one": [("_largest(damage, threat.patches)", "_largest(damage, 1)")],
    "the label its own rival": [("left.scatter_(1, label[:, None], torch.iinfo(torch.int64).max)", "pass")],
    "the worst placement is the best one": [
        (".sort(dim=1, descending=True, stable=True)", ".sort(dim=1, descending=False, stable=True)")
    ],
    "sums in half precision": [("sums = levels.sum((2, 3))\n", "sums = levels.half().sum((2, 3)).float()\n")],
}

LEVINE_FEIZI = {
    "factor 1 for 2": [("lead.amin(1) - 2 * score_map.span", "lead.amin(1) - 1 * score_map.span")],
    "counting: K patches counted as one": [("* threat.patches * sizes", "* sizes")],
    "counting: u forgotten": [("2 * score_map.span * threat", "2 * threat")],
    "counting: ties forgotten": [(" - tie_penalty(prediction, score_map.classes)", "")],
    "counting: the first window for the largest": [
        ("largest = lowest_argmax(sizes[None])", "largest = torch.tensor([0])")
    ],
    "counting: gaps count as windows": [(".masked_fill(~windows.keep, -1)", "")],
}

DETECTION = {
    "detection ignores alerts": [("score_map.classes) - most", "score_map.classes)")],
    "detection: ties forgotten": [(" - tie_penalty(label, score_map.classes) - most", " - most")],
    "detection: a mask over everything raises no alert": [("margin.clamp_(max=-1)", "pass")],
    "detection: the weakest mask": [(".max(2)\n            left", ".min(2)\n            left")],
}

MASK_SETS = {
    "masks: several patches treated as one": [("if threat.patches == 1:", "if threat.patches <= 2:")],
}

DOUBLE_MASKING = {
    "two windows that cover the map certify": [("margin.clamp_(max=-1)", "pass")],
    "a disagreer passes though a pair leaves nothing": [
        (
            "open_ = (first >= 0) & (first != answer[:, None]) & ~windows.completed",
            "open_ = (first >= 0) & (first != answer[:, None])",
        )
    ],
    "a mask over everything has a label": [
        ("unlabelled = ~windows.keep | (windows.sizes == levels[0, 0].numel())", "unlabelled = ~windows.keep")
    ],
    "gaps vote in the first round": [("unlabelled = ~windows.keep | ", "unlabelled = ")],
    "the plain prediction for the majority": [
        ("answer = majority(first, levels.shape[1], lowest_argmax(total))", "answer = lowest_argmax(total)")
    ],
    "no second round": [
        (
            "open_ = (first >= 0) & (first != answer[:, None]) & ~windows.completed",
            "open_ = torch.zeros_like(first, dtype=torch.bool)",
        )
    ],
    "a disagreer passes against any rival, not all": [("penalty).all(1)", "penalty).any(1)")],
    "ties forgotten in the second round": [
        (
            "penalty = tie_penalty(k, levels.shape[1]).to(levels.dtype)",
            "penalty = 0 * tie_penalty(k, levels.shape[1]).to(levels.dtype)",
        )
    ],
    "ties to the wrong side against the majority": [("(c < k).to(levels.dtype)", "(c > k).to(levels.dtype)")],
    "a lead must be more than the tie rule asks": [("- worst >= penalty", "- worst > penalty")],
    "the second mask that helps most, not the one that hurts most": [("-torch.inf).amax(-1)", "torch.inf).amin(-1)")],
    "the first mask forgotten in the second round": [
        ("outside = ~windows.masks[mask]", "outside = windows.masks[mask] > 1")
    ],
    "the prediction and certificate of the plain sum": [
        ("label = _prediction(windows, levels, total, sums)", "label = lowest_argmax(levels.sum((2, 3)))")
    ],
    "two patches masked as one": [
        (
            "    if threat.patches > 1:\n        return union_double_masking",
            "    if threat.patches > 2:\n        return union_double_masking",
        )
    ],
}

WINDOW_PAIRS = {
    "single masks only": [
        ("_greedy(windows, lead, base, removed, every, rival, best)", "pass"),
        ("_greedy(windows, lead, base, removed, image[open_], rival[open_], best)", "open_ = open_ & False"),
        ("    open_ = floor < best.margin[image]\n    image, rival, positive =", "    image, rival, positive ="),
    ],
    "a floor without the second mask": [
        ("floor = (base - single)[near] - positive.amax(1)", "floor = (base - single)[near]"),
    ],
    "a first floor without the second mask": [
        ("near = base - single - windows.without_gaps(own, -torch.inf).amax(1)[:, None] <", "near = base - single <"),
    ],
    "a floor of all classes without the second mask": [
        ("near = base - single - positive.amax(2) <", "near = base - single <"),
    ],
    "a bound from signed sums": [("windows.sums(lead.clamp(min=0))", "windows.sums(lead)")],
    "a bound from signed sums, few classes": [("windows.sums(lead[near].clamp(min=0))", "windows.sums(lead[near])")],
    "pairs: ties forgotten": [("[:, None] - total - tie_penalty(label, classes)", "[:, None] - total")],
    "pairs of one shape only": [("for second in blocks[first:]:", "for second in blocks[first : first + 1]:")],
    "pairs from the same rows left out": [("pairs.triu()", "pairs.triu(1)")],
    "what both windows hold counted twice": [("rows2[j] & ~rows[i]]", "rows2[j]]")],
    "columns of both windows for those of either": [("cols[a] | cols2[b]", "cols[a] & cols2[b]")],
    "gaps in pairs": [("if table.keep is not None:", "if table.keep is not None and not len(r):")],
    "the search ends with the greedy pair": [
        (
            "    open_ = floor < best.margin[image]\n    image, rival, positive =",
            "    open_ = floor < floor\n    image, rival, positive =",
        )
    ],
    "pairs: the label its own rival": [("base[every, label] = torch.inf", "pass")],
}

UNION_MASKING = {
    "unions without repetition": [
        (
            "list(combinations_with_replacement(kept, threat.patches))",
            "list(__import__('itertools').combinations(kept, threat.patches))",
        )
    ],
    "unions: two that cover the map certify": [("margin.clamp_(max=-1)", "pass")],
    "unions: a floor of K windows for 2K": [("_top(positive, 2 * patches)", "_top(positive, patches)")],
    "unions: a search of K windows for 2K": [("nothing, 2 * patches)", "nothing, patches)")],
    "unions: a mask over everything has a label": [(".masked_fill(unions.masks.all(1), -1)", "")],
    "unions: a disagreer passes though a pair leaves nothing": [(" & ~unions.completed\n", "\n")],
    "unions: ties to the wrong side against the majority": [(">= int(common < label)", ">= int(common > label)")],
    "unions: ties forgotten in the second round": [
        ("left = (lead * unions.outside[row]).sum(1) - penalty", "left = (lead * unions.outside[row]).sum(1)")
    ],
    "unions: the second mask that helps most": [
        ("unions.sums(lead * unions.outside[row]).max(1)", "unions.sums(lead * unions.outside[row]).min(1)")
    ],
    "unions: ties forgotten in the margin": [
        ("base = lead.sum(2) - tie_penalty(label, levels.shape[1])", "base = lead.sum(2)")
    ],
    "unions: a bound that forgets the last window": [("(remaining - 1) * ceiling", "(remaining - 2) * ceiling")],
    "unions: no limit on their number": [("if count > MOST_UNIONS:", "if count < 0:")],
}

LARGEST = {
    "largest certified side off by one": [("*(side - 1 for side in sides[1:])", "*(side for side in sides[1:])")],
    "largest certified side one window set too small": [
        ("last_px[_bisected(score_map, rule)]", "last_px[(_bisected(score_map, rule) - 1).clamp(min=0)]")
    ],
    "the largest side never tried": [
        ("high = torch.full_like(low, len(sides))", "high = torch.full_like(low, len(sides) - 1)")
    ],
    "certifiable with another label than the deployed one": [(" & (found.prediction == label[open_])", "")],
    "certifiable: the smallest side first": [
        ("in reversed(list(zip(sides, last_px, strict=True))):", "in list(zip(sides, last_px, strict=True)):")
    ],
    "largest: several patches counted as one": [
        ("_squares(score_map.grid, side, patches)).certified", "_squares(score_map.grid, side)).certified")
    ],
    "largest: several patches up to the first side that fails": [
        ("= number\n        open_ = open_[~holds]", "= number\n        open_ = open_[holds]"),
        (
            "in reversed(list(enumerate(distinct_sides(score_map.grid), 1))):",
            "in enumerate(distinct_sides(score_map.grid), 1):",
        ),
    ],
    "largest: a masking rule is worth its masks on every image": [
        ("return certificate.certified.long() *", "return torch.ones_like(certificate.margin) *")
    ],
    "covered where one reach is": [("if not covered.all():", "if not covered.any():")],
    "covered in rows or columns": [
        ("rows @ mask.keep @ cols.T", "(rows.any(1)[:, None] & mask.keep.any()) | cols.any(1)[None]")
    ],
    "a masked square covered where none fits": [("if _has_room(threat, middle) and _covers(", "if _covers(")],
}

IMAGES = {
    "an orientation applied twice": [("stored = _turned_back(stored, orientation)", "pass")],
    "a TIFF taken as Pillow turns it": [("stored = _turned_back(stored, orientation)", "orientation = 1")],
    "the orientation of a TIFF ignored": [
        (
            "return Photo(stored, orientation, name)",
            "return Photo(stored, 1 if image.format == 'TIFF' else orientation, name)",
        )
    ],
    "a turn undone in the order in which it was made": [
        (
            "stored = pixels.swapaxes(0, 1) if swapped else pixels\n",
            "rows_reversed, cols_reversed = (cols_reversed, rows_reversed)[:: 1 if swapped else -1]\n"
            "    stored = pixels.swapaxes(0, 1) if swapped else pixels\n",
        )
    ],
}

RECORD_FILE = {
    "resume by name alone": [("return source, json.dumps(image, sort_keys=True)", 'return source, ""')],
    "an image of a known name is never asked for its pixels": [
        ("        if key not in self._done:\n", "        if key not in self._done and not self._names:\n"),
        ("        if not self._done[key]:\n            return False\n", ""),
    ],
}

FOLLOWING = {
    "only one image is followed": [
        ("for image in (torch.zeros(shape), torch.ones(shape), noise, (noise - 0.5) * 1e30):", "for image in ():")
    ],
    "only images in batches of two are followed": [
        ("for number, images in enumerate(batch_sizes):", "for number, images in enumerate(()):")
    ],
    "what a network catches is not refused": [("if run.failure:  # the", "if None:  # the")],
    "changes from call to call go unnoticed": [("changed = self._after.changed()", "changed = None")],
    "what is prepared at the first call is not followed at the second": [
        ("if self._after is not self._before:", "if self._after is None:")
    ],
    "a network is not put back": [("self.layers.clear()\n        self._before.restore()", "self.layers.clear()")],
}

PASSES = {
    "NaN equals NaN among operands that do not come from the image": [
        (
            "    return torch.equal(a, b)",
            "    return torch.allclose(a.double(), b.double(), 0, 0, equal_nan=True)",
        )
    ],
    "memory of the image is known by its first address only": [
        ("begin < start + storage.nbytes() and start < end", "begin == start")
    ],
    "operands may be another one of the image's tensors": [("a.source != b.source", "False")],
    "the place in the batch may count": [
        ("if not torch.equal(first.expand_as(a), a) or not torch.equal(first.expand_as(b), b):", "if False:")
    ],
    "random numbers in eval mode are accepted": [("torch.Tag.nondeterministic_seeded in func.tags", "False")],
}

OPERATIONS = {
    "an empty dim is no dimension": [("dims = dims or range(input.ndim)", "dims = dims")],
    "a bool is a dimension": [("type(dim) is not int for dim", "not isinstance(dim, int) for dim")],
}

INTERVAL_LAYERS = {
    "hooks on layers that do nothing go unnoticed": [
        ("_altered(layer) or _unbounded(layer)", "_unbounded(layer) or (type(layer) in _BOUNDED and _altered(layer))")
    ],
    "hooks before a layer go unnoticed": [("layer._forward_hooks or layer._forward_pre_hooks", "layer._forward_hooks")],
    "hooks on all modules go unnoticed": [
        ("all_modules._global_forward_hooks or all_modules._global_forward_pre_hooks", "False")
    ],
    "a replaced forward goes unnoticed": [("    if replaced:", "    if None:")],
    "layers within a layer are taken to follow it": [("any(child is not None for child in layer.children())", "False")],
    "a negative standard deviation narrows the box": [("x / layer.std.abs()", "x / layer.std")],
}

ATTENTION_MASKING = {
    "regions in both windows of a pair left out twice": [
        ("            sums[: len(block.number)] += both.index_select(0, block.number)\n", "")
    ],
    "a pair skipped between two blocks": [("rank = torch.arange(start, min", "rank = torch.arange(start + 1, min")],
    "no pairs at all": [("for block, rows in masks.pair_sums(evidence[k], sums[k]):", "for block, rows in ():")],
    "ties cost nothing between readouts": [("scores - tie_penalty(label, scores.shape[2])[:, None]", "scores")],
    "nothing kept counts as agreement of a pair": [
        (
            "    if bool(masks.completed.any()):\n        margin.clamp_(max=-1)\n    placement = masks.p",
            "    placement = masks.p",
        )
    ],
    "nothing kept counts as agreement of a mask": [("if bool(masks.whole.any()):", "if False:")],
    "any disagreeing mask decides": [
        ("== first[image, mask][:, None]).all(1)", "== first[image, mask][:, None]).any(1)")
    ],
}

AGGREGATION = {
    "halves rounded up": [
        ("total.div(weight).round_()", "total.div(weight).add_(0.5).floor_()"),
    ],
    "hidden values not clipped": [(".round_().clamp_(0, POOLED_LIMIT)", ".round_().clamp_(min=0)")],
    "pooled values not clipped": [(".clamp_(-POOLED_LIMIT, POOLED_LIMIT)", "")],
    "readouts accepted whose sums round": [(">= 2**23", ">= 2**60")],
    "pooled in float32 whatever the map": [("if regions * PRODUCT_LIMIT < 2**24 else torch.float64", "")],
}

MUTANTS = [
    Mutant(name, tuple((file, text, replacement) for text, replacement in edits))
    for file, mistakes in {
        "data/photo.py": IMAGES,
        "proofs/file.py": RECORD_FILE,
        "threat.py": THREAT | RECTANGLES,
        "aggregation.py": AGGREGATION,
        "rules/attention_masking.py": ATTENTION_MASKING,
        "proofs/claim.py": CLAIM,
        "proofs/maps.py": MAPS,
        "proofs/verify.py": VERIFY,
        "grid.py": GRID,
        "scores.py": SCORES,
        "devices.py": FULL_PRECISION,
        "nets/saved_model.py": MODEL_FOLDER,
        "nets/region_scorer.py": REGION_SCORER,
        "locality/probes.py": PROBES,
        "locality/report.py": REPORT,
        "locality/activation_bound.py": OVERFLOW,
        "exporting/module.py": EXPORT_MODULE,
        "exporting/image_range.py": IMAGE_RANGE,
        "rules/masks.py": WINDOWS,
        "rules/guard.py": GUARD,
        "rules/vote.py": VOTE,
        "rules/levine_feizi.py": LEVINE_FEIZI,
        "rules/detection.py": DETECTION,
        "rules/mask_sets.py": MASK_SETS,
        "rules/double_masking.py": DOUBLE_MASKING,
        "rules/window_pairs.py": WINDOW_PAIRS,
        "rules/union_masking.py": UNION_MASKING,
        "rules/largest.py": LARGEST,
        "nets/receptive_field/derive.py": FOLLOWING,
        "nets/receptive_field/passes.py": PASSES,
        "nets/receptive_field/operations.py": OPERATIONS,
        "defenses/interval_layers.py": INTERVAL_LAYERS,
    }.items()
    for name, edits in mistakes.items()
]
