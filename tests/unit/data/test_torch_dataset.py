"""The user's own torch dataset: every form of image it may yield."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import Dataset, TensorDataset

from bagcert.data import from_torch, load_dataset
from bagcert.errors import UnreadableError, UsageError
from tests import refused

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 5, 3), dtype=np.uint8)
LABELS = [0, 1, 2, 2, 1, 0]

FORMS = {
    "PIL": Image.fromarray,
    "numpy": lambda pixels: pixels,
    "uint8 tensor": torch.as_tensor,
    "float tensor": lambda pixels: torch.as_tensor(pixels).permute(2, 0, 1).float() / 255,
}


class _Items(Dataset):
    def __init__(self, items: list) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, row: int) -> object:
        return self.items[row]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_image(form: str) -> None:
    dataset = _Items([(FORMS[form](pixels), label) for pixels, label in zip(PIXELS, LABELS, strict=True)])
    images = load_dataset(dataset)
    np.testing.assert_array_equal(images.array(), PIXELS)
    assert images.labels.tolist() == LABELS
    assert images.class_names == ("0", "1", "2")
    assert len(load_dataset(dataset, limit=2)) == 2


def test_tensor_datasets_and_names() -> None:
    dataset = TensorDataset(torch.as_tensor(PIXELS), torch.as_tensor(LABELS))
    images = from_torch(dataset, class_names=["a", "b", "c"], name="mine", split="test")
    assert (images.name, images.split, images.class_names) == ("mine", "test", ("a", "b", "c"))
    assert images.read([3])[0].source == "mine item 3"
    refused(UnreadableError, "label 2, but labels must be 0 to 1", from_torch, dataset, class_names=["a", "b"])


def test_targets_and_classes_spare_a_pass() -> None:
    dataset = _Items([None] * 6)
    dataset.targets, dataset.classes = torch.tensor(LABELS), ["x", "y", "z"]
    images = from_torch(dataset)
    assert images.labels.tolist() == LABELS
    assert images.class_names == ("x", "y", "z")
    dataset.targets = LABELS[:2]
    refused(UsageError, "6 items and 2 targets", from_torch, dataset)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (PIXELS[0], "items must be .image, label., item 0 is ndarray"),
        ((PIXELS[0], "cat"), "labels must be integers"),
        (("image.png", 0), "images must be PIL, uint8"),
        ((PIXELS[0].astype(np.float32), 0), r"item 0: float images must be \[batch, 3"),
        ((torch.full((3, 4, 4), 2.0), 0), r"item 0: float images must lie in \[0, 1\]"),
    ],
)
def test_other_items_are_refused(item: object, message: str) -> None:
    refused(UsageError, message, lambda: from_torch(_Items([item])).array())


def test_what_is_no_dataset_is_refused() -> None:
    refused(UsageError, "must have a length and items by number, got int", load_dataset, 7)
    refused(UnreadableError, "no images", from_torch, _Items([]))
