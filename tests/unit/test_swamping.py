"""Swamping: whatever numbers a net puts out under a patch, certified predictions stand.

The net here hands its output to the attacker: where red and green differ by nearly the whole range it adds 1e30,
infinities of both signs, or a product with a subnormal weight; neighboring pixels of both kinds cancel to NaN.
"""

from contextlib import suppress

import numpy as np
import pytest
import torch
from torch import nn

from bagcert import scores as scores_module
from bagcert.defenses.bagcert import BagCert, load
from bagcert.errors import UnsoundError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import RULES
from tests import oracle, refused

SIZE, PATCH = (7, 8), 2
NAMES = ("blue", "not blue", "neither")
SCALE = 1500.0
THRESHOLD = 1 - 2**-8  # bfloat16 holds it; the noise that locality is measured on stays below
# What the attacker's signal of 1e30 is multiplied by, and what it then adds to each class.
SWAMPS = {
    "1e30": (1.0, (1.0, 1.0, -1.0)),
    "infinities and NaN": (1e30, (1.0, -1.0, 1.0)),
    "of one sign": (1.0, (1e30, 1e30, 1e30)),
    "subnormal": (1.0, (1e-40, -1e-40, 1e-45)),
}


def swamped_model(swamp, strength, head, dtype=None, rule="vote"):
    """Class scores are the mean over 3x3 px of how blue, how little blue and a constant, plus the swamp."""
    gain, added = swamp
    first = nn.Conv2d(3, 3, 1)  # blue, and by how much red is above or below green by more than the threshold
    first.weight.data = torch.tensor([[0.0, 0.0, 1.0], [1.0, -1.0, 0.0], [-1.0, 1.0, 0.0]])[:, :, None, None]
    first.bias.data = torch.tensor([0.0, -THRESHOLD, -THRESHOLD])
    gate = nn.Conv2d(3, 2, 1, bias=False)
    up = strength / (1 - THRESHOLD)
    gate.weight.data = torch.tensor([[1.0, 0.0, 0.0], [0.0, up, -up]])[:, :, None, None]
    middle = nn.Conv2d(2, 2, 1, bias=False)
    middle.weight.data = torch.tensor([[1.0, 0.0], [0.0, gain]])[:, :, None, None]
    second = nn.Conv2d(2, 3, 3, padding=1)
    second.weight.data = torch.zeros(3, 2, 3, 3)
    second.weight.data[:, 0] = torch.tensor([1.0, -1.0, 0.0])[:, None, None] / 9
    second.weight.data[:, 1] = torch.tensor(added)[:, None, None]
    second.bias.data = torch.tensor([-0.4, 0.4, -0.3])
    net = nn.Sequential(first, nn.ReLU(), gate, middle, second)
    scorer = RegionScorer(net, NAMES, SIZE, head, SCALE)
    scorer.autocast_dtype = dtype
    return BagCert(scorer, rule, patch=PATCH)


def clean_images():
    """Red equals green to the last bit, so the swamp is dry: blue, not blue, and in the last image one wet pixel."""
    images = torch.full((3, 3, *SIZE), 0.25)
    images[0, 2], images[1, 2], images[2, 2] = 0.95, 0.0, 1.0
    images[2, :2, 6, 7] = torch.tensor([1.0, 0.0])
    return images


def contents():
    """Red minus green under the patch: up, down, both, hardly enough."""
    up = torch.tensor([1.0, 0.0, 0.5])[:, None, None].expand(3, PATCH, PATCH)
    down = torch.tensor([0.0, 1.0, 0.5])[:, None, None].expand(3, PATCH, PATCH)
    checkers = torch.where(torch.tensor([[True, False], [False, True]]), up, down)
    halves = torch.where(torch.tensor([[True, True], [False, False]]), up, down)
    hardly = torch.tensor([1.0, 2**-9, 0.0])[:, None, None].expand(3, PATCH, PATCH)
    return [up, down, checkers, halves, hardly]


def attacked(image):
    """Every content at every placement."""
    found = []
    for content in contents():
        for top in range(SIZE[0] - PATCH + 1):
            for left in range(SIZE[1] - PATCH + 1):
                changed = image.clone()
                changed[:, top : top + PATCH, left : left + PATCH] = content
                found.append(changed)
    return torch.stack(found)


def integers(z, head):
    """The heads once more, in numpy."""
    z = z.numpy().astype(np.float64)
    if head == "binary":
        return np.where(np.isnan(z), 0, z > 0).astype(int)
    # The product is one of float32.
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = (z.astype(np.float32) * np.float32(SCALE)).astype(np.float64)
    return np.rint(np.clip(np.where(np.isnan(scaled), -np.inf, scaled), -2047, 2047)).astype(int)


def holds(model, head):
    """Certifies the clean images by every rule, and attacks what is certified; returns how many attempts and z seen."""
    images, attempts = clean_images(), 0
    grid = model.scorer.grid()
    masks = oracle.mask_set(grid.rows_seen, grid.cols_seen, [(PATCH, PATCH)])
    changed = [attacked(image) for image in images]
    z = [model.scorer.real_scores(batch) for batch in changed]
    for rule in RULES:
        certificate = model.certify(images, rule=rule)
        if rule == "double-masking":
            assert bool(certificate.certified[:2].all())
        for i, batch in enumerate(changed):
            found = model.predict(batch, rule=rule)
            maps = integers(z[i], head)
            if rule == "double-masking":
                expected = [oracle.double_masking_prediction(scores, masks) for scores in maps]
            elif rule == "robust-masking":
                expected = [oracle.robust_masking_prediction(scores, masks) for scores in maps]
            else:
                expected = [oracle.plain_prediction(scores) for scores in maps]
            assert found.tolist() == expected
            if not certificate.certified[i]:
                continue
            kept = found == certificate.prediction[i]
            if rule == "detection":
                kept |= ~model.certify(batch, rule=rule).certified
            assert bool(kept.all())
            attempts += len(batch)
    return attempts, torch.cat(z)


@pytest.mark.parametrize("head", ["fixed-point", "binary"])
@pytest.mark.parametrize("swamp", SWAMPS)
def test_certified_predictions_stand_in_float32(swamp, head):
    model = swamped_model(SWAMPS[swamp], 1e30, head).check_locality()
    attempts, z = holds(model, head)
    assert attempts > 400
    if swamp == "1e30":
        assert z.abs().max() > 1e29
    elif swamp == "subnormal":
        assert not z.isnan().any()
    else:
        assert z.isinf().any()
        assert bool(z.isnan().any()) == (swamp == "infinities and NaN")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("sign", [1, -1, 0])
def test_clean_scores_not_finite_refused(sign, dtype):
    model = swamped_model(SWAMPS["1e30"], 1e30, "fixed-point", dtype)
    if sign:
        model.scorer.net[-1].bias.data[2] = sign * torch.inf
    else:
        model.scorer.net[0].bias.data[1:] = 3e38  # overflows on both sides of a difference
        assert model.scorer.real_scores(clean_images()).isnan().any()
    refused(UnsoundError, "an image without a patch has scores that are NaN or infinite", model.check_locality)


@pytest.mark.parametrize("head", ["fixed-point", "binary"])
@pytest.mark.parametrize("swamp", SWAMPS)
def test_in_bfloat16_they_stand_or_the_model_is_refused(swamp, head):
    """Some kernels multiply neighbors by zero, which turns infinities far from the patch into NaN."""
    model = swamped_model(SWAMPS[swamp], 1e30, head, torch.bfloat16)
    try:
        model.check_locality()
    except UnsoundError:
        return
    assert holds(model, head)[0] > 400


@pytest.mark.parametrize("head", ["fixed-point", "binary"])
def test_huge_finite_scores_in_bfloat16(head):
    model = swamped_model((1.0, (1.0, 1e10, -1e10)), 1e18, head, torch.bfloat16)
    with suppress(UnsoundError):  # where kernels multiply neighbors by zero, which finite scores survive
        model.check_locality()
    attempts, z = holds(model, head)
    assert attempts > 400
    assert z.abs().max() > 1e27
    assert z.isfinite().all()


@pytest.fixture
def _forget():
    scores_module._check_counting.cache_clear()
    yield
    scores_module._check_counting.cache_clear()


@pytest.mark.usefixtures("_forget")
@pytest.mark.parametrize("operation", ["product", "sum"])
def test_counting_wrongly_refused_at_load(monkeypatch, operation):
    """As if it counted in bfloat16 whatever it is told."""
    if operation == "product":
        exact = torch.Tensor.__matmul__
        monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: exact(a.bfloat16(), b.bfloat16()).to(a.dtype))
    else:
        exact = torch.Tensor.sum
        monkeypatch.setattr(
            torch.Tensor, "sum", lambda a, *args, **kwargs: exact(a, *args, **kwargs).bfloat16().to(a.dtype)
        )
    refused(UnsoundError, "not exact on device cpu", load, "digits", device="cpu")
    with pytest.raises(UnsoundError, match="not exact on device cpu"):  # a failure is not remembered as a success
        load("digits", device="cpu")


@pytest.mark.usefixtures("_forget")
def test_counting_right():
    scores_module.check_counting(torch.device("cpu"))


@pytest.mark.usefixtures("_forget")
def test_counting_tries_the_largest_number(monkeypatch):
    """float32 counts right up to 2^24, and this is wrong only near it."""
    exact = torch.Tensor.__matmul__
    monkeypatch.setattr(torch.Tensor, "__matmul__", lambda a, b: exact(a, b) // 2 * 2)
    refused(UnsoundError, "not exact on device", scores_module.check_counting, torch.device("cpu"))
