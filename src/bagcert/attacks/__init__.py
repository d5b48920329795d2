"""Patch attacks: the upper bound on certified accuracy, and the test that no certificate may fail.

An attack is one module with a function of the form `Attack` and one line in `ATTACKS`. It sees the whole defence
(white box), but success is decided by `Victim.submit`, at the front door of the defence, on uint8 images.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from bagcert.attacks.gradient import gradient
from bagcert.attacks.random_content import random_content
from bagcert.attacks.result import AttackRecord, AttackResult
from bagcert.attacks.score_map import score_map
from bagcert.attacks.settings import Attack, OnProgress, Settings
from bagcert.attacks.transfer import transfer
from bagcert.attacks.victim import Victim, check_images
from bagcert.defenses.base import Defense
from bagcert.errors import UsageError, nearest
from bagcert.threat import PatchThreatModel

__all__ = ["ATTACKS", "Attack", "AttackRecord", "AttackResult", "Settings", "Victim", "attack", "get_attack"]

ATTACKS: dict[str, Attack] = {
    "random": random_content,
    "gradient": gradient,
    "score-map": score_map,
    "transfer": transfer,
}
"""The attacks by name, in the order in which they are tried: the cheap ones first, transfer after those it feeds on."""


def get_attack(name: str) -> Attack:
    """The attack of that name.

    Raises:
        UsageError: there is none.
    """
    if name not in ATTACKS:
        raise UsageError(f"unknown attack {name!r}{nearest(name, ATTACKS)}")
    return ATTACKS[name]


def attack(
    defense: Defense,
    images: np.ndarray,
    labels: np.ndarray | Sequence[int],
    patch: int | str | tuple[int, int] | PatchThreatModel,
    *,
    rule: str | None = None,
    attacks: Sequence[str] = (),
    seed: int = 0,
    settings: Settings | None = None,
    library: list[Tensor] | None = None,
    on_progress: OnProgress = lambda share: None,
) -> AttackResult:
    """Attacks a deployed defence on a batch of images with patches.

    Args:
        defense: any `Defense`; attacks with gradients know `BagCert` and `Undefended` only.
        images: uint8 [batch, height, width, channels], of the size the network is meant for.
        labels: true labels [batch], for the accuracies alone; attacks aim at another answer than the clean one.
        patch: the attacker, in the notation of `PatchThreatModel.parse`. For masking rules also what the masks are
            built for.
        rule: the deployed rule; the defence's own when absent.
        attacks: names from `ATTACKS`; all of them when empty. An image is left alone once it is broken.
        seed: of all random choices; the same seed gives the same result on the same machine.
        settings: how hard to try; its seed gives way to `seed`.
        library: contents to transfer from earlier batches; what is found here is added.
        on_progress: called with the share done.

    Raises:
        UsageError: bad images, labels, patch, rule or attack.

    >>> from bagcert import load
    >>> from bagcert.data import load_dataset
    >>> digits = load_dataset("digits").take(2)
    >>> result = attack(load("digits"), digits.array(), digits.labels, patch=1, attacks=["random"])
    >>> result.certified_accuracy <= result.attacked_accuracy <= result.clean_accuracy
    True
    """
    names = list(attacks) or list(ATTACKS)
    chosen = [(name, get_attack(name)) for name in names]
    check_images(images)
    labels = np.asarray(labels)
    if labels.shape != (len(images),):
        raise UsageError(f"there must be one label per image, got {len(images)} images and labels {labels.shape}")
    settings = settings or Settings()
    threat = PatchThreatModel.parse(patch, (images.shape[1], images.shape[2]))
    victim = Victim(defense, images, threat, rule or defense.rule, library)
    for number, (_, run) in enumerate(chosen):

        def part(share: float, number: int = number) -> None:
            on_progress((number + share) / len(chosen))

        run(victim, settings, torch.Generator().manual_seed(seed + 1000 * number), part)
        on_progress((number + 1) / len(chosen))
    return AttackResult.of(victim, labels)
