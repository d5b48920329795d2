"""Training objectives against computations in plain numpy, written from the formulas."""

import itertools

import numpy as np
import pytest
import torch

from bagcert.grid import RegionGrid
from bagcert.nets.heads import BinaryHead
from bagcert.threat import PatchThreatModel
from bagcert.training import losses

BATCH, CLASSES, ROWS, COLS = 5, 4, 4, 5
LABELS = [0, 3, 1, 1, 2]


def scores_of(seed=0, binary=False, classes=CLASSES, rows=ROWS, cols=COLS):
    values = np.random.default_rng(seed).normal(size=(BATCH, classes, rows, cols)).astype(np.float32)
    return (values > 0).astype(np.float32) if binary else values


def windows_of(rows=ROWS, cols=COLS, patch="2", receptive_field=2, allowed=None):
    """The maximal windows of a map of stride 1 without padding."""
    size = (rows + receptive_field - 1, cols + receptive_field - 1)
    grid = RegionGrid.from_axis(receptive_field, 1, 0, size)
    assert grid.map_size == (rows, cols)
    return grid.windows(PatchThreatModel.parse(patch, size, allowed))


def boxes_of(windows):
    """Every window as the set of its regions, block by block, row windows first."""
    boxes = []
    for block in windows:
        for i, j in itertools.product(range(len(block.rows)), range(len(block.cols))):
            if block.keep[i, j]:
                boxes.append({(a, b) for a in np.flatnonzero(block.rows[i]) for b in np.flatnonzero(block.cols[j])})
    return boxes


def cross_entropy(logits, label, smoothing=0.0):
    """-sum_c q_c log p_c with q = (1 - smoothing) onehot + smoothing / classes."""
    logits = np.asarray(logits, dtype=np.float64)
    log_p = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
    q = np.full(len(logits), smoothing / len(logits))
    q[label] += 1 - smoothing
    return -(q * log_p).sum()


def greedy_kept(scores, label, boxes):
    """Boolean [rows, cols] of one image: what is left after taking out the most helpful window, twice."""
    sums = [scores[c].astype(np.float64).sum() for c in range(len(scores))]
    rival = max((c for c in range(len(scores)) if c != label), key=lambda c: (sums[c], -c))
    left = {(a, b) for a in range(scores.shape[1]) for b in range(scores.shape[2])}
    for _ in range(2):
        gains = [sum(float(scores[label][p] - scores[rival][p]) for p in box & left) for box in boxes]
        left -= boxes[gains.index(max(gains))]
    kept = np.zeros(scores.shape[1:], dtype=bool)
    for place in left:
        kept[place] = True
    return kept


def torches(scores):
    return torch.from_numpy(scores), torch.tensor(LABELS)


def close(found, expected):
    assert found.shape == (BATCH,)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_binary_head_forward_is_the_step(dtype):
    z = torch.linspace(-8, 8, 4001, dtype=dtype).view(1, 1, 1, -1)
    hard = BinaryHead().straight_through(z)
    assert hard.dtype == dtype
    assert torch.equal(hard, (z > 0).to(dtype))
    assert hard.unique().tolist() == [0.0, 1.0]


def test_binary_head_backward_is_that_of_the_sigmoid():
    z = torch.linspace(-6, 6, 101, dtype=torch.float64).view(1, 1, 1, -1).requires_grad_()
    weight = torch.rand(101, dtype=torch.float64)
    (BinaryHead().straight_through(z) * weight).sum().backward()
    sigmoid = 1 / (1 + np.exp(-z.detach().numpy()))
    np.testing.assert_allclose(z.grad.numpy(), weight.numpy() * sigmoid * (1 - sigmoid), rtol=1e-12)


@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("margin", [0.1, 0.4, 1.0])
def test_margin_loss_is_the_hinge_on_the_smallest_lead(binary, margin):
    scores = scores_of(binary=binary)
    expected = []
    for image, label in zip(scores, LABELS, strict=True):
        leads = [(image[label].sum() - image[c].sum()) / (ROWS * COLS) for c in range(CLASSES) if c != label]
        expected.append(max(0.0, margin - min(leads)))
    close(losses.margin_loss(*torches(scores), margin), expected)


def test_margin_loss_vanishes_from_the_margin_on():
    scores = torch.zeros(1, 2, 4, 5)
    scores[0, 1].view(-1)[:8] = 1  # a lead of 8 of 20 regions
    label = torch.tensor([1])
    assert losses.margin_loss(scores, label, 0.4).item() == pytest.approx(0.0, abs=1e-7)
    assert losses.margin_loss(scores, label, 0.5).item() == pytest.approx(0.1)
    assert losses.margin_loss(scores, 1 - label, 0.5).item() == pytest.approx(0.9)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_smooth_margin_loss_is_a_shifted_cross_entropy(smoothing):
    scores = scores_of(binary=True)
    expected = []
    for image, label in zip(scores, LABELS, strict=True):
        logits = [12.0 * (image[c].mean() - 0.4 * (c == label)) for c in range(CLASSES)]
        expected.append(cross_entropy(logits, label, smoothing))
    close(losses.smooth_margin_loss(*torches(scores), 0.4, 12.0, smoothing), expected)


def test_one_hot_penalty_counts_the_classes_beyond_one():
    scores = scores_of(binary=True)
    expected = []
    for image in scores:
        extra = [max(0.0, image[:, a, b].sum() - 1) for a in range(ROWS) for b in range(COLS)]
        expected.append(sum(extra) / len(extra))
    assert min(expected) > 0
    close(losses.one_hot_penalty(torch.from_numpy(scores)), expected)
    one_hot = torch.zeros(2, 3, 2, 2)
    one_hot[:, 1] = 1
    assert losses.one_hot_penalty(one_hot).tolist() == [0, 0]


def check_greedy(scores, windows):
    kept = losses.two_worst_windows_removed(*torches(scores), windows)
    assert kept.shape == (BATCH, ROWS, COLS)
    for found, image, label in zip(kept, scores, LABELS, strict=True):
        np.testing.assert_array_equal(found.numpy().astype(bool), greedy_kept(image, label, boxes_of(windows)))


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("binary", [True, False])
@pytest.mark.parametrize("patch", ["1", "2", "1x3", "1x3+3x1"])
def test_two_worst_windows_are_the_greedy_ones(seed, binary, patch):
    # Quarters add up exactly, so that ties are ties in both.
    check_greedy(np.round(scores_of(seed, binary) * 4) / 4, windows_of(patch=patch))


def test_two_worst_windows_are_allowed():
    allowed = np.zeros((5, 6), dtype=bool)
    allowed[:3, :3] = True
    check_greedy(np.round(scores_of(3) * 4) / 4, windows_of(allowed=allowed))


def test_two_worst_windows_take_no_gradient():
    scores, labels = torches(scores_of())
    assert not losses.two_worst_windows_removed(scores.requires_grad_(), labels, windows_of()).requires_grad


@pytest.mark.parametrize(("full_weight", "smoothing", "temperature"), [(0.3, 0.0, 1.0), (0.0, 0.1, 1.0), (1, 0.1, 7)])
def test_double_masking_loss_is_the_formula(full_weight, smoothing, temperature):
    scores, windows = np.round(scores_of(1) * 4) / 4, windows_of()
    expected = []
    for image, label in zip(scores, LABELS, strict=True):
        kept = greedy_kept(image, label, boxes_of(windows))
        masked = [temperature * image[c][kept].mean() for c in range(CLASSES)]
        whole = [temperature * image[c].mean() for c in range(CLASSES)]
        expected.append(cross_entropy(masked, label, smoothing) + full_weight * cross_entropy(whole, label, smoothing))
    arguments = (windows, float(full_weight), smoothing, float(temperature))
    close(losses.double_masking_loss(*torches(scores), *arguments), expected)


def test_double_masking_loss_where_nothing_is_left():
    windows = windows_of(2, 2, patch="3", receptive_field=2)
    scores, labels = torches(scores_of(rows=2, cols=2))
    scores.requires_grad_()
    loss = losses.double_masking_loss(scores, labels, windows)
    loss.sum().backward()
    assert loss.isfinite().all()
    assert scores.grad.isfinite().all()


@pytest.mark.parametrize("binary", [True, False])
def test_double_masking_loss_falls(binary):
    z, labels = torches(scores_of(2))
    windows = windows_of()

    def loss_of(z):
        return losses.double_masking_loss(BinaryHead().straight_through(z) if binary else z, labels, windows)

    first = loss_of(z).mean().item()
    for _ in range(20):
        z = z.detach().requires_grad_()
        loss_of(z).mean().backward()
        z = z - (200.0 if binary else 5.0) * z.grad
    assert loss_of(z).mean().item() < 0.8 * first


@pytest.mark.parametrize("name", ["margin", "smooth-margin", "one-hot", "double-masking"])
def test_loss_does_not_depend_on_the_batch(name):
    windows = windows_of()
    loss = {
        "margin": lambda s, y: losses.margin_loss(s, y, 0.4),
        "smooth-margin": lambda s, y: losses.smooth_margin_loss(s, y, 0.4, 12.0),
        "one-hot": lambda s, y: losses.one_hot_penalty(s),
        "double-masking": lambda s, y: losses.double_masking_loss(s, y, windows),
    }[name]
    scores, labels = torches(scores_of(4))
    together = loss(scores, labels)
    assert together.shape == (BATCH,)
    alone = torch.cat([loss(scores[i : i + 1], labels[i : i + 1]) for i in range(BATCH)])
    torch.testing.assert_close(together, alone)


def test_cross_entropy_and_clipped_are_of_mean_scores():
    scores = scores_of(5)
    expected = [cross_entropy(image.mean((1, 2)), label, 0.1) for image, label in zip(scores, LABELS, strict=True)]
    close(losses.cross_entropy_loss(*torches(scores), 0.1), expected)
    squeezed = 12 * np.tanh(0.05 * 40 * scores - 1)
    expected = [cross_entropy(image.mean((1, 2)), label, 0.1) for image, label in zip(squeezed, LABELS, strict=True)]
    close(losses.clipped_loss(*torches(40 * scores), 12.0, 0.1), expected)


def test_masked_features_loss_leaves_out_one_window():
    """Every value is that of one window, and over many draws each window comes up."""
    scores, windows = scores_of(6), windows_of()
    boxes = boxes_of(windows)
    table = np.empty((BATCH, len(boxes)))
    for image, label in enumerate(LABELS):
        for number, box in enumerate(boxes):
            kept = np.array([[(a, b) not in box for b in range(COLS)] for a in range(ROWS)])
            table[image, number] = cross_entropy(scores[image][:, kept].mean(1), label)
    masks = losses.window_masks(windows, torch.device("cpu"))
    generator, seen = torch.Generator().manual_seed(0), set()
    for _ in range(60):
        values = losses.masked_features_loss(*torches(scores), masks, generator).numpy()
        gaps = np.abs(table - values[:, None])
        assert gaps.min(1).max() < 1e-5
        seen |= set(gaps.argmin(1).tolist())
    assert seen == set(range(len(boxes)))


def test_masked_features_masks_are_the_windows():
    masks = losses.window_masks(windows_of(), torch.device("cpu"))
    found = [{tuple(place) for place in mask.nonzero().tolist()} for mask in masks]
    assert found == boxes_of(windows_of())
