"""Training losses: differentiable versions of the certification conditions. See docs/method.md, "Training".

All take region scores [batch, classes, rows, cols] and labels [batch] and return one loss per image [batch]. Those
with cross-entropies take target probabilities [batch, classes] as well.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bagcert.grid import WindowBlock
from bagcert.scores import window_sums
from bagcert.training.random import Source, draw

Scores = Float[Tensor, "batch classes rows cols"]
Labels = Int[Tensor, " batch"]
Losses = Float[Tensor, " batch"]
Targets = Float[Tensor, "batch classes"] | None
"""Class probabilities that replace the labels in cross-entropies, such as those of a teacher."""


def mean_scores(scores: Scores) -> Float[Tensor, "batch classes"]:
    """`S_c / (m n)`."""
    return scores.float().mean((2, 3))


def margin_loss(scores: Scores, labels: Labels, margin: float) -> Losses:
    """BagCert's hinge `max(0, M - min_{c != y} (S_y - S_c) / (m n))`, on scores in [0, 1]."""
    means = mean_scores(scores)
    truth = means.gather(1, labels[:, None])[:, 0]
    rivals = means.scatter(1, labels[:, None], -torch.inf)
    return (margin - (truth - rivals.amax(1))).clamp(min=0)


def smooth_margin_loss(
    scores: Scores,
    labels: Labels,
    margin: float,
    temperature: float,
    label_smoothing: float = 0.0,
    targets: Targets = None,
) -> Losses:
    """The hinge's smooth form `CE(tau * (S / (m n) - M * onehot(y)))`."""
    shifted = mean_scores(scores) - margin * F.one_hot(labels, scores.shape[1])
    return _cross_entropy(temperature * shifted, labels, label_smoothing, targets)


def cross_entropy_loss(scores: Scores, labels: Labels, label_smoothing: float = 0.0, targets: Targets = None) -> Losses:
    """Cross-entropy of the mean scores, for training without certification."""
    return _cross_entropy(mean_scores(scores), labels, label_smoothing, targets)


def clipped_loss(scores: Scores, labels: Labels, temperature: float = 12.0, label_smoothing: float = 0.0) -> Losses:
    """`CE(tau * mean of tanh(0.05 z - 1))`: scores as Clipped BagNet deploys them (Zhang et al., DLS 2020)."""
    return cross_entropy_loss(temperature * torch.tanh(0.05 * scores.float() - 1), labels, label_smoothing)


def masked_features_loss(
    scores: Scores,
    labels: Labels,
    windows: Float[Tensor, "windows rows cols"],
    generator: Source,
    label_smoothing: float = 0.0,
) -> Losses:
    """Cross-entropy of the mean scores outside one random window of each map.

    Args:
        windows: windows from `window_masks`, drawn uniformly.

    Source: Xiang et al., "PatchGuard", USENIX Security 2021, section 4.
    """
    drawn = draw(len(windows), len(scores), generator)
    return F.cross_entropy(
        _kept_means(scores, 1 - windows[drawn]), labels, reduction="none", label_smoothing=label_smoothing
    )


def window_masks(windows: Sequence[WindowBlock], device: torch.device) -> Float[Tensor, "windows rows cols"]:
    """Returns a mask per window: 1 in its regions, 0 elsewhere."""
    masks = [
        np.outer(block.rows[row], block.cols[col]) for block in windows for row, col in np.argwhere(block.keep).tolist()
    ]
    return torch.as_tensor(np.stack(masks), dtype=torch.float32, device=device)


def one_hot_penalty(scores: Scores) -> Losses:
    """Penalty on regions that vote for several classes: the mean over regions of `max(0, sum_c s_c - 1)`."""
    return (scores.float().sum(1) - 1).clamp(min=0).mean((1, 2))


def double_masking_loss(
    scores: Scores,
    labels: Labels,
    windows: Sequence[WindowBlock],
    full_weight: float = 0.3,
    label_smoothing: float = 0.0,
    temperature: float = 1.0,
    targets: Targets = None,
) -> Losses:
    """`CE(mean of kept scores) + full_weight * CE(mean of all scores)`; kept scores exclude the two worst windows.

    The windows are chosen greedily from the map: first the one that supports the label most against its runner-up,
    then the next. This needs no extra forward pass.
    """
    scores = scores.float()
    keep = two_worst_windows_removed(scores.detach(), labels, windows)
    kept = _kept_means(scores, keep)
    loss = _cross_entropy(temperature * kept, labels, label_smoothing, targets)
    full = _cross_entropy(temperature * scores.mean((2, 3)), labels, label_smoothing, targets)
    return loss + full_weight * full


def _cross_entropy(logits: Tensor, labels: Tensor, label_smoothing: float, targets: Targets) -> Tensor:
    """Cross-entropy of each image [batch], with `targets` instead of the labels if they are given."""
    return F.cross_entropy(
        logits, labels if targets is None else targets, reduction="none", label_smoothing=label_smoothing
    )


def _kept_means(scores: Tensor, keep: Tensor) -> Tensor:
    """Mean scores [batch, classes] over the regions where `keep` [batch, rows, cols] is 1."""
    return (scores.float() * keep[:, None]).sum((2, 3)) / keep.sum((1, 2)).clamp(min=1)[:, None]


@torch.no_grad()
def two_worst_windows_removed(
    scores: Scores, labels: Labels, windows: Sequence[WindowBlock]
) -> Float[Tensor, "batch rows cols"]:
    """Returns a mask that is 0 in the two windows whose removal hurts the label most (greedy), and 1 elsewhere."""
    sums = scores.sum((2, 3)).scatter(1, labels[:, None], -torch.inf)
    images = torch.arange(len(scores), device=scores.device)
    lead = scores[images, labels] - scores[images, sums.argmax(1)]
    keep = torch.ones_like(lead)
    for _ in range(2):
        best = torch.full((len(scores),), -torch.inf, device=scores.device)
        removed = torch.zeros_like(keep)
        for block in windows:
            rows = torch.as_tensor(block.rows, dtype=lead.dtype, device=lead.device)
            cols = torch.as_tensor(block.cols, dtype=lead.dtype, device=lead.device)
            allowed = torch.as_tensor(block.keep, device=lead.device)
            helped = window_sums(lead * keep, block).masked_fill(~allowed, -torch.inf).flatten(1)
            value, index = helped.max(1)
            window = rows[index // len(cols)][:, :, None] * cols[index % len(cols)][:, None, :]
            removed = torch.where((value > best)[:, None, None], window, removed)
            best = torch.maximum(best, value)
        keep = keep * (1 - removed)
    return keep
