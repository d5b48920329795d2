"""The training loss on interval bounds against the certificates it trains for."""

import torch
from torch import nn

from bagcert.defenses.interval_bounds import IntervalBounds
from bagcert.defenses.pixel_masks import covered
from bagcert.errors import UsageError
from bagcert.nets import get_architecture
from bagcert.nets.classifier import MeanScores, in_sequence
from bagcert.nets.region_scorer import RegionScorer
from bagcert.threat import PatchThreatModel
from bagcert.training.interval import GROWTH, BoundedLoss
from tests import refused

NAMES, SIZE = ("red", "green", "blue"), (8, 8)
THREAT = PatchThreatModel.parse("2", SIZE)


def scorer(seed: int = 0) -> RegionScorer:
    torch.manual_seed(seed)
    net = get_architecture("convnet-rf10s4").build(3, 8, 1, True)
    return RegionScorer(net, NAMES, SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25)).eval()


def loss(network: RegionScorer, weight: float = 0.5) -> BoundedLoss:
    return BoundedLoss(network, THREAT, weight, torch.device("cpu"))


def test_the_sequence_is_the_same_classifier():
    network, images = scorer(), torch.rand(5, 3, *SIZE)
    assert torch.allclose(in_sequence(network)(images), MeanScores(network)(images), atol=1e-5)


def test_worst_logits_are_margins():
    network, images = scorer(), torch.rand(6, 3, *SIZE)
    certificate = IntervalBounds(in_sequence(network), NAMES, SIZE, patch="2").certify(images)
    bounded = loss(network)
    worst = []
    for box in bounded.boxes:
        hidden = covered(box[None], SIZE).expand(len(images), -1, -1)[:, None]
        ahead = bounded.worst_logits(images, hidden, 1.0, certificate.prediction)
        own = ahead.gather(1, certificate.prediction[:, None])
        assert (own == 0).all()
        worst.append(ahead.scatter(1, certificate.prediction[:, None], -torch.inf).amax(1))
    margins = -1000 * torch.stack(worst).amax(0)
    assert torch.allclose(margins, certificate.margin.double().float(), atol=3)


def test_boxes_grow_from_points_to_all_contents():
    network, images, labels = scorer(), torch.rand(4, 3, *SIZE), torch.tensor([0, 1, 2, 0])
    bounded, clean = loss(network, weight=0.0), torch.zeros(4)

    def at(share: float) -> torch.Tensor:
        return bounded(clean, images, labels, share, torch.Generator().manual_seed(0)).detach()

    plain = nn.functional.cross_entropy(MeanScores(network)(images), labels, reduction="none")
    assert torch.allclose(at(0.0), plain, atol=1e-3)
    assert (at(GROWTH / 2) > at(0.0)).all()
    assert (at(GROWTH) > at(GROWTH / 2)).all()
    assert torch.equal(at(GROWTH), at(1.0))


def test_training_on_it_raises_the_bounds():
    network, generator = scorer(), torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 3
    images = (0.2 * torch.rand(60, 3, *SIZE, generator=generator) + 0.6 * torch.eye(3)[labels][:, :, None, None]).clamp(
        0, 1
    )
    bounded, optimizer = loss(network), torch.optim.Adam(network.parameters(), 1e-2)

    def certified() -> int:
        certificate = IntervalBounds(in_sequence(network), NAMES, SIZE, patch="2").certify(images)
        return int((certificate.certified & (certificate.prediction == labels)).sum())

    before = certified()
    for step in range(60):
        clean = nn.functional.cross_entropy(MeanScores(network)(images), labels, reduction="none")
        optimizer.zero_grad()
        bounded(clean, images, labels, step / 60, generator).mean().backward()
        optimizer.step()
    assert certified() > before + 40


def test_other_networks_are_refused():
    residual = RegionScorer(get_architecture("resnet-rf3").build(3, 8, 1, True), NAMES, SIZE)
    refused(UsageError, "interval bounds do not support layer", loss, residual)
    strange = RegionScorer(nn.Sequential(nn.Conv2d(3, 3, 3)), NAMES, SIZE)
    refused(UsageError, "ends with a 1x1 convolution", loss, strange)
