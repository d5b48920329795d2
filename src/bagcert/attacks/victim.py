"""A deployed defense under attack. Success is judged only by the defense's public `predict` on uint8 images."""

import numpy as np
import torch
from jaxtyping import Bool, Int, UInt8
from torch import Tensor

from bagcert.attacks.patches import nearest_placements, paste, stays_inside
from bagcert.defenses.base import Defense
from bagcert.errors import BagcertError, UsageError
from bagcert.rules import RULES
from bagcert.threat import PatchThreatModel

LIBRARY = 64  # maximum number of contents stored for transfer
AT_ONCE = 256  # patched images per call of the defense


def check_images(images: object) -> None:
    """Check that images are a non-empty uint8 array [batch, height, width, channels]."""
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4 or not images.size:
        form = f"{images.dtype} {list(images.shape)}" if isinstance(images, np.ndarray) else type(images).__name__
        raise UsageError(f"attacked images must be a uint8 array [batch, height, width, channels], got {form}")


class Victim:
    """A defense with one rule and threat on a batch of images, and the state of the attacks on it.

    An image is broken if a patched uint8 image that differs from it only inside admissible placements gets another
    prediction. For detection rules, the patched image must also raise no alert.

    Args:
        library: contents uint8 [patches, height, width, channels] found on other images; new contents are added.

    Attributes:
        prediction, certified, worst_placement: results of `certify` on the clean images.
        broken: boolean [batch], whether the image is broken.
        attempts: int64 [batch], number of patched images on which the rule was evaluated.
        attack, placement, patched, patched_prediction: the first success on each image; None or missing without one.
    """

    def __init__(
        self,
        defense: Defense,
        images: np.ndarray,
        threat: PatchThreatModel,
        rule: str,
        library: list[Tensor] | None = None,
    ) -> None:
        check_images(images)
        self.defense, self.threat, self.rule = defense, threat, rule
        self.images = torch.from_numpy(np.array(images))
        guarantee = RULES[rule].guarantee if rule in RULES else defense.guarantee
        self.detects = guarantee == "detection"
        clean = defense.certify(images, threat, rule=rule)
        self.prediction, self.certified = clean.prediction.cpu(), clean.certified.cpu()
        self.worst_placement = nearest_placements(threat, clean.worst_placement.cpu())
        batch = len(images)
        self.broken = torch.zeros(batch, dtype=torch.bool)
        self.attempts = torch.zeros(batch, dtype=torch.int64)
        self.attack: list[str | None] = [None] * batch
        self.placement: list[list[list[int]] | None] = [None] * batch
        self.patched: dict[int, np.ndarray] = {}
        self.patched_prediction = self.prediction.clone()
        self.library: list[Tensor] = [] if library is None else library

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    @property
    def open(self) -> Int[Tensor, " open"]:
        """Indices of the images that are not broken yet."""
        return (~self.broken).nonzero()[:, 0]

    def count(self, image: Int[Tensor, " rows"]) -> None:
        """Count one attempt for the image of each row."""
        self.attempts.scatter_add_(0, image, torch.ones_like(image))

    def submit(
        self,
        attack: str,
        image: Int[Tensor, " rows"],
        contents: UInt8[Tensor, "rows patches height width channels"],
        placements: Int[Tensor, "rows patches 4"],
        counted: bool = False,
    ) -> Bool[Tensor, " rows"]:
        """Evaluate the defense on patched images; return which of them break their image.

        Args:
            counted: whether these attempts were counted already when the rule was evaluated on their score maps.

        Raises:
            BagcertError: a patched image differs outside the threat, which is a bug in the attack.
        """
        changed = torch.zeros(len(image), dtype=torch.bool)
        for start in range(0, len(image), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            changed[some] = self._submit(attack, image[some], contents[some], placements[some])
        if not counted:
            self.count(image)
        return changed

    def remember(self, contents: UInt8[Tensor, "rows patches height width channels"]) -> None:
        """Store contents for transfer to other images; only the newest are kept."""
        self.library.extend(contents[-LIBRARY:].unbind(0))
        del self.library[:-LIBRARY]

    def _submit(self, attack: str, image: Tensor, contents: Tensor, placements: Tensor) -> Tensor:
        originals = self.images[image]
        patched = paste(originals, contents, placements)
        inside = stays_inside(self.threat, originals, patched, placements)
        if not bool(inside.all()):
            row = int((~inside).nonzero()[0, 0])
            raise BagcertError(
                f"the {attack} attack left its threat {self.threat} at the placement {placements[row].tolist()}; "
                "this is a bug in the attack"
            )
        answers = self.defense.predict(patched.numpy(), self.threat, rule=self.rule).cpu()
        changed = answers != self.prediction[image]
        if self.detects and bool(changed.any()):
            (rows,) = changed.nonzero(as_tuple=True)
            unnoticed = self.defense.certify(patched[rows].numpy(), self.threat, rule=self.rule).certified.cpu()
            changed[rows] = unnoticed
        for row in changed.nonzero()[:, 0].tolist():
            i = int(image[row])
            if not self.broken[i]:
                self.broken[i] = True
                self.attack[i] = attack
                self.placement[i] = placements[row].tolist()
                self.patched[i] = patched[row].numpy().copy()
                self.patched_prediction[i] = answers[row]
        return changed
