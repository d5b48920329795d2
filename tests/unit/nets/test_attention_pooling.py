import torch

from bagcert.nets.attention_pooling import UNITS, AttentionReadout, attention_masking_loss
from bagcert.scores import exact_arithmetic


def readout_and_map(seed=0, batch=5):
    torch.manual_seed(seed)
    readout = AttentionReadout(4, 12, 3, 8, (6, 5))
    torch.nn.init.normal_(readout.position)
    return readout, torch.randn(batch, readout.channels, 6, 5) * 2


def test_training_form_is_the_integer_readout():
    readout, z = readout_and_map()
    frozen = readout.frozen()
    evidence = readout.integers(z)
    assert torch.equal(evidence.float(), readout.evidence(z).detach())
    with exact_arithmetic(z.device):
        integer = frozen.scores(evidence.sum((2, 3)).float())
    assert torch.equal(integer, integer.round())
    real = readout(readout.evidence(z).sum((2, 3)))
    torch.testing.assert_close(integer / (UNITS * 128), real.detach(), atol=0.05, rtol=0)


def test_integers_stay_in_range_whatever_the_scores():
    readout, z = readout_and_map()
    z[0, :, 0, 0] = torch.nan
    z[1] = torch.inf
    z[2] = -torch.inf
    z[3] = 1e30
    evidence = readout.integers(z)
    assert evidence[:, 12:].min() >= 1
    assert evidence[:, 12:].max() <= 255
    assert evidence.abs().max() <= 255 * 511


def test_masking_loss_leaves_out_two_windows():
    readout, z = readout_and_map(batch=3)
    labels = torch.tensor([0, 1, 3])
    windows = torch.zeros(5, 6, 5)
    for row in range(5):
        windows[row, row : row + 2] = 1
    loss = attention_masking_loss(readout, z, labels, windows, full_weight=0.0)
    evidence = readout.evidence(z)
    for image in range(3):

        def cross_entropy(keep, image=image):
            return torch.nn.functional.cross_entropy(
                readout((evidence[image] * keep).sum((1, 2)))[None], labels[image : image + 1]
            )

        first = max(range(5), key=lambda w: cross_entropy(1 - windows[w]).item())
        keep = 1 - windows[first]
        second = max(range(5), key=lambda w: cross_entropy(keep * (1 - windows[w])).item())
        torch.testing.assert_close(loss[image], cross_entropy(keep * (1 - windows[second])))
    loss.sum().backward()
    assert readout.position.grad is not None
    assert readout.position.grad.abs().sum() > 0
