"""What tests of exported files share."""

import numpy as np

from bagcert.exporting.rules import EXACT

NOT_IN_RANGE = [np.nan, np.inf, -np.inf, 1e38, -1e38, 255, -5, 1.001, -0.001]


def session(path):
    """The file in ONNX Runtime."""
    import onnxruntime

    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def check_only_images_are_certified(run, image):
    """A certified image loses its certificate with one wrong pixel or all; its neighbor in the batch keeps it.

    Returns:
        The label of the neighbor for every wrong value.
    """
    assert run.run(None, {"images": image})[1].tolist() == [True]
    labels = []
    for value in NOT_IN_RANGE:
        broken = np.repeat(image, 3, 0)
        broken[0, 0, 0, 0] = value
        broken[1] = value
        label, certified, margin, _ = run.run(None, {"images": broken})
        assert certified.tolist() == [False, False, True]
        assert margin[:2].tolist() == [-EXACT, -EXACT]
        labels.append(int(label[2]))
    return labels


def check_any_number_of_images(run, images):
    """Each image of a batch has the answers that it has alone."""
    together = run.run(None, {"images": images})
    for number in range(len(images)):
        for whole, alone in zip(together, run.run(None, {"images": images[number : number + 1]}), strict=True):
            assert np.array_equal(whole[number], alone[0])
