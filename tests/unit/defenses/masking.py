"""The definitions of masking on pixels in plain loops, sharing no code with the package, and tiny networks."""

from itertools import combinations_with_replacement, product

import numpy as np
import torch
from torch import nn

SIZE = (6, 6)
NAMES = ("a", "b", "c")


def axis_rule(image, patch, masks):
    """PatchCleanser's mask set per axis, word for word."""
    stride = -(-(image - patch + 1) // masks)
    side = patch + stride - 1
    starts = []
    for i in range(masks):
        start = min(i * stride, image - side)
        if start not in starts:
            starts.append(start)
    return starts, side


def rectangles(axes_per_shape):
    """Products of per-axis masks `(starts, side)`, in the order (shape, top, left)."""
    found = []
    for (tops, height), (lefts, width) in axes_per_shape:
        for top, left in product(tops, lefts):
            if (top, left, height, width) not in found:
                found.append((top, left, height, width))
    return found


def union_of(members, size=SIZE):
    """Boolean [height, width]: the pixels under some rectangle."""
    mask = np.zeros(size, dtype=bool)
    for top, left, height, width in members:
        mask[top : top + height, left : left + width] = True
    return mask


def mask_unions(found, patches, size=SIZE):
    """Boolean masks of all unions of `patches` rectangles."""
    return [union_of(members, size) for members in combinations_with_replacement(found, patches)]


def placements(size, shapes):
    found = []
    for h, w in shapes:
        found += [(top, left, h, w) for top, left in product(range(size[0] - h + 1), range(size[1] - w + 1))]
    return found


def label_of(model, image, mask, fill=0.5):
    """The label of one masked image [3, height, width]; None where the mask leaves no pixel."""
    if mask.all():
        return None
    masked = image.copy()
    masked[:, mask] = fill
    with torch.no_grad():
        logits = model(torch.from_numpy(masked)[None])[0].tolist()
    return logits.index(max(logits))


def pair_table(model, image, masks, fill=0.5):
    known = {}

    def label(mask):
        if mask.tobytes() not in known:
            known[mask.tobytes()] = label_of(model, image, mask, fill)
        return known[mask.tobytes()]

    return [[label(one | two) for two in masks] for one in masks]


def double_masking(table, plain):
    """Prediction and certificate from a table of labels per pair of masks, as docs/method.md defines them."""
    first = [table[m][m] for m in range(len(table))]
    labels = [label for label in first if label is not None]
    certified = len({label for row in table for label in row}) == 1 and None not in table[0]
    if not labels:
        return plain, False
    if len(set(first)) == 1:
        return first[0], certified
    common = min(set(labels), key=lambda label: (-labels.count(label), label))
    for m, label in enumerate(first):
        if label is not None and label != common and all(other == label for other in table[m]):
            return label, certified
    return common, certified


def contents(random, count):
    """Patch contents [count, 3, 1 to 6, 1 to 6 px]: black, white, colors, noise, extremes."""
    corners = [np.full((3, *SIZE), 1.0) * np.array(bits)[:, None, None] for bits in product((0, 1), repeat=3)]
    noise = list(random.random((count, 3, *SIZE)))
    extreme = list(random.integers(0, 2, (count, 3, *SIZE)).astype(float))
    return np.stack(corners + noise + extreme).astype(np.float32)


def attacked(image, places, content):
    """Every content at one attack, a list of placements: [contents, 3, height, width]."""
    images = np.repeat(image[None], len(content), 0)
    for k, (top, left, h, w) in enumerate(places):
        source = np.roll(content, k, axis=0)  # another content for each patch
        images[:, :, top : top + h, left : left + w] = source[:, :, :h, :w]
    return images


def network(seed, width=6, noise=0.1):
    """A small convolutional network that sums each channel, and some noise of every pixel."""
    torch.manual_seed(seed)
    conv, linear = nn.Conv2d(3, width, 3, padding=1), nn.Linear(width * 9, len(NAMES))
    with torch.no_grad():
        conv.weight.mul_(noise * 5)
        conv.bias.mul_(0)
        linear.weight.mul_(noise * 5)
        linear.bias.mul_(0)
        for k in range(3):
            conv.weight[k, k, 1, 1] += 1
            linear.weight[k, k * 9 : k * 9 + 9] += 1 / 9
    return nn.Sequential(conv, nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), linear).eval()


def images(seed, count):
    """From nearly plain to nearly noise, so that some are certified and some are not."""
    random = np.random.default_rng(seed)
    plain = random.random((count, 3, 1, 1))
    noise = random.random((count, 3, *SIZE))
    strength = np.linspace(0, 1, count).reshape(count, 1, 1, 1)
    return (plain * (1 - strength) + noise * strength).astype(np.float32)


def example(seed, count, noise=0.1):
    """A network and images on which its logits are 0 on average, so that masks and patches change labels."""
    model, batch = network(seed, noise=noise), images(seed, count)
    with torch.no_grad():
        model[-1].bias -= model(torch.from_numpy(batch)).mean(0)
    return model, batch
