"""Interval bounds against loops over single activations, against attacks, and against rounding."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.defenses.interval_bounds import IntervalBounds
from bagcert.defenses.interval_layers import Box, flat_layers, margin_bounds, through
from bagcert.errors import UsageError
from bagcert.nets.region_scorer import Normalize
from bagcert.threat import PatchThreatModel
from tests import refused
from tests.unit.defenses import masking


def bounds(model, patch="1", **options):
    return IntervalBounds(model, masking.NAMES, masking.SIZE, patch=patch, **options)


def linear_by_loops(low, high, weight, bias):
    """Ends of W x + b for x within [low, high], one product at a time."""
    lows, highs = [], []
    for row, shift in zip(weight, bias, strict=True):
        least = most = float(shift)
        for w, a, b in zip(row, low, high, strict=True):
            least += min(w * a, w * b)
            most += max(w * a, w * b)
        lows.append(least)
        highs.append(most)
    return np.array(lows), np.array(highs)


def conv_as_matrix(layer, size):
    """A convolution as the matrix of a linear layer, found by asking it about unit vectors."""
    units = torch.eye(layer.in_channels * size[0] * size[1]).view(-1, layer.in_channels, *size)
    with torch.no_grad():
        shift = layer(torch.zeros_like(units[:1])).flatten()
        return (layer(units).flatten(1) - shift).T.double().numpy(), shift.double().numpy()


def test_margins_by_hand():
    """A network of all linear layers written as matrices, ends of intervals instead of centers and radii."""
    torch.manual_seed(0)
    conv, first, last = nn.Conv2d(3, 2, 2, stride=2), nn.Linear(18, 4), nn.Linear(4, 3)
    model = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), first, nn.ReLU(), last)
    images = masking.images(0, 3)
    found = bounds(model, "2x1").certify(images)
    matrix, shift = conv_as_matrix(conv, (6, 6))
    weights = [
        (layer.weight.detach().double().numpy(), layer.bias.detach().double().numpy()) for layer in (first, last)
    ]
    places = masking.placements((6, 6), [(2, 1)])
    for i, image in enumerate(images):
        label, least = int(found.prediction[i]), {}
        for top, left, h, w in places:
            low, high = image.astype(float), image.astype(float)
            low[:, top : top + h, left : left + w], high[:, top : top + h, left : left + w] = 0, 1
            ends = linear_by_loops(low.ravel(), high.ravel(), matrix, shift)
            ends = linear_by_loops(*(np.maximum(end, 0) for end in ends), *weights[0])
            ends = [np.maximum(end, 0) for end in ends]
            (weight, bias) = weights[1]
            difference = np.array([weight[label] - weight[c] for c in range(3) if c != label])
            shifts = [bias[label] - bias[c] for c in range(3) if c != label]
            least[top, left, h, w] = linear_by_loops(*ends, difference, shifts)[0].min()
        worst = min(least.values())
        assert found.margin[i].item() == pytest.approx(math.floor(1000 * worst), abs=1)
        assert least[tuple(found.worst_placement[i, 0].tolist())] == pytest.approx(worst, abs=1e-6)
        assert bool(found.certified[i]) == (worst > 1e-4)


def every_layer():
    """A network with every kind of layer that is bounded."""
    torch.manual_seed(4)
    model = nn.Sequential(
        Normalize((0.4, 0.5, 0.6), (0.3, 0.2, 0.25)),
        nn.Sequential(nn.Conv2d(3, 6, 3, padding="same", groups=3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        nn.Dropout(0.5),
        nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True),
        nn.Identity(),
        nn.Conv2d(6, 5, 2, stride=(1, 2), padding=(1, 0), dilation=(2, 1)),
        nn.ReLU(inplace=True),
        nn.AvgPool2d((2, 1), count_include_pad=False),
        nn.Flatten(),
        nn.Linear(20, 3, bias=False),
    )
    with torch.no_grad():
        model[1][1].running_mean.copy_(torch.randn(6))
        model[1][1].running_var.copy_(torch.rand(6) + 0.3)
        model[1][1].weight.copy_(torch.randn(6))
        model[1][1].bias.copy_(torch.randn(6))
    return model.eval()


@pytest.mark.parametrize("shrink", [0.0, 0.02, 1.0])
def test_activations_stay_in_their_boxes(shrink):
    """After every layer, for points and corners of the input box, computed in float32 and in float64."""
    random = np.random.default_rng(0)
    model = every_layer()
    low = torch.from_numpy(masking.images(1, 2))
    high = torch.minimum(low + shrink, torch.ones(()))
    box = Box((low.double() + high) / 2, (high.double() - low) / 2)
    box.radius.add_(1e-15)  # the rounding of the line above
    points = [low, high, (low + high) / 2]
    points += [torch.where(torch.from_numpy(random.random(low.shape) < 0.5), low, high) for _ in range(40)]
    points = torch.stack(points)
    exact = every_layer().double()
    for layer, precise in zip(flat_layers(model), flat_layers(exact), strict=True):
        with torch.no_grad():
            box = through(precise, box)
            points = layer(points.flatten(0, 1)).unflatten(0, points.shape[:2])
        assert bool(((points.double() - box.center).abs() <= box.radius).all()), layer
        if shrink == 0:  # and the boxes are not much larger than rounding
            assert float(box.radius.max()) < 1e-3


def test_the_box_of_a_linear_layer_is_attained():
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).double()
    center, radius = torch.rand(1, 5, dtype=torch.float64), torch.rand(1, 5, dtype=torch.float64)
    corners = torch.tensor(list(product((-1.0, 1.0), repeat=5)), dtype=torch.float64) * radius + center
    with torch.no_grad():
        box, values = through(layer, Box(center, radius)), layer(corners)
    assert torch.allclose(values.amax(0), box.center[0] + box.radius[0], atol=1e-4)
    assert torch.allclose(values.amin(0), box.center[0] - box.radius[0], atol=1e-4)


def test_boxes_hold_what_float32_rounds_away():
    """Large terms that cancel, in one order and the other: what is left is rounding, and the slack admits it."""
    torch.manual_seed(0)
    layer, precise = nn.Linear(200, 8, bias=False), nn.Linear(200, 8, bias=False).double()
    half = torch.randn(5, 100) * 1e6
    values = torch.cat([half, torch.zeros_like(half)], 1)
    with torch.no_grad():
        layer.weight[:, :100], layer.weight[:, 100:] = -1 / 3, 1
        precise.weight.copy_(layer.weight)
        values[:, 100:] = half.flip(1) / 3
        box = through(precise, Box(values.double(), torch.zeros_like(values).double()))
        forth, back = layer(values).double(), (values.flip(1) @ layer.weight.T.flip(0)).double()
    assert float((forth - back).abs().max()) > 0  # the order of summation shows
    for found in (forth, back):
        assert bool(((found - box.center).abs() <= box.radius).all())


@pytest.mark.parametrize("patch", ["1", "2", "1x2+2x1", "2*1"])
def test_no_content_changes_a_certified_answer(patch):
    threat = PatchThreatModel.parse(patch, masking.SIZE)
    random = np.random.default_rng(0)
    content = masking.contents(random, 12)
    places = masking.placements(masking.SIZE, threat.shapes)
    certified = changed = 0
    for seed in (0, 1):
        model, images = masking.example(seed, 8)
        defense = bounds(model, patch)
        found = defense.certify(images)
        assert defense.predict(images).tolist() == found.prediction.tolist()
        assert (found.certified == (found.margin >= 0)).all()
        certified += int(found.certified.sum())
        chosen = [[place] for place in places]
        if threat.patches == 2:
            chosen = [[places[i] for i in random.integers(0, len(places), 2)] for _ in range(30)]
        for image, label, holds, margin in zip(images, found.prediction, found.certified, found.margin, strict=True):
            attacked = np.concatenate([masking.attacked(image, one, content) for one in chosen])
            answers = defense.predict(attacked)
            with torch.no_grad():
                logits = model(torch.from_numpy(attacked)).double()  # the network as it is, in float32
            lead = logits[:, label] - logits.scatter(1, label.expand(len(logits), 1), -math.inf).amax(1)
            assert float(lead.min()) * 1000 >= int(margin)
            assert not holds or bool((answers == label).all())
            changed += bool((answers != label).any())
    assert certified > 0
    assert changed > 0


def test_only_allowed_placements_count():
    model, images = masking.example(0, 4)
    allowed = np.zeros((6, 6), dtype=bool)
    allowed[2:4, 1:3] = True
    free, confined = bounds(model, "2").certify(images), bounds(model, "2").certify(images, placements=allowed)
    assert confined.worst_placement.tolist() == [[[2, 1, 2, 2]]] * 4
    assert (confined.margin >= free.margin).all()
    assert bool((confined.margin > free.margin).any())


def test_batches_and_progress_change_nothing():
    model, images = masking.example(1, 5)
    seen = []
    whole = bounds(model, "2").certify(images)
    parts = bounds(model, "2", batch_size=7).certify(images, on_progress=lambda done, total: seen.append((done, total)))
    assert (whole.margin == parts.margin).all()
    assert (whole.worst_placement == parts.worst_placement).all()
    assert seen[0] == (7, 125)
    assert seen[-1] == (125, 125)


def test_pass_counts():
    threat = PatchThreatModel.parse(5, (32, 32))
    model = nn.Sequential(nn.AvgPool2d(32), nn.Flatten())
    defense = IntervalBounds(model, masking.NAMES, (32, 32), patch=5)
    assert defense.forward_passes(threat, certify=True) == 1 + 784
    assert defense.forward_passes(threat, certify=False) == 1


def test_a_bound_of_nothing_is_no_certificate():
    """Equal logits, logits that overflow, and logits that are NaN."""
    for weight in (0.0, 1e307, math.inf, math.nan):
        model = nn.Sequential(nn.Flatten(), nn.Linear(108, 3, dtype=torch.float64))
        with torch.no_grad():
            model[1].weight.fill_(weight)
            model[1].weight[0].mul_(2)
            model[1].bias.zero_()
        found = bounds(model).certify(np.ones((1, 3, 6, 6), dtype=np.float32))
        assert not found.certified.item()
        assert found.margin.item() < 0


def test_a_lead_smaller_than_rounding_is_no_certificate():
    box = Box(torch.tensor([[1.0, 1.0 - 1e-9, 0.0]], dtype=torch.float64), torch.zeros(1, 3, dtype=torch.float64))
    assert margin_bounds(box, None, None, torch.tensor([0])).amin().item() < 0
    box.center[0, 1] = 0.99
    assert 0.0099 < margin_bounds(box, None, None, torch.tensor([0])).amin().item() < 0.01


def test_the_network_is_copied():
    model, images = masking.example(0, 4)
    defense = bounds(model)
    before = defense.certify(images)
    with torch.no_grad():
        model[-1].weight.mul_(-1)
    assert (defense.certify(images).margin == before.margin).all()
    assert model[-1].weight.dtype == torch.float32


class Twice(nn.ReLU):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize(
    ("layer", "said"),
    [
        (nn.MaxPool2d(2), r"layer 1 of the network, MaxPool2d\(.*supported layers are Conv2d, Linear, ReLU"),
        (Twice(), r"layer 1 of the network, Twice\(\)"),
        (nn.Sequential(nn.ReLU(), nn.Sigmoid()), r"layer 1\.1 of the network, Sigmoid"),
        (nn.Conv2d(3, 3, 3, padding=1, padding_mode="circular"), "padding must be zero padding"),
        (nn.AvgPool2d(2, divisor_override=3), "the divisor must be the number of pixels"),
        (nn.BatchNorm2d(3, track_running_stats=False), "no running statistics"),
        (nn.Flatten(2), "it must flatten all but the batch axis"),
    ],
)
def test_other_layers_are_refused_by_name(layer, said):
    refused(UsageError, said, bounds, nn.Sequential(nn.ReLU(), layer, nn.Flatten(), nn.Linear(108, 3)))


def test_arguments_refused():
    model, hooked = masking.network(0), masking.network(0)
    hooked[0].register_forward_hook(lambda layer, given, out: 2 * out)
    for ask, message in (
        (lambda: bounds(nn.Linear(3, 3)), r"need the layers in an nn\.Sequential, got Linear"),
        (
            lambda: bounds(model).certify(masking.images(0, 1), rule="vote"),
            "no rule 'vote'; leave it out, or give 'interval-bounds'",
        ),
        (lambda: bounds(model, "4*1"), r"unions of 4 of 36, more than 20,000"),
        (lambda: bounds(model, batch_size=0), "batch size must be at least 1, got 0"),
        (lambda: bounds(hooked), "it has hooks"),
    ):
        refused(UsageError, message, ask)


def moved(*call):
    """As a forward hook: what comes out of a layer, far from what went in."""
    return 60 * (call[-1] - 0.3) ** 2


def with_hook(layer):
    layer.register_forward_hook(moved)
    return layer


def with_pre_hook(layer):
    layer.register_forward_pre_hook(lambda module, inputs: (moved(inputs[0]),))
    return layer


def with_forward(layer):
    layer.forward = moved
    return layer


def with_child(layer):
    layer.add_module("child", nn.ReLU())
    return layer


SMALL_LAYERS = {
    "Identity": nn.Identity,
    "Dropout": nn.Dropout,
    "Dropout2d": nn.Dropout2d,
    "Sequential": lambda: nn.Sequential(nn.ReLU()),
    "ReLU": nn.ReLU,
    "Flatten": nn.Flatten,
    "AvgPool2d": lambda: nn.AvgPool2d(1),
    "Conv2d": lambda: nn.Conv2d(3, 3, 1),
    "Normalize": lambda: Normalize((0.0,) * 3, (1.0,) * 3),
    "BatchNorm2d": lambda: nn.BatchNorm2d(3),
}


def around(layer):
    return nn.Sequential(nn.AvgPool2d(8), layer, nn.Flatten())


def small_bounds(model):
    return IntervalBounds(model, ("r", "g", "b"), (8, 8), patch=4)


@pytest.mark.parametrize("kind", SMALL_LAYERS)
@pytest.mark.parametrize(
    ("alter", "said"),
    [
        (with_hook, "hooks"),
        (with_pre_hook, "hooks"),
        (with_forward, "method 'forward' is replaced"),
    ],
)
def test_layer_altered_refused(kind, alter, said):
    model = around(alter(SMALL_LAYERS[kind]()))
    refused(UsageError, rf"layer 1 of the network, {kind}\(.*: it.* {said}", small_bounds, model)
    small_bounds(around(SMALL_LAYERS[kind]()))


@pytest.mark.parametrize("alter", [with_hook, with_pre_hook, with_forward])
def test_network_altered_refused(alter):
    refused(UsageError, "do not support the network: it", small_bounds, alter(around(nn.ReLU())))


@pytest.mark.parametrize("kind", ["Identity", "Dropout", "ReLU", "Conv2d"])
def test_layer_with_layers_of_its_own_refused(kind):
    refused(UsageError, "it has layers of its own", small_bounds, around(with_child(SMALL_LAYERS[kind]())))


@pytest.mark.parametrize("kind", [nn.Identity, nn.Dropout, nn.Sequential, nn.ReLU, nn.Flatten])
def test_subclass_refused(kind):
    class Own(kind):
        def forward(self, x):
            return moved(x)

    refused(UsageError, r"layer 1 of the network, Own\(.*supported layers are", small_bounds, around(Own()))


def test_weights_of_another_kind_refused():
    class Weights(torch.Tensor):
        pass

    for parametrize in (nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.orthogonal):
        with pytest.raises(UsageError, match="its weights have parametrizations; remove them first"):
            small_bounds(around(parametrize(nn.Conv2d(3, 3, 1))))
    layer = nn.Conv2d(3, 3, 1)
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Weights))
    refused(UsageError, "its weights are not plain tensors", small_bounds, around(layer))


@pytest.mark.parametrize("pre", [True, False])
def test_hooks_on_all_modules_refused(pre):
    modules = torch.nn.modules.module
    defense = small_bounds(around(nn.ReLU()))
    image = np.zeros((1, 3, 8, 8), np.float32)
    register = modules.register_module_forward_pre_hook if pre else modules.register_module_forward_hook
    handle = register(lambda *call: None)
    try:
        for ask in (
            lambda: small_bounds(around(nn.ReLU())),
            lambda: defense.certify(image),
            lambda: defense.predict(image),
        ):
            refused(UsageError, "hooks that are registered for all modules", ask)
    finally:
        handle.remove()
    assert len(defense.certify(image)) == 1


def test_later_hook_refused():
    defense = small_bounds(around(nn.Identity()))
    with_hook(defense.classifier.model[1])
    for ask in (defense.certify, defense.predict):
        refused(UsageError, r"layer 1 of the network, Identity.*it has hooks", ask, np.zeros((1, 3, 8, 8), np.float32))


def test_negative_deviation_gives_no_negative_radius():
    layer = Normalize((0.1, 0.2, 0.3), (-0.5, 0.5, -0.25)).double()
    low, high = torch.zeros(1, 3, 2, 2).double(), torch.rand(1, 3, 2, 2).double()
    box = through(layer, Box((low + high) / 2, (high - low) / 2))
    for point in (low, high):
        assert bool(((layer(point) - box.center).abs() <= box.radius).all())


def test_images_of_another_size_refused():
    model, images = masking.example(0, 2)
    defense = bounds(model)
    larger = np.pad(images, ((0, 0), (0, 0), (0, 3), (0, 1)))
    for ask in (defense.certify, defense.predict):
        refused(UsageError, r"the network is for images of 6x6 px, got 9x7 px: ", ask, larger)
    assert len(defense.predict(images)) == 2
