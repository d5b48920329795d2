"""The runtime promise: act on certified verdicts, fall back on the others.

"Differs within one patch" is symmetric. So if the image the camera delivers is certified with a label, attacked or
not, the scene without the patch has that label too: an attacker can take certificates away, but cannot make a
certified verdict differ from the verdict on the clean scene. See docs/method.md, "What a certificate means at run
time".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.data.photo import with_batch_axis
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UsageError
from bagcert.rules import get_rule
from bagcert.threat import PatchLike, PatchThreatModel

Fallback = Callable[[np.ndarray | Tensor], Sequence[int | None] | np.ndarray | Tensor]


@dataclass(frozen=True)
class Verdict:
    """What to do about one image.

    Attributes:
        label: class index: the model's where certified, else the fallback's; None where there is neither.
        certified: whether `label` is the verdict on the clean scene, whatever patch of the threat was stuck on it.
        margin: of the certificate, in score units; certified exactly where it is >= 0.
        reason: one sentence for a log.
    """

    label: int | None
    certified: bool
    margin: int
    reason: str


class FailSafe:
    """A classifier whose certified verdicts cannot be changed by a patch within `threat`.

    Args:
        model: a loaded defense; its network, rule and patch stay fixed from now on.
        threat: the patch to withstand, in the notation of `PatchThreatModel.parse`; the model's own when absent.
        fallback: asked for the labels of the images that are not certified, and given just those; None for
            "no label". Without it they have none.
        rule: a recovery rule from `bagcert.rules.RULES`; the model's own when absent.

    Raises:
        UsageError: a rule or threat there is not, or a detection rule: no alert does not mean the clean verdict.

    >>> import bagcert, numpy as np
    >>> from bagcert.data import load_dataset
    >>> fail_safe = FailSafe(bagcert.load("digits"), threat="2", fallback=lambda images: [None] * len(images))
    >>> images = load_dataset("digits", "test", limit=4).array()
    >>> [(verdict.label, verdict.certified) for verdict in fail_safe(images)]
    [(None, False), (None, False), (0, True), (None, False)]
    """

    def __init__(
        self,
        model: BagCert,
        threat: PatchLike | None = None,
        *,
        fallback: Fallback | None = None,
        rule: str | None = None,
    ) -> None:
        self.model = model
        self.rule = rule or model.rule
        self.threat = model.patch if threat is None else threat
        self.fallback = fallback
        chosen = get_rule(self.rule)
        if chosen.guarantee != "recovery":
            raise UsageError(
                f"a fail-safe needs a rule that recovers the answer, and {self.rule!r} only detects attacks: without "
                "an alert the clean image itself may have raised one"
            )
        PatchThreatModel.parse(self.threat, model.image_size)

    def __call__(self, images: np.ndarray | Tensor) -> list[Verdict]:
        """A verdict for each image: uint8 [batch, height, width, 3] or float [batch, 3, height, width] in [0, 1].

        One image without the batch axis counts as a batch of one, for the fallback as well.

        Raises:
            UsageError: bad images, or a fallback that does not answer once per image it was given.
        """
        images = with_batch_axis(images)
        certificate = self.model.certify(images, self.threat, rule=self.rule)
        certified = certificate.certified.cpu()
        labels: list[int | None] = certificate.prediction.tolist()
        doubtful = np.flatnonzero(~certified.numpy())
        for index, label in zip(doubtful.tolist(), self._fall_back(images, doubtful), strict=True):
            labels[index] = label
        return [
            Verdict(label, bool(sure), int(margin), self._reason(certificate, i))
            for i, (label, sure, margin) in enumerate(
                zip(labels, certified.tolist(), certificate.margin.tolist(), strict=True)
            )
        ]

    def _fall_back(self, images: np.ndarray | Tensor, doubtful: np.ndarray) -> list[int | None]:
        if self.fallback is None or not len(doubtful):
            return [None] * len(doubtful)
        answers = self.fallback(images[doubtful])
        labels = [None if answer is None else int(answer) for answer in answers]
        if len(labels) != len(doubtful):
            raise UsageError(f"the fallback was given {len(doubtful)} images and answered {len(labels)} times")
        classes = len(self.model.class_names)
        for label in labels:
            if label is not None and not 0 <= label < classes:
                raise UsageError(f"the fallback answered {label}; labels are 0 to {classes - 1}, or None")
        return labels

    def _reason(self, certificate: Certificate, index: int) -> str:
        name = self.model.class_names[int(certificate.prediction[index])]
        margin = int(certificate.margin[index])
        if margin >= 0:
            return f"{name}: no patch of {certificate.threat} px changes it, by {self.rule} with margin {margin}"
        fallback = "no label" if self.fallback is None else "the fallback's label"
        places = certificate.worst_placement[index].tolist()
        where = places[0] if len(places) == 1 else places
        return f"{fallback}: a patch of {certificate.threat} px at {where} might change {name} (margin {margin})"
