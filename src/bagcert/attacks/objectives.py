"""What an attack minimizes: smooth enough stand-ins for the prediction of each rule, in units of the score map.

All are of the form max over c' != c of S_c' - S_c for a class c that the attack wants on top, with S the class scores
of some part of the map (its sums, or what a readout makes of them); the prediction of a rule changes only where such
leads turn negative. With the masks m of double masking (docs/method.md, "Double masking") there are two ways to another
answer:

- `every-mask`: c wins outside every mask, given one mask that is left out all the time. Outside a fixed disagreer
  that is its second round, with no fixed mask it is the unanimous first round (and, for detection, no alert).
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
_MOST = 0.6  # the share of masks that must be won for a safe majority

# The kinds that successive restarts use.
KINDS: dict[str, tuple[Kind, ...]] = {
    "double-masking": ("every-mask", "most-masks"),
    "detection": ("every-mask",),
}


def kinds_for(rule: str) -> tuple[Kind, ...]:
    """The objectives against a rule; the plain sum where nothing better is known."""
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
    """What to minimize, differentiable; below 0 the part of the prediction it stands for has changed.

    Args:
        label: the clean answer.
        rival: the class wanted on top; UNTARGETED for any but the label (for the sum only).
        windows: the masks.
        left_out: a mask that is left out all the time, by its index; -1 for none.
        class_scores: of a surrogate, from sums over kept regions; the sums themselves where maps hold class scores.
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
    """Max over c' != c of S_c' - S_c for each row's class c."""
    index = rival.view(-1, 1, *[1] * (sums.ndim - 2)).expand(-1, 1, *sums.shape[2:])
    return sums.scatter(1, index, -torch.inf).amax(1) - sums.gather(1, index)[:, 0]
