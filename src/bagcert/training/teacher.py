"""Knowledge distillation: targets from a trained network, for every augmented image.

Source: Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; the teacher sees the same augmented image
as the student, as in Beyer et al., "Knowledge distillation: A good teacher is patient and consistent", CVPR 2022.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from bagcert.defenses.bagcert import model_folder
from bagcert.errors import UsageError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.saved_model import read_model
from bagcert.training.recipe import LossSection

TAUGHT_LOSSES = ("cross-entropy", "smooth-margin", "double-masking")
"""Losses made of cross-entropies only, whose targets may be probabilities."""


class Teacher:
    """A trained network whose predictions are mixed into the targets of a student."""

    def __init__(self, section: LossSection, student: RegionScorer, device: torch.device) -> None:
        if section.name not in TAUGHT_LOSSES:
            raise UsageError(
                f"loss.teacher needs loss.name to be one of {', '.join(TAUGHT_LOSSES)}; got {section.name}"
            )
        assert section.teacher is not None
        self.section = section
        self.scorer = read_model(model_folder(section.teacher))[0].fold_batch_norm().to(device).freeze()
        if self.scorer.class_names != student.class_names or self.scorer.image_size != student.image_size:
            raise UsageError(
                f"the teacher {section.teacher} has other classes, or takes images of another size, than the model"
            )
        if self.scorer.channels != student.channels:
            raise UsageError(f"the teacher {section.teacher} and the model take images of other channels")
        self.scorer.requires_grad_(False).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.no_grad()
    def targets(
        self, images: Float[Tensor, "batch channels height width"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch classes"]:
        """Computes the targets: `(1 - w) * smoothed label + w * softmax(mean teacher scores / temperature)`."""
        section, classes = self.section, len(self.scorer.class_names)
        scores = self.scorer(images).float()
        taught = (self._class_scores(scores) / section.teacher_temperature).softmax(1)
        truth = F.one_hot(labels, classes) * (1 - section.label_smoothing) + section.label_smoothing / classes
        return (1 - section.teacher_weight) * truth + section.teacher_weight * taught

    def _class_scores(self, scores: Tensor) -> Tensor:
        """Real-valued class scores of the whole image, on the scale of the loss that trained the teacher."""
        readout = self.scorer.readout
        return scores.mean((2, 3)) if readout is None else readout(readout.evidence(scores).flatten(2).sum(2))
