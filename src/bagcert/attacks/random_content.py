"""Random attack: black, white, saturated colors, noise and checkerboards, at random placements."""

import torch
from torch import Tensor

from bagcert.attacks.patches import canvas_size, cut, random_placements
from bagcert.attacks.settings import OnProgress, Settings
from bagcert.attacks.victim import Victim

EACH = 4  # patched images per placement in the settings
_COLORS = 8  # corners of the color cube, including black and white
_KINDS = _COLORS + 5


def random_content(victim: Victim, settings: Settings, generator: torch.Generator, progress: OnProgress) -> None:
    """Try random and extreme contents at random placements, and each kind once at the worst placement."""
    tries = EACH * (settings.placements or 64)
    size = canvas_size(victim.threat)
    for number in range(tries):
        image = victim.open
        if not len(image):
            break
        placement = random_placements(victim.threat, len(image), generator)
        if number < _KINDS:
            worst = victim.worst_placement[image][:, : victim.threat.patches]
            placement[:, : worst.shape[1]] = worst
        kind = torch.full((len(image),), number % _KINDS)
        contents = draw_contents(kind, victim.threat.patches, size, victim.images.shape[3], generator)
        if number % _KINDS == _KINDS - 1:  # a piece of another image of the batch
            other = torch.randint(0, len(victim), (len(image),), generator=generator)
            contents = cut(victim.images[other], random_placements(victim.threat, len(image), generator), size)
        victim.submit("random", image, contents, placement)
        progress((number + 1) / tries)


def draw_contents(
    kinds: Tensor, patches: int, size: tuple[int, int], channels: int, generator: torch.Generator
) -> Tensor:
    """Create contents uint8 [rows, patches, *size, channels]: `kinds` 0 to 7 are colors, others noise and patterns."""
    shape = (len(kinds), patches, *size, channels)
    noise = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    extreme = torch.randint(0, 2, shape, generator=generator, dtype=torch.uint8) * 255
    plain = torch.randint(0, 256, (len(kinds), patches, 1, 1, channels), generator=generator, dtype=torch.uint8)
    board = (torch.arange(size[0])[:, None] + torch.arange(size[1])) % 2
    board = (board[:, :, None] * 255).to(torch.uint8).expand(shape)
    bits = kinds[:, None] >> torch.arange(channels) & 1
    color = (bits * 255).to(torch.uint8)[:, None, None, None].expand(shape)
    choices = [noise, extreme, plain.expand(shape), board, 255 - board]
    result = color.clone()
    for i, choice in enumerate(choices):
        rows = kinds == _COLORS + i
        result[rows] = choice[rows]
    return result
