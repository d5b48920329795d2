"""Attacks on models that pool regions by attention: they know the readout, they succeed, and no certificate breaks."""

import numpy as np
import pytest
import torch

from bagcert.attacks import attack
from bagcert.attacks.candidates import candidates
from bagcert.attacks.objectives import UNTARGETED, objective
from bagcert.attacks.patches import every_placement, paste
from bagcert.attacks.settings import Settings
from bagcert.attacks.surrogate import LocalSurrogate, surrogate_of
from bagcert.attacks.victim import Victim
from bagcert.defenses.bagcert import BagCert
from bagcert.threat import PatchThreatModel
from tests import tiny

pytestmark = pytest.mark.slow

LABELS = np.arange(24) % 3


def network(size=(12, 10)):
    """A small convolutional network with a random readout, whose answers depend on the image."""
    torch.manual_seed(3)
    facts = {"width": 12, "std": [0.3] * 3, "class_names": ["a", "b", "c", "d"], "image_size": size}
    config = tiny.attention_config(**facts)
    scorer = config.build().eval()
    torch.nn.init.normal_(scorer.readout.position)
    with torch.no_grad():
        scorer.net[-1].weight *= 6
        scorer.readout.second.weight *= 3
        noise = np.random.default_rng(1).integers(0, 256, (32, *size, 3), dtype=np.uint8)
        z = scorer.real_scores(noise)
        scorer.net[-1].bias -= z.mean((0, 2, 3))
        means = scorer.form.class_scores(scorer.integers(z).float().sum((2, 3)), z[0, 0].numel()).mean(0)
        scorer.readout.skip.bias -= means / 4096
    return scorer


def victim_of(rule="double-masking", patch="2", images=6):
    scorer = network()
    pixels = np.random.default_rng(0).integers(0, 256, (images, 12, 10, 3), dtype=np.uint8)
    model = BagCert(scorer, rule, patch=patch)
    return Victim(model, pixels, PatchThreatModel.parse(patch, (12, 10)), rule)


@pytest.mark.parametrize("patch", ["2", "1x3+3x1", "2*1"])
def test_maps_and_answers_are_those_of_the_front_door(patch):
    victim = victim_of(patch=patch)
    surrogate = surrogate_of(victim)
    assert isinstance(surrogate, LocalSurrogate)
    places = every_placement(victim.threat)
    places = places[torch.tensor([0, 1, len(places) // 2, len(places) // 3, len(places) - 2, len(places) - 1])]
    places = places[:, None].expand(-1, victim.threat.patches, -1)
    generator = torch.Generator().manual_seed(1)
    contents = torch.randint(0, 256, (6, victim.threat.patches, 3, 3, 3), generator=generator)
    image = torch.arange(6)
    found = surrogate.maps(image, contents.float(), places)
    patched = paste(victim.images, contents.to(torch.uint8), places)
    expected = victim.defense.score_map(patched.numpy())
    moved = (found.long() != expected.scores).float().mean()
    assert moved < 0.01  # a crop sums in another order
    answers = victim.defense.predict(patched.numpy(), victim.threat, rule=victim.rule)
    maps = expected.scores.float()
    assert torch.equal(surrogate.changed(image, maps), answers != victim.prediction)
    assert not surrogate.changed(image, surrogate.clean).any()


@pytest.mark.parametrize("kind", ["every-mask", "most-masks", "sum"])
def test_objectives_are_those_of_plain_integers(kind):
    victim = victim_of(images=4)
    surrogate, scorer = surrogate_of(victim), victim.defense.scorer
    windows = surrogate.windows
    rival, left_out = torch.tensor([0, 1, 2, 3]), torch.tensor([-1, 0, 7, 3])
    with torch.no_grad():
        found = objective(
            kind, surrogate.clean, victim.prediction, rival, windows, left_out, surrogate.class_scores
        ).tolist()
    for row in range(4):
        evidence = surrogate.clean[row].long().numpy()
        fixed = windows.masks[left_out[row]].numpy() & (kind == "every-mask") & bool(left_out[row] >= 0)
        masks = [np.zeros_like(fixed)] if kind == "sum" else [mask.numpy() for mask in windows.masks]
        leads = []
        for mask in masks:
            scores = tiny.readout_scores(scorer.form.pooling, evidence, mask | fixed)
            own = scores.pop(int(rival[row]))
            leads.append(max(scores) - own)
        won = sum(lead <= found[row] for lead in leads) / len(leads)
        assert found[row] in leads
        assert won == 1 if kind != "most-masks" else won > 0.5


def test_gradients_reach_the_patch_and_descend():
    victim = victim_of()
    surrogate = surrogate_of(victim)
    contents = torch.full((6, 1, 2, 2, 3), 128.0, requires_grad=True)
    places = torch.tensor([[[5, 6, 2, 2]]]).expand(6, 1, 4)
    image, rival = torch.arange(6), torch.full((6,), UNTARGETED)

    def loss(values):
        maps = surrogate.maps(image, values, places)
        return objective("sum", maps, victim.prediction, rival, class_scores=surrogate.class_scores)

    before = loss(contents)
    (slope,) = torch.autograd.grad(before.sum(), contents)
    assert (slope.flatten(1).abs().amax(1) > 0).all()
    assert loss(contents.detach() - 60 * slope.sign()).sum() < before.sum()


@pytest.mark.parametrize("rule", ["double-masking", "detection"])
def test_candidates_whose_masks_fail_come_first(rule):
    """For each image the first candidate's window, and its second mask, leave the rival ahead, where any does."""
    victim = victim_of(rule)
    surrogate, scorer = surrogate_of(victim), victim.defense.scorer
    found = candidates(victim, surrogate, 3, torch.Generator().manual_seed(0))
    assert ((found.rival >= 0) & (found.rival < 4)).all()
    masks = [mask.numpy() for mask in surrogate.windows.masks]
    failing = 0
    for row in range(6):
        evidence, label = surrogate.clean[row].long().numpy(), int(victim.prediction[row])

        def fails(mask, rival, evidence=evidence, label=label):
            scores = tiny.readout_scores(scorer.form.pooling, evidence, mask)
            return scores[label] <= scores[rival]

        pairs = [a | b for a in masks for b in masks] if rule == "double-masking" else masks
        if not any(fails(mask, rival) for mask in pairs for rival in range(4) if rival != label):
            continue
        failing += 1
        rival, partner = int(found.rival[row, 0, 0]), int(found.left_out[row, 0, 0])
        place = found.placement[row, 0, 0].tolist()
        at = surrogate.windows.placements.tolist().index(place)
        second = masks[partner] if rule == "double-masking" else np.zeros_like(masks[0])
        assert fails(masks[at] | second, rival)
    assert failing > 1


@pytest.mark.parametrize("rule", ["double-masking", "detection"])
@pytest.mark.parametrize("names", [["gradient"], ["score-map"]])
def test_attacks_break_what_is_not_certified_and_nothing_else(rule, names):
    scorer = network()
    images = np.random.default_rng(5).integers(0, 256, (16, 12, 10, 3), dtype=np.uint8)
    labels = np.arange(16) % 4
    settings = Settings(steps=15, placements=6)
    found = attack(BagCert(scorer, rule, patch="2"), images, labels, "2", attacks=names, settings=settings)
    certified = np.array([record.certified for record in found.records])
    broken = np.array([record.broken for record in found.records])
    assert certified.any()
    assert not (certified & broken).any()
    assert broken[~certified].mean() > 0.5


@pytest.mark.parametrize("patch", ["2", "2*1", "area:4"])
def test_attacks_on_a_model_worked_out_by_hand(patch):
    size = (5, 4) if patch == "2*1" else (8, 8)
    images = tiny.pixels(LABELS, size, tint=25)
    settings = Settings(steps=5, placements=4)
    found = attack(tiny.attention_model(patch=patch, size=size), images, LABELS, patch, settings=settings)
    certified = [record for record in found.records if record.certified]
    assert certified
    assert not any(record.broken for record in certified)
    assert any(record.broken for record in found.records)
