"""What white-box attacks see: the score maps of the front door, with gradients; and objectives that mean something."""

import pytest
import torch

from bagcert.attacks.objectives import UNTARGETED, objective
from bagcert.attacks.patches import every_placement, paste
from bagcert.attacks.surrogate import LocalSurrogate, surrogate_of
from bagcert.attacks.victim import Victim
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UsageError
from bagcert.nets import get_architecture
from bagcert.nets.region_scorer import RegionScorer
from bagcert.rules import RULES
from bagcert.threat import PatchThreatModel
from tests import refused, tiny


def victim_of(architecture="resnet-rf5", head="fixed-point", padded=True, patch="3", size=(18, 20), rule="vote"):
    torch.manual_seed(0)
    net = get_architecture(architecture).build(4, 8, 2, padded)
    scorer = RegionScorer(net, "abcd", size, head, scale=200.0).eval()
    images = tiny.pixels(torch.arange(4).numpy() % 3, size)
    with torch.no_grad():  # so that half of the binary scores are 1
        net[-1].bias -= scorer.real_scores(images).mean((0, 2, 3))
    model = BagCert(scorer, rule, patch=patch)
    return Victim(model, images, PatchThreatModel.parse(patch, size), rule)


@pytest.mark.parametrize("head", ["fixed-point", "binary"])
@pytest.mark.parametrize(
    ("architecture", "padded", "patch"),
    [
        ("resnet-rf5", True, "3"),
        ("resnet-rf5", False, "2x4+4x2"),
        ("resnet-rf6s2", True, "3"),
        ("resnet-rf5", True, "2*2"),
    ],
)
def test_maps_are_those_of_the_front_door(architecture, padded, patch, head):
    victim = victim_of(architecture, head, padded, patch)
    surrogate = surrogate_of(victim)
    assert isinstance(surrogate, LocalSurrogate)
    assert (surrogate.crop is None) == (victim.threat.patches > 1)
    places = every_placement(victim.threat)
    places = places[torch.tensor([0, 1, len(places) // 2 + 3, len(places) - 1])]  # corners and the middle
    places = places[:, None].expand(-1, victim.threat.patches, -1)
    image = torch.arange(4)
    contents = torch.randint(0, 256, (4, victim.threat.patches, 4, 4, 3), generator=torch.Generator().manual_seed(1))
    found = surrogate.maps(image, contents.float(), places)
    patched = paste(victim.images, contents.to(torch.uint8), places)
    scores = victim.defense.score_map(patched.numpy()).scores
    different = found.long() != scores.long()
    assert different.float().mean() < 0.01  # another order of summation may round a score to its neighbor
    assert (found.long() - scores.long()).abs().max() <= 1
    assert not torch.equal(scores, victim.defense.score_map(victim.images.numpy()).scores)


@pytest.mark.parametrize("head", ["fixed-point", "binary"])
def test_gradients_reach_the_patch_and_descend(head):
    victim = victim_of(head=head)
    surrogate = surrogate_of(victim)
    contents = torch.full((4, 1, 3, 3, 3), 128.0, requires_grad=True)
    places = torch.tensor([[[5, 6, 3, 3]]]).expand(4, 1, 4)
    image = torch.arange(4)

    def loss(values):
        rival = torch.full((4,), UNTARGETED)
        return objective("sum", surrogate.maps(image, values, places), victim.prediction, rival).sum()

    before = loss(contents)
    (slope,) = torch.autograd.grad(before, contents)
    assert (slope.flatten(1).abs().amax(1) > 0).all()
    assert loss(contents.detach() - 60 * slope.sign()) < before


@pytest.mark.parametrize("rule", list(RULES))
def test_the_answer_on_a_map_is_the_rules(rule):
    victim = victim_of(rule=rule)
    surrogate = surrogate_of(victim)
    image = torch.arange(4)
    flipped = surrogate.clean.clone()
    flipped[image, victim.prediction] = -2047  # every region now denies the clean answer
    assert surrogate.changed(image, flipped).all()
    assert not surrogate.changed(image, surrogate.clean).any()


def test_sum_objective_sign():
    generator = torch.Generator().manual_seed(0)
    maps = torch.randint(-9, 10, (200, 4, 3, 3), generator=generator).float()
    label = torch.randint(0, 4, (200,), generator=generator)
    sums = maps.sum((2, 3))
    untied = sums.topk(2).values.diff(dim=1)[:, 0] != 0
    found = objective("sum", maps, label, torch.full((200,), UNTARGETED)) < 0
    assert torch.equal(found[untied], (sums.argmax(1) != label)[untied])
    rival = (label + 1) % 4
    wanted = objective("sum", maps, label, rival) < 0
    assert torch.equal(wanted[untied], (sums.argmax(1) == rival)[untied])


@pytest.mark.parametrize("kind", ["every-mask", "most-masks"])
def test_mask_objectives_are_those_of_plain_loops(kind):
    victim = victim_of()
    windows = surrogate_of(victim).windows
    generator = torch.Generator().manual_seed(0)
    rows, cols = windows.grid.map_size
    maps = torch.randint(-9, 10, (5, 4, rows, cols), generator=generator).float()
    rival, left_out = torch.tensor([0, 1, 2, 3, 0]), torch.tensor([-1, 0, 7, 3, -1])
    found = objective(kind, maps, rival, rival, windows, left_out)
    for row in range(5):
        leads = []
        for mask in windows.masks:
            away = mask | windows.masks[left_out[row]] if left_out[row] >= 0 and kind == "every-mask" else mask
            sums = (maps[row] * ~away).sum((1, 2)).tolist()
            own = sums.pop(int(rival[row]))
            leads.append(max(sums) - own)
        won = sum(lead <= float(found[row]) for lead in leads) / len(leads)
        assert found[row] in torch.tensor(leads)
        assert won == 1 if kind == "every-mask" else won > 0.5


def test_other_defences_have_no_gradients():
    victim = victim_of()
    victim.defense = object()
    refused(UsageError, "support BagCert and Undefended, got object; use the random attack", surrogate_of, victim)
