"""What a defence around an ordinary classifier is asked: images, an attacker and a rule, checked in one place."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from bagcert.data.photo import as_batch
from bagcert.errors import UsageError
from bagcert.threat import PatchLike, PatchThreatModel


def read_question(
    images: np.ndarray | Tensor,
    deployed: PatchLike,
    patch: PatchLike | None,
    own_rule: str,
    rule: str | None,
    placements: np.ndarray | str | Path | None,
    device: torch.device,
) -> tuple[Float[Tensor, "batch 3 height width"], PatchThreatModel]:
    """The images as the network takes them, on its device, and the threat model for their size.

    Args:
        images: as for `as_batch`.
        deployed, patch: the defence's own patch, and the one asked about or None.
        own_rule, rule: the name of the defence's only rule, and the one asked for or None.
        placements: where patches may lie; everywhere when absent.
        device: where the network is.

    Raises:
        UsageError: bad images or patch, or another rule.
    """
    if rule not in (None, own_rule):
        raise UsageError(f"this defence has no rule {rule!r}; leave it out, or give {own_rule!r}")
    chosen = deployed if patch is None else patch
    if isinstance(chosen, PatchThreatModel) and placements is not None:
        raise UsageError("a threat model has its own allowed placements; give them there, not beside it")
    batch = as_batch(images).to(device)
    return batch, PatchThreatModel.parse(chosen, (batch.shape[2], batch.shape[3]), placements)
