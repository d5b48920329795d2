"""Transfer: the best patches found on some images, pasted on others."""

import torch

from bagcert.attacks.patches import random_placements
from bagcert.attacks.settings import OnProgress, Settings
from bagcert.attacks.victim import Victim


def transfer(victim: Victim, settings: Settings, generator: torch.Generator, progress: OnProgress) -> None:
    """Tries every content of the library on every open image, at its worst placement and at a random one.

    The library holds what the other attacks found on this batch and on those before it, so this attack comes last.
    """
    library = list(reversed(victim.library))  # the strongest first
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
