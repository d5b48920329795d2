"""Transfer attack: applies patches found on some images to other images."""

import torch

from bagcert.attacks.patches import random_placements
from bagcert.attacks.settings import OnProgress, Settings
from bagcert.attacks.victim import Victim


def transfer(victim: Victim, settings: Settings, generator: torch.Generator, progress: OnProgress) -> None:
    """Try every content of the library on every unbroken image, at its worst placement and at a random placement.

    The library contains results of other attacks on this and earlier batches, so this attack runs last.
    """
    library = list(reversed(victim.library))  # newest first
    for number, content in enumerate(library):
        for worst in (True, False):
            image = victim.open
            if not len(image):
                return
            placement = random_placements(victim.threat, len(image), generator)
            if worst:
                known = victim.worst_placement[image][:, : victim.threat.patches]
                placement[:, : known.shape[1]] = known
            contents = content[None].expand(len(image), -1, -1, -1, -1)
            victim.submit("transfer", image, contents, placement)
        progress((number + 1) / len(library))
