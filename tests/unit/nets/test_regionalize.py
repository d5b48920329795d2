"""Which classifiers are means of region scores, and that what is made of them scores the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bagcert
from bagcert.errors import UnsoundError, UsageError
from bagcert.nets.region_scorer import RegionScorer
from bagcert.nets.regionalize import regionalize
from tests import refused

SIZE, NAMES = (13, 11), ("a", "b", "c")


def body(channels=8):
    norm = nn.BatchNorm2d(channels)
    nn.init.normal_(norm.running_mean)
    nn.init.uniform_(norm.running_var, 0.5, 2)
    return nn.Sequential(nn.Conv2d(3, channels, 4, 2), norm, nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1))


class Functional(nn.Module):
    """The structure of torchvision's residual networks."""

    def __init__(self, pool, head=None):
        super().__init__()
        self.body, self.fc, self.pool = body(), nn.Linear(8, 3) if head is None else head, pool

    def forward(self, x):
        x = self.body(x)
        return self.fc(self.pool(x + F.relu(x)))


def viewed(x):
    x = F.adaptive_avg_pool2d(x, 1)
    return F.dropout(x.view(x.size(0), -1), 0.5, False)


POOLS = {
    "flatten": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, (1, 1)), 1),
    "view": viewed,
    "shape": lambda x: F.adaptive_avg_pool2d(x, 1).reshape(x.shape[0], x.shape[1]),
    "mean": lambda x: x.mean((2, 3)),
    "mean from the end": lambda x: x.mean(dim=(-2, -1)),
    "torch.mean": lambda x: torch.mean(x, [2, 3]),
    "kept": lambda x: x.mean((2, 3), keepdim=True).flatten(1),
    "two means": lambda x: x.mean(3).mean(2),
    "squeeze": lambda x: F.adaptive_avg_pool2d(x, 1).squeeze(-1).squeeze(-1),
}


def same_mean(module, found, size=SIZE):
    """The mean of the region scores is what the classifier returns, in float64 on images of any values."""
    images = torch.randn(5, 3, *size, dtype=torch.float64) * 3
    expected = module.double().eval()(images)
    scores = found.double().eval()(images)
    assert scores.ndim == 4
    assert scores.shape[2:] != (1, 1)
    return torch.allclose(scores.mean((2, 3)), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("pool", POOLS)
def test_functional_ends(pool):
    torch.manual_seed(0)
    module = Functional(POOLS[pool])
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = bagcert.regionalize(module)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in module.state_dict().items())
    assert same_mean(module, found)


SEQUENTIAL = {
    "linear": lambda: [body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)],
    "no bias": lambda: [body(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(8, 3, bias=False)],
    "dropout": lambda: [body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(8, 3)],
    "two linear": lambda: [body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4), nn.Linear(4, 3)],
    "convolution first": lambda: [body(), nn.Conv2d(8, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()],
    "convolution last": lambda: [body(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 3, 1), nn.Flatten()],
    "nested": lambda: [body(), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))],
}


@pytest.mark.parametrize("layers", SEQUENTIAL)
def test_sequential_ends(layers):
    torch.manual_seed(0)
    module = nn.Sequential(*SEQUENTIAL[layers]())
    found = regionalize(module)
    assert type(found) is nn.Sequential
    assert same_mean(module, found)


def test_region_scorer_predicts_as_the_classifier():
    torch.manual_seed(0)
    module = Functional(POOLS["flatten"])
    images = torch.rand(8, 3, *SIZE)
    scorer = RegionScorer.from_module(regionalize(module), NAMES, SIZE, scale="auto", images=images)
    assert scorer.grid().receptive_field == (4, 4)
    sums = scorer.score_map(images).class_sums.double() / scorer.scale
    logits = module.eval()(images).double()
    rows, cols = scorer.grid().map_size
    assert torch.allclose(sums / (rows * cols), logits, atol=1 / scorer.scale)


def test_a_copy_can_be_trained():
    found = regionalize(Functional(POOLS["flatten"]).train())
    assert found.training
    assert found.get_submodule("body.1").training
    found(torch.rand(2, 3, *SIZE)).sum().backward()
    assert found.fc.weight.grad is not None
    assert found.fc.weight.shape == (3, 8, 1, 1)


def test_layer_with_two_names():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.pool, self.flatten = body(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
            self.head = nn.Linear(8, 3)
            self.classifier = self.head

        def forward(self, x):
            return self.classifier(self.flatten(self.pool(self.body(x))))

    module = Twice()
    found = regionalize(module)
    assert isinstance(found, Twice)
    assert same_mean(module, found)


def test_an_average_over_windows_needs_the_image_size():
    module = nn.Sequential(body(), nn.AvgPool2d((5, 4)), nn.Flatten(), nn.Linear(8, 3))
    refused(UsageError, "give image_size", regionalize, module)
    assert same_mean(module, regionalize(module, (13, 11)), (13, 11))
    with pytest.raises(UnsoundError, match=r"windows of \(5, 4\), and the map has 6 rows and 4 columns"):
        regionalize(module, (14, 11))  # the same output size, but the last row of the map is dropped


class OverChannels(nn.Module):
    def forward(self, x):
        return x.mean((1, 2))


class Ends(nn.Module):
    """A body, a layer, and what `end` makes of both."""

    def __init__(self, layer, end):
        super().__init__()
        self.body, self.layer, self.end = body(), layer, end

    def forward(self, x):
        return self.end(self.body(x), self.layer)


def attended(x, mix):
    x = x.flatten(2).transpose(1, 2)
    return mix(x, x, x)[0].mean(1)


REFUSED = {
    "flatten": (nn.Sequential(body(), nn.Flatten(), nn.Linear(160, 3)), r"'1' \(Flatten\) merges the rows and columns"),
    "larger pool": (nn.Sequential(body(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 3)), "weighs each of"),
    "max": (nn.Sequential(body(), nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(8, 3)), "takes the maximum"),
    "amax": (Functional(lambda x: x.amax((2, 3))), "takes the maximum"),
    "softmax": (nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Softmax(1)), "not linear; leave it"),
    "relu": (
        nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.ReLU(), nn.Linear(8, 3)),
        r"'3' \(ReLU\) is not linear, and stands between the mean and the scores",
    ),
    "norm": (
        nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(8), nn.Linear(8, 3)),
        "fold it into the linear layer",
    ),
    "attention": (
        Ends(nn.MultiheadAttention(8, 2, batch_first=True), attended),
        "every position attends to every other",
    ),
    "reused": (
        Ends(nn.Linear(8, 8), lambda x, layer: layer(layer(x.mean((2, 3))))),
        r"'layer' \(Linear\) is used more than once",
    ),
    "between means": (
        Ends(nn.Linear(8, 8), lambda x, layer: layer(x.mean(3)).mean(2)),
        r"'layer' \(Linear\) is no mean pooling",
    ),
    "channels": (nn.Sequential(body(), OverChannels()), "is not over rows and columns"),
    "no pooling": (nn.Sequential(body(), nn.ReLU()), "is no mean pooling"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_no_mean_of_region_scores_refused(case):
    module, why = REFUSED[case]
    with pytest.raises((UnsoundError, UsageError), match=why) as raised:
        regionalize(module)
    assert "\n" not in str(raised.value)


def test_control_flow_refused():
    class Branches(Functional):
        def forward(self, x):
            return super().forward(x) if x.sum() > 0 else super().forward(-x)

    refused(UsageError, r"cannot be traced.*nn\.Conv2d\(channels, classes, 1\)", regionalize, Branches(POOLS["mean"]))


@pytest.mark.parametrize(
    "module",
    [
        Functional(POOLS["flatten"]),
        nn.Sequential(*SEQUENTIAL["linear"]()),
        *(
            Ends(None, end)
            for end in (
                lambda x, _: x.mean((2, 3)),
                lambda x, _: torch.flatten(x, 1),
                lambda x, _: F.linear(x, torch.ones(3, x.shape[3])),
                lambda x, _: x.reshape(x.shape[0], -1),
            )
        ),
    ],
)
def test_refusal_of_a_classifier_names_the_cure(module):
    refused(UnsoundError, r"bagcert\.regionalize\(module\)", RegionScorer.from_module, module, NAMES, SIZE)
