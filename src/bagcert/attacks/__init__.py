"""Patch attacks: an upper bound on certified accuracy, and an empirical test of certificates.

To add an attack, write a module with a function of type `Attack` and add a line to `ATTACKS`. Attacks have white-box
access to the defense, but success is judged only by `Victim.submit`, which calls the public methods of the defense on
uint8 images.
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
"""The attacks by name, in the order in which they run: cheap attacks first; transfer last, as it uses their results."""


def get_attack(name: str) -> Attack:
    """Look up an attack by name."""
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
    """Attack a deployed defense with patches on a batch of images.

    Args:
        defense: any `Defense`. White-box attacks support only `BagCert` and `Undefended`.
        images: uint8 [batch, height, width, channels], of the image size of the network.
        labels: true labels [batch], used only for accuracies. Attacks try to change the clean prediction.
        patch: the patch, in the notation of `PatchThreatModel.parse`. Masking rules build their masks for it.
        rule: the deployed rule; default: the rule of the defense.
        attacks: names from `ATTACKS`; all attacks if empty. An image is not attacked further once it is broken.
        seed: random seed; results are reproducible on the same machine.
        settings: strength of the attacks; its seed is replaced by `seed`.
        library: patch contents from earlier batches for transfer; successful contents are added.
        on_progress: called with the finished share of the work.

    Returns:
        The result per image, with clean, attacked and certified accuracy.

    Raises:
        UsageError: invalid images, labels, patch, rule or attack.

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
