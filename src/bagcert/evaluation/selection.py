"""Selection of the images to evaluate. Training images of the model are excluded unless requested by split name."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.data.preprocess import Preprocessing
from bagcert.errors import BagcertError, UsageError
from bagcert.nets.saved_model import ModelConfig

HELD_OUT = "held-out"  # the split name of the images that were held out of the training set


def select_images(
    config: ModelConfig | None,
    data: str,
    split: str = "test",
    limit: int | None = None,
    resize: Preprocessing | None = None,
) -> ImageSet:
    """Selects the images to evaluate a model on; their notes describe the selection.

    If the model was trained on a data set without splits, the images held out of the training are selected. A split
    that was trained on is returned unchanged, with a note.

    Args:
        config: config of the model; None if its training is unknown.
        split: the split; `held-out` for the images held out of the training split.
        resize: preprocessing that resizes every image first; None for no resizing.
    """
    if split == HELD_OUT:
        images = load_dataset(data, "train")
        trained = trained_on(config, images)
        if config is None or not isinstance(trained, np.ndarray):
            name = "the model" if config is None else config.name
            raise UsageError(f"it is not known which images of {data} were held out when {name} was trained")
        images = _rest(config, images, trained)
    else:
        images = load_dataset(data, split)
        trained = trained_on(config, images)
        if config is not None and isinstance(trained, np.ndarray):
            images = _rest(config, images, trained) if images.split == "all" else _noted(config, images, trained)
        elif config is not None and trained:
            known = config.provenance
            note = (
                f"{config.name} may have been trained on some of these images: its training data are "
                f"{known.get('training_images')} images of {known.get('data')}"
            )
            images = replace(images, notes=(*images.notes, note))
    return brought_to(images.take(limit), resize)


def trained_on(config: ModelConfig | None, images: ImageSet) -> np.ndarray | bool:
    """Returns which images the model was trained on, boolean [images], or whether it may have been trained on some.

    The config holds the last part of the path of the training data, and the number of training images. The split is
    recomputed, and used if both match. If only one of them matches, the result is True.
    """
    if config is None or images.split not in ("train", "all"):
        return False
    section, known = config.recipe.get("data"), config.provenance
    count, limit = known.get("training_images"), known.get("limit")
    same_name = known.get("data") == Path(images.name).name
    if limit is not None and images.is_grouped:  # older versions used the first images
        return same_name
    try:
        numbered = replace(images, rows=np.arange(len(images)), notes=())
        training, _ = numbered.take(limit).split_off(section["validation"], section["split_seed"])  # type: ignore[index]
    except (BagcertError, KeyError, TypeError, ValueError):  # the provenance in a config is not validated
        return same_name
    if type(count) is not int or len(training) != count:
        return same_name
    if not same_name:
        return images.class_names == tuple(config.class_names)
    found = np.zeros(len(images), dtype=bool)
    found[training.rows] = True
    return found


def brought_to(images: ImageSet, preprocessing: Preprocessing | None) -> ImageSet:
    """Applies the EXIF orientation and resizes the images, and adds a note; unchanged without `preprocessing`."""
    if preprocessing is None:
        return images
    height, width = preprocessing.size
    note = f"images were first turned upright and resized to {height}x{width} px ({preprocessing.fit}), where needed"
    return replace(images, source=_Resized(images.source, preprocessing), notes=(*images.notes, note))


@dataclass(frozen=True, eq=False)
class _Resized:
    """An image source that resizes each image to the network's input size."""

    source: Any
    preprocessing: Preprocessing

    def __call__(self, row: int) -> Photo:
        photo = self.source(row)
        return Photo(self.preprocessing.apply(photo), source=photo.source)

    def __getattr__(self, name: str) -> Any:
        """Forwards `fingerprint` and `block_of` to the source, if it has them."""
        if name.startswith("_") or name in ("source", "preprocessing"):  # also while it is unpickled
            raise AttributeError(name)
        return getattr(self.source, name)


def _rest(config: ModelConfig, images: ImageSet, trained: np.ndarray) -> ImageSet:
    rest = images.subset(np.flatnonzero(~trained))
    note = (
        f"the {len(rest):,} images that were held out when {config.name} was trained on the other "
        f"{int(trained.sum()):,} images of {images.name}"
    )
    return replace(rest, split=HELD_OUT, notes=(*images.notes, note))


def _noted(config: ModelConfig, images: ImageSet, trained: np.ndarray) -> ImageSet:
    note = (
        f"{config.name} was trained on {int(trained.sum()):,} of these {len(images):,} images, so these figures say "
        f"little about other images; --split {HELD_OUT} takes the {int((~trained).sum()):,} that were held out"
    )
    return replace(images, notes=(*images.notes, note))
