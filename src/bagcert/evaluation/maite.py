"""MAITE adapters: models, data sets and certified accuracy, for image classification.

MAITE (https://github.com/mit-ll-ai-technology/maite) defines protocols for test and evaluation. They are structural, so
MAITE is not imported here; `pip install "bagcert[maite]"` installs its tasks, such as `maite.tasks.evaluate`.

A MAITE metric receives only predictions and labels, so predictions encode certification: a prediction is a vector with
one value per class, which is 0 except at the predicted class, where it is 2 if the prediction is certified and else 1.
Its argmax is the predicted class, as other metrics expect.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.data.preprocess import Preprocessing
from bagcert.defenses.bagcert import BagCert
from bagcert.defenses.base import ScoreMapDefense
from bagcert.errors import UsageError
from bagcert.evaluation.evaluate import labels_for
from bagcert.records import wilson_interval

if TYPE_CHECKING:
    from bagcert.certificate import Certificate

ANSWERED, CERTIFIED = 1.0, 2.0


class Model:
    """A defense as a MAITE model, which returns vectors that encode the prediction and whether it is certified.

    With a detection rule, an image that is not certified raises the alert. Clean accuracy counts its prediction, as in
    `bagcert evaluate`.

    Args:
        patch, rule: as for `certify`; by default the deployed ones. Sizes are in pixels of the input images.
    """

    def __init__(
        self, defense: ScoreMapDefense, patch: int | str | None = None, rule: str | None = None, fit: str = "squash"
    ) -> None:
        self._defense, self._patch, self._rule = defense, patch, rule
        self._preprocessing = Preprocessing(defense.image_size, fit)
        self.metadata = {"id": defense.name, "index2label": dict(enumerate(defense.class_names))}

    def __call__(self, batch: Sequence[Any], /) -> Sequence[np.ndarray]:
        """Returns one vector, float32 [classes], for each image.

        Args:
            batch: images of shape [3, height, width]: uint8 of any size, or float in [0, 1] of the model's size.

        Raises:
            UsageError: another layout, dtype or range.
        """
        images = [np.asarray(image) for image in batch]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for number, image in enumerate(images):
            groups.setdefault((image.shape, image.dtype), []).append(number)
        vectors: list[np.ndarray] = [np.zeros(0, np.float32)] * len(images)
        for numbers in groups.values():
            certificate = self._certified(np.stack([images[number] for number in numbers]))
            found = zip(numbers, certificate.prediction.tolist(), certificate.certified.tolist(), strict=True)
            for number, prediction, certified in found:
                vectors[number] = np.zeros(len(self._defense.class_names), np.float32)
                vectors[number][prediction] = CERTIFIED if certified else ANSWERED
        return vectors

    def _certified(self, images: np.ndarray) -> "Certificate":
        if images.ndim != 4 or images.shape[1] != 3:
            raise UsageError(f"an image of MAITE is [3, height, width] here, got {list(images.shape[1:])}")
        if images.dtype != np.uint8:
            return self._defense.certify(torch.from_numpy(images).float(), self._patch, rule=self._rule)
        photos = images.transpose(0, 2, 3, 1)
        pixels = np.stack([self._preprocessing.apply(Photo(np.ascontiguousarray(photo))) for photo in photos])
        geometry = self._preprocessing.geometry((photos.shape[1], photos.shape[2]))
        return self._defense.certify_scores(
            geometry.score_map(self._defense.score_map(pixels)), self._patch, rule=self._rule
        )


class Dataset:
    """An image set as a MAITE data set: uint8 [3, height, width], a one-hot label, and the image's source as its id.

    Args:
        model: model to whose classes the labels are matched by name; by default, the labels of the image set.

    Raises:
        UsageError: a class the model does not know.
    """

    def __init__(self, images: ImageSet, model: BagCert | None = None) -> None:
        self._images = images
        self._labels = images.labels if model is None else labels_for(model, images)
        names = images.class_names if model is None else model.class_names
        self.metadata = {"id": f"{images.name}:{images.split}", "index2label": dict(enumerate(names))}

    def __len__(self) -> int:
        """Returns the number of images."""
        return len(self._images)

    def __getitem__(self, index: int, /) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
        """Returns (image, label, metadata) of one image, with the EXIF orientation applied.

        Raises:
            IndexError: there is no such image.
            UnreadableError: the image cannot be read.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.metadata['id']} has {len(self)} images, there is no image {index}")
        place = index % len(self)
        (photo,) = self._images.read([place])
        label = np.zeros(len(self.metadata["index2label"]), np.float32)
        label[self._labels[place]] = 1
        return np.ascontiguousarray(photo.upright().transpose(2, 0, 1)), label, {"id": f"{place}: {photo.source}"}


class CertifiedAccuracy:
    """A MAITE metric: clean and certified accuracy of the vectors that `Model` returns.

    `compute` returns both, each with a 95 % Wilson interval, and the number of images.
    """

    def __init__(self) -> None:
        self.metadata = {"id": "certified_accuracy"}
        self.reset()

    def reset(self) -> None:
        """Resets the counts."""
        self._images = self._right = self._certified = 0

    def update(
        self, predictions: Sequence[Any], targets: Sequence[Any], metadata: Sequence[Mapping[str, Any]], /
    ) -> None:
        """Counts a batch.

        Raises:
            UsageError: predictions that are not those of `Model`.
        """
        for prediction, target in zip(predictions, targets, strict=True):
            found, wanted = np.asarray(prediction), np.asarray(target)
            most = float(found.max())
            if most not in (ANSWERED, CERTIFIED) or np.count_nonzero(found) != 1:
                raise UsageError(
                    "certified accuracy is counted from the predictions of bagcert.evaluation.maite.Model, which are 0 "
                    "but for a 1 or 2 at the predicted class"
                )
            right = int(found.argmax()) == int(wanted.argmax())
            self._images += 1
            self._right += right
            self._certified += right and most == CERTIFIED

    def compute(self) -> dict[str, Any]:
        """Returns the accuracies.

        Raises:
            UsageError: no images were counted.
        """
        if not self._images:
            raise UsageError("there is no accuracy of no images")
        counts = {"clean_accuracy": self._right, "certified_accuracy": self._certified}
        return {
            **{name: count / self._images for name, count in counts.items()},
            "interval95": {name: wilson_interval(count, self._images) for name, count in counts.items()},
            "images": self._images,
        }
