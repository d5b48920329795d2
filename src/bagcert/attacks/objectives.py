"""Differentiable objectives that attacks minimize, in units of the score map.

All objectives have the form max over c' != c of S_c' - S_c for a target class c, where S are the class scores of some
part of the map (its sums, or the output of a readout). The prediction of a rule changes only if such leads become
negative. For the masks m of double masking (docs/method.md, "Double masking") there are two ways to change the
prediction:

- `every-mask`: c wins outside every mask, optionally with one fixed mask applied in addition. With a fixed mask, this
  is its second round; without one, it is a unanimous first round (and, for detection, the absence of an alert).
- `most-masks`: c wins outside most masks and becomes the majority.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from bagcert.rules.masks import Windows

Kind = Literal["sum", "every-mask", "most-masks"]

UNTARGETED = -1
_MOST = 0.6  # share of masks that the target class must win to be a safe majority

# The objectives used by successive restarts.
KINDS: dict[str, tuple[Kind, ...]] = {
    "double-masking": ("every-mask", "most-masks"),
    "detection": ("every-mask",),
}


def kinds_for(rule: str) -> tuple[Kind, ...]:
    """The objectives against a rule; the plain sum by default."""
    return KINDS.get(rule, ("sum",))


def objective(
    kind: Kind,
    maps: Float[Tensor, "rows channels m n"],
    label: Int[Tensor, " rows"],
    rival: Int[Tensor, " rows"],
    windows: Windows | None = None,
    left_out: Int[Tensor, " rows"] | None = None,
    class_scores: Callable[[Tensor], Tensor] = lambda sums: sums,
) -> Float[Tensor, " rows"]:
    """Compute the objective of each row; below 0, the corresponding condition for a changed prediction holds.

    Args:
        rival: the target class; UNTARGETED for any class except the label (only for the sum).
        left_out: index of a mask that is applied in addition; -1 for none.
        class_scores: function from sums over kept regions to class scores; the identity if maps contain class scores.
    """
    if kind != "sum" and windows is not None:
        if left_out is not None and kind == "every-mask":
            fixed = windows.masks[left_out.clamp(min=0)] & (left_out >= 0)[:, None, None]
            maps = maps * ~fixed[:, None]
        sums = maps.sum((2, 3))[..., None] - windows.sums(maps)
        leads = _lead(class_scores(sums.mT).mT, rival)
        kept = leads[:, windows.keep]
        if kind == "every-mask":
            return kept.amax(1)
        return kept.kthvalue(min(kept.shape[1], int(_MOST * kept.shape[1]) + 1), dim=1).values
    total = class_scores(maps.sum((2, 3)))
    own = total.gather(1, label[:, None])[:, 0]
    free = own - total.scatter(1, label[:, None], -torch.inf).amax(1)
    return torch.where(rival == UNTARGETED, free, _lead(total, rival.clamp(min=0)))


def _lead(sums: Float[Tensor, "rows classes *masks"], rival: Int[Tensor, " rows"]) -> Tensor:
    """Compute max over c' != c of S_c' - S_c for the class c of each row."""
    index = rival.view(-1, 1, *[1] * (sums.ndim - 2)).expand(-1, 1, *sums.shape[2:])
    return sums.scatter(1, index, -torch.inf).amax(1) - sums.gather(1, index)[:, 0]
