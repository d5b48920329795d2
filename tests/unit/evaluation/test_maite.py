"""The protocols of MAITE: predictions that carry their certificates, data sets and certified accuracy."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import bagcert
from bagcert.data import load_dataset
from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.errors import UsageError
from bagcert.evaluation.evaluate import evaluate
from bagcert.evaluation.maite import CertifiedAccuracy, Dataset, Model
from tests import refused

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def defense():
    return bagcert.load("digits", device="cpu")


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits").take(60)


@pytest.fixture(scope="module")
def resized(digits):
    """Photos of two sizes, neither the model's."""

    def photo(number):
        pixels = digits.read([number])[0].pixels
        return Photo(np.kron(pixels, np.ones((3 if number % 2 else 2, 2, 1), np.uint8)))

    return ImageSet("resized", "test", digits.labels, digits.class_names, photo)


def accuracies(model, data, batch=7):
    metric = CertifiedAccuracy()
    for start in range(0, len(data), batch):
        images, labels, metadata = zip(*(data[i] for i in range(start, min(start + batch, len(data)))), strict=True)
        metric.update(model(images), labels, metadata)
    return metric.compute()


@pytest.mark.parametrize("rule", ["double-masking", "detection", "vote"])
@pytest.mark.parametrize("source", ["digits", "resized"])
def test_accuracies_are_those_of_evaluate(source, rule, defense, request):
    images = request.getfixturevalue(source)
    row = evaluate(defense, images, patches=["2"], rules=[rule]).info.results[0]
    found = accuracies(Model(defense, 2, rule), Dataset(images, defense))
    assert found["images"] == 60
    assert found["certified_accuracy"] == pytest.approx(row.certified_accuracy)
    assert found["clean_accuracy"] == pytest.approx(row.clean_accuracy)
    for name, interval in found["interval95"].items():
        assert interval == pytest.approx(row.interval95[name])


def test_vector_says_prediction_and_certificate(defense, digits):
    data = Dataset(digits)
    images = [data[i][0] for i in range(20)]
    certificate = defense.certify(np.stack(images).transpose(0, 2, 3, 1), 2)
    assert 0 < certificate.certified.sum() < 20
    for vector, label, certified in zip(
        Model(defense, 2)(images), certificate.prediction, certificate.certified, strict=True
    ):
        assert vector.shape == (10,)
        assert vector[label] == (2 if certified else 1)
        assert np.count_nonzero(vector) == 1


def test_float_images_are_taken_in_the_models_size(defense, digits):
    image = Dataset(digits)[0][0]
    (as_float,), (as_bytes,) = Model(defense)([image.astype(np.float32) / 255]), Model(defense)([image])
    assert np.array_equal(as_float, as_bytes)
    refused(UsageError, r"3, height, width", Model(defense), [image.transpose(1, 2, 0)])


def test_labels_are_matched_by_name(defense, digits):
    backwards = ImageSet(
        "backwards", "test", 9 - digits.labels, digits.class_names[::-1], lambda number: digits.read([number])[0]
    )
    data = Dataset(backwards, defense)
    assert [int(data[i][1].argmax()) for i in range(9)] == digits.labels[:9].tolist()
    assert data.metadata["index2label"] == dict(enumerate(defense.class_names))
    assert Dataset(backwards).metadata["index2label"][0] == "9"


def test_a_data_set_ends(digits):
    data = Dataset(digits)
    assert len(list(data)) == len(data) == 60
    assert np.array_equal(data[-1][0], data[59][0])
    with pytest.raises(IndexError):
        data[60]
    assert len({metadata["id"] for _, _, metadata in data}) == 60


def test_the_metric_counts_and_forgets():
    metric, one = CertifiedAccuracy(), np.eye(3, dtype=np.float32)
    metric.update([2 * one[0], one[1], 2 * one[2], one[1], one[2]], list(one[[0, 1, 1, 0, 0]]), [{"id": 0}] * 5)
    found = metric.compute()
    assert (found["clean_accuracy"], found["certified_accuracy"], found["images"]) == (2 / 5, 1 / 5, 5)
    metric.reset()
    refused(UsageError, "no images", metric.compute)


@pytest.mark.parametrize("vector", [[0.2, 0.8], [0.0, 0.0], [1.0, 1.0], [3.0, 0.0], [np.nan, 0.0], [-1.0, 2.0]])
def test_predictions_of_other_models_are_refused(vector):
    with pytest.raises(UsageError, match=r"bagcert\.evaluation\.maite\.Model"):
        CertifiedAccuracy().update([np.array(vector)], [np.array([1.0, 0.0])], [{"id": 0}])


# Against MAITE itself, which the extra `maite` brings.


def test_maite_protocols(defense, digits):
    protocols = pytest.importorskip("maite.protocols.image_classification")
    assert isinstance(Model(defense), protocols.Model)
    assert isinstance(Dataset(digits), protocols.Dataset)
    assert isinstance(CertifiedAccuracy(), protocols.Metric)


def test_maite_evaluate(defense, digits):
    tasks = pytest.importorskip("maite.tasks")
    asked = {"model": Model(defense, 2), "dataset": Dataset(digits, defense), "metric": CertifiedAccuracy()}
    found, _, _ = tasks.evaluate(**asked, batch_size=16)
    assert found == accuracies(Model(defense, 2), Dataset(digits, defense))


def test_maite_example():
    pytest.importorskip("maite")
    script = ROOT / "examples" / "maite_evaluate.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "certified accuracy" in done.stdout
