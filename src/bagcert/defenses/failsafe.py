"""Runtime use of certificates: use certified predictions, and a fallback for all other images.

"Differs within one patch" is a symmetric relation. If the image from the camera, attacked or not, is certified with a
label, then the scene without the patch has the same label. An attacker can prevent certificates, but cannot make a
certified verdict differ from the prediction on the clean scene. See docs/method.md, "What a certificate means at run
time".
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from bagcert.certificate import Certificate
from bagcert.data.photo import Images, with_batch_axis
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UsageError
from bagcert.rules import get_rule
from bagcert.threat import PatchLike, PatchThreatModel

Fallback = Callable[[Images], Sequence[int | None] | np.ndarray | Tensor]


@dataclass(frozen=True)
class Verdict:
    """Verdict for one image.

    Attributes:
        label: class index of the model if certified, otherwise of the fallback; None if there is neither.
        certified: whether `label` is guaranteed to be the prediction on the clean scene, for any patch of the threat.
        margin: margin of the certificate in score units; certified if and only if it is >= 0.
        reason: explanation in one sentence, for logs.
    """

    label: int | None
    certified: bool
    margin: int
    reason: str


class FailSafe:
    """Classifier whose certified verdicts cannot be changed by a patch within `threat`.

    Args:
        model: a loaded defense. Its network, rule and patch must not be changed afterwards.
        threat: the patch, in the notation of `PatchThreatModel.parse`; default: the deployed patch of the model.
        fallback: function that receives the images that are not certified and returns a class index or None for each.
            Without a fallback these images have no label.
        rule: a recovery rule from `bagcert.rules.RULES`; default: the deployed rule of the model.

    Raises:
        UsageError: invalid rule or threat, or a detection rule, for which the absence of an alert does not imply the
            clean prediction.

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
                f"a fail-safe needs a recovery rule, and {self.rule!r} only detects attacks: an image without an alert "
                "may come from a clean scene that raises one"
            )
        PatchThreatModel.parse(self.threat, model.image_size)

    def __call__(self, images: Images) -> list[Verdict]:
        """Compute a verdict for each image.

        Args:
            images: uint8 [batch, height, width, 3] or float [batch, 3, height, width] in [0, 1]. A single image without
                the batch axis is treated as a batch of one, also for the fallback.

        Raises:
            UsageError: invalid images, or a fallback that does not return one label per image.
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

    def _fall_back(self, images: Images, doubtful: np.ndarray) -> list[int | None]:
        if self.fallback is None or not len(doubtful):
            return [None] * len(doubtful)
        answers = self.fallback(images[doubtful])
        labels = [None if answer is None else int(answer) for answer in answers]
        if len(labels) != len(doubtful):
            raise UsageError(f"the fallback received {len(doubtful)} images and returned {len(labels)} labels")
        classes = len(self.model.class_names)
        for label in labels:
            if label is not None and not 0 <= label < classes:
                raise UsageError(f"the fallback returned {label}; labels must be 0 to {classes - 1}, or None")
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
