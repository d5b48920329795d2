"""Region scorers: heads, inputs, batching, and which modules of users are taken."""

import numpy as np
import pytest
import torch
from torch import nn

from bagcert.errors import UnsoundError, UsageError
from bagcert.nets import region_scorer
from bagcert.nets.region_resnet import RegionResNet
from bagcert.nets.region_scorer import RegionScorer
from tests import refused

SIZE = (8, 10)
NAMES = ("a", "b", "c")


def small_net(channels=3, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, classes, 2, stride=2)
    )


def exact_net():
    """Weights of few bits: on images of multiples of 1/256 every sum is exact in float32, in whatever order."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 2, stride=2))
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data = torch.randint(-4, 5, parameter.shape, generator=generator) / 4
    return net


def images(count=3, channels=3, seed=0):
    return torch.randint(0, 257, (count, channels, *SIZE), generator=torch.Generator().manual_seed(seed)) / 256


def heads(values, head, scale=1.0):
    """The integer map of regions that all have these real scores."""
    scorer = RegionScorer(nn.Conv2d(3, 3, 1), NAMES, SIZE, head, scale)
    return scorer.to_scores(torch.tensor(values).view(1, 3, 1, 1).expand(2, 3, *SIZE), SIZE)


def test_binary_is_the_step():
    score_map = heads([0.0, 1e-30, -1.0], "binary")
    assert (score_map.low, score_map.high) == (0, 1)
    assert score_map.scores.shape == (2, 3, *SIZE)
    assert score_map.scores[0, :, 4, 5].tolist() == [0, 1, 0]
    scores = heads([float("nan"), float("inf"), -float("inf")], "binary").scores
    assert scores[1, :, 0, 0].tolist() == [0, 1, 0]


def test_fixed_point_rounds_after_scaling():
    score_map = heads([0.26, -0.14, 0.0], "fixed-point", 10.0)
    assert (score_map.low, score_map.high) == (-2047, 2047)
    assert score_map.scores[0, :, 0, 0].tolist() == [3, -1, 0]


def test_fixed_point_clips():
    for values, expected in (
        ([float("nan"), float("inf"), -float("inf")], [-2047, 2047, -2047]),
        ([1e30, -1e30, 3e38], [2047, -2047, 2047]),
    ):
        scores = heads(values, "fixed-point", 100.0).scores
        assert scores.dtype == torch.int16
        assert scores[0, :, 2, 3].tolist() == expected


@pytest.mark.parametrize("head", ["binary", "fixed-point"])
def test_overflow_stays_in_range_and_in_place(head):
    """Weights so large that a white pixel gives infinities, and their sum NaN."""
    net = nn.Conv2d(3, 3, 1, bias=False)
    net.weight.data = torch.tensor([[3e38, 3e38, 0], [-3e38, -3e38, 0], [0, 0, 1.0]]).view(3, 3, 1, 1)
    scorer = RegionScorer(nn.Sequential(net, nn.Conv2d(3, 3, 1)), NAMES, SIZE, head)
    with torch.no_grad():
        scorer.net[1].weight.fill_(1.0)
    x = torch.zeros(1, 3, *SIZE)
    clean = scorer.score_map(x).scores
    x[0, :, 3, 4] = 1.0
    assert scorer.real_scores(x)[0, :, 3, 4].isnan().all()
    score_map = scorer.score_map(x)
    scores = score_map.scores.clone()
    assert scores[0, :, 3, 4].tolist() == [score_map.low] * 3
    scores[0, :, 3, 4] = clean[0, :, 3, 4]
    assert torch.equal(scores, clean)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
def test_scale_refused(scale):
    with pytest.raises(UsageError, match="scale of the fixed-point head must be positive and finite"):
        RegionScorer(small_net(), NAMES, SIZE, scale=scale)


@pytest.mark.parametrize(("head", "channels"), [("binary", 3), ("fixed-point", 3), ("fixed-point", 1)])
def test_every_form_of_images(head, channels):
    normalization = {"mean": (0.5,) * channels, "std": (0.25,) * channels}
    scorer = RegionScorer.from_module(small_net(channels), NAMES, SIZE, head, scale=500.0, **normalization)
    assert scorer.channels == channels
    stored = np.random.default_rng(0).integers(0, 256, (4, *SIZE, channels), dtype=np.uint8)
    as_float = stored.transpose(0, 3, 1, 2).astype(np.float32) / 255
    first = scorer.score_map(stored).scores
    for form in (torch.from_numpy(stored), as_float, torch.from_numpy(as_float)):
        assert torch.equal(first, scorer.score_map(form).scores)
    assert len(scorer.score_map(as_float[0])) == 1


def test_normalization_is_the_first_layer():
    net, mean, std = small_net().eval(), (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
    scorer = RegionScorer(net, NAMES, SIZE, mean=mean, std=std)
    x = images()
    by_hand = (x - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    with torch.no_grad():
        torch.testing.assert_close(scorer.real_scores(x), net(by_hand), atol=1e-5, rtol=1e-5)


def test_images_of_another_size_have_their_own_grid():
    scorer = RegionScorer(small_net(), NAMES, SIZE)
    score_map = scorer.score_map(torch.rand(1, 3, 12, 6))
    assert score_map.grid.image_size == (12, 6)
    assert score_map.grid.map_size == (6, 3)
    assert scorer.grid().image_size == SIZE
    assert scorer.grid((12, 6)) is score_map.grid  # derived once


def test_images_too_small_refused():
    scorer = RegionScorer(nn.Conv2d(3, 3, 5), NAMES, SIZE)
    refused(UsageError, "cannot be traced on an image of 3x4x9", scorer.score_map, torch.rand(1, 3, 4, 9))


def test_grey_and_rgb_are_not_confused():
    gray = RegionScorer(small_net(1), NAMES, SIZE, mean=(0.5,), std=(0.25,))
    refused(UsageError, "takes images of one channel", gray.score_map, images())
    refused(UsageError, r"must lie in \[0, 1\]", gray.score_map, images(channels=1) * 2)
    with pytest.raises(UsageError, match=r"\[batch, 3, height, width\]"):
        RegionScorer(small_net(), NAMES, SIZE).score_map(images(channels=1))
    for scorer in (gray, RegionScorer(small_net(), NAMES, SIZE)):
        refused(UsageError, "numpy array or a torch tensor, got list", scorer.score_map, [[0.5]])


def test_batching_changes_nothing(monkeypatch):
    scorer = RegionScorer(exact_net(), NAMES, SIZE, scale=64.0)
    x = images(7)
    whole = scorer.score_map(x).scores
    assert whole.unique().numel() > 50
    for pixels in (1, 2 * SIZE[0] * SIZE[1], 3 * SIZE[0] * SIZE[1] + 1):
        monkeypatch.setattr(region_scorer, "PIXELS_AT_ONCE", pixels)
        assert torch.equal(scorer.score_map(x).scores, whole)
    one_by_one = torch.cat([scorer.score_map(image).scores for image in x])
    assert torch.equal(one_by_one, whole)


@pytest.mark.parametrize("part", ["scorer", "net", "batch norm"])
def test_train_mode_is_ended(part):
    scorer = RegionScorer(small_net(), NAMES, SIZE).eval()
    before = {name: value.clone() for name, value in scorer.state_dict().items()}
    expected = scorer.score_map(images()).scores
    {"scorer": scorer, "net": scorer.net, "batch norm": scorer.net[1]}[part].train()
    assert torch.equal(scorer.score_map(images()).scores, expected)
    assert not any(module.training for module in scorer.modules())
    assert all(torch.equal(value, before[name]) for name, value in scorer.state_dict().items())


def test_no_gradients_are_kept():
    assert not RegionScorer(small_net(), NAMES, SIZE).real_scores(images()).requires_grad


@pytest.mark.parametrize("head", ["binary", "fixed-point"])
def test_bfloat16_gives_valid_maps(head):
    scorer = RegionScorer(small_net(), NAMES, SIZE, head, scale=300.0)
    exact = scorer.real_scores(images())
    scorer.autocast_dtype = torch.bfloat16
    score_map = scorer.score_map(images())  # a ScoreMap checks its range and type
    assert score_map.scores.dtype == torch.int16
    z = scorer.real_scores(images())
    assert z.dtype == torch.float32
    torch.testing.assert_close(z, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(z, exact)  # it did run in bfloat16


def test_autocast_around_the_call_changes_nothing():
    scorer = RegionScorer(small_net(), NAMES, SIZE)
    expected = scorer.real_scores(images())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scorer.real_scores(images()), expected)


def test_folding_leaves_own_forward_alone():
    class Both(nn.Sequential):
        def forward(self, x):
            y = self[0](x)
            return self[1](y) + y

    torch.manual_seed(0)
    net = Both(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    nn.init.uniform_(net[1].weight, 0.5, 2.0)
    scorer = RegionScorer(net, NAMES, SIZE)
    expected = scorer.real_scores(images())
    assert torch.equal(scorer.fold_batch_norm().real_scores(images()), expected)


class HiddenMean(nn.Module):
    """Lets the whole map decide through a comparison, the way around every derivation by values."""

    def forward(self, x):
        return x + 1.0 if (x > 0).any() else x


def with_layer(layer):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(), layer, nn.Conv2d(6, 3, 1))


def test_module_a_plain_stack():
    net = small_net()
    scorer = RegionScorer.from_module(net, list(NAMES), SIZE, "binary")
    assert scorer.net is net
    assert scorer.class_names == NAMES
    assert scorer.grid().map_size == (4, 5)
    assert scorer.grid().receptive_field == (4, 4)
    assert not net.training
    assert scorer.score_map(images()).scores.shape == (3, 3, 4, 5)


@pytest.mark.parametrize("padded", [True, False])
def test_module_with_residuals_and_strides(padded):
    torch.manual_seed(0)
    net = RegionResNet(3, 8, ((3, 1, 0.5), (4, 2, 1.0)), (1, 3), padded)
    scorer = RegionScorer.from_module(net, NAMES, (20, 24), mean=(0.5,) * 3, std=(0.2,) * 3)
    assert scorer.grid().receptive_field == (10, 10)
    assert scorer.score_map(torch.rand(2, 3, 20, 24)).grid is scorer.grid()


def test_module_not_local_refused_by_layer():
    with pytest.raises(UnsoundError, match=r"layer '2' \(GroupNorm\) is not local"):
        RegionScorer.from_module(with_layer(nn.GroupNorm(2, 6)), NAMES, SIZE)
    head = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE[0] * SIZE[1], 3))
    with pytest.raises(UnsoundError, match=r"layer '1.0' \(Flatten\) is not local: it merges rows and columns"):
        RegionScorer.from_module(nn.Sequential(nn.Conv2d(3, 3, 1), head), NAMES, SIZE)
    with pytest.raises(UnsoundError, match=r"AdaptiveAvgPool2d"):
        RegionScorer.from_module(nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1)), NAMES, SIZE)


def test_module_that_decides_on_pixels_refused():
    with pytest.raises(UsageError, match="lets values of the image decide"):
        RegionScorer.from_module(with_layer(HiddenMean()), NAMES, SIZE)


def test_module_refused_leaves_the_next_alone():
    net = with_layer(nn.GroupNorm(2, 6))
    refused(UnsoundError, None, RegionScorer.from_module, net, NAMES, SIZE)
    net[2] = nn.Identity()
    assert RegionScorer.from_module(net, NAMES, SIZE).grid().receptive_field == (3, 3)


def test_module_class_names_have_to_match():
    with pytest.raises(UsageError, match="the module has 3 output channels for 2 class names"):
        RegionScorer.from_module(small_net(), ["a", "b"], SIZE)
    refused(UsageError, "at least two class names, got 1", RegionScorer.from_module, small_net(classes=1), ["a"], SIZE)


def test_module_channels_have_to_match():
    message = "to have 1 channels, but got 3.*one channel for each value of mean and std, 3 here"
    refused(UsageError, message, RegionScorer.from_module, small_net(1), NAMES, SIZE)
    with pytest.raises(UsageError, match=r"to have 3 channels, but got 1.* 1 here"):
        RegionScorer.from_module(small_net(), NAMES, SIZE, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": 0.0}, "scale of the fixed-point head must be positive"),
        ({"mean": (0.5,)}, "three values .* got 1 and 3"),
        ({"mean": (0.5,) * 4, "std": (0.5,) * 4}, "got 4 and 4"),
        ({"std": (0.5, 0.0, 0.5)}, "std must be positive"),
        ({"mean": (0.5, float("nan"), 0.5)}, "must be finite"),
        ({"image_size": (0, 8)}, "each at least 1"),
    ],
)
def test_module_arguments_out_of_range(options, message):
    arguments = {"class_names": NAMES, "image_size": SIZE, **options}
    refused(UsageError, message, RegionScorer.from_module, small_net(), **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.double(), r"must be float32, got torch\.float64"),
        *[
            (
                lambda net, value=value: net.weight.data[0, 0].fill_(value),
                "'weight' of the module has values that are not finite",
            )
            for value in (float("nan"), float("inf"))
        ],
        (lambda net: setattr(net, "forward", lambda x: (x, x)), "must return one map"),
    ],
)
def test_modules_refused(change, message):
    net = nn.Conv2d(3, 3, 1)
    change(net)
    refused(UsageError, message, RegionScorer.from_module, net, NAMES, SIZE)
