"""Defenses that mask pixels can be attacked although their certificates name masks, not patches."""

import numpy as np
import pytest
import torch

from bagcert.attacks import Settings, attack
from bagcert.attacks.patches import every_placement, nearest_placements
from bagcert.attacks.victim import Victim
from bagcert.defenses.minority_reports import MinorityReports
from bagcert.defenses.patchcleanser import PatchCleanser
from bagcert.threat import PatchThreatModel
from tests.unit.defenses import masking


@pytest.mark.parametrize("patch", ["2", "1x3+2x1", "2*1"])
def test_the_random_attack_runs_on_masking_defenses(patch):
    model, images = masking.example(0, 4)
    pixels = (images * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    for build, options in ((PatchCleanser, {"masks_per_axis": 3}), (MinorityReports, {"stride": 3})):
        defense = build(model, masking.NAMES, masking.SIZE, patch=patch, **options)
        labels = defense.predict(pixels).numpy()
        found = attack(defense, pixels, labels, patch, attacks=["random"], settings=Settings(placements=3))
        assert found.certified_accuracy <= found.attacked_accuracy <= found.clean_accuracy
        if build is PatchCleanser:
            assert 0 < found.certified_accuracy < found.clean_accuracy


def test_a_wrong_answer_with_an_alert_breaks_nothing():
    model, images = masking.example(0, 6)
    pixels = (images * 255).round().astype(np.uint8).transpose(0, 2, 3, 1)
    threat = PatchThreatModel.parse(2, masking.SIZE)
    defense = MinorityReports(model, masking.NAMES, masking.SIZE, patch=2)
    victim = Victim(defense, pixels, threat, defense.rule)
    assert victim.detects
    cleanser = PatchCleanser(model, masking.NAMES, masking.SIZE, patch=2)
    assert not Victim(cleanser, pixels, threat, "patchcleanser").detects
    wrong = 0
    for color in (0, 255):
        for place in every_placement(threat):
            content = torch.full((6, 1, 2, 2, 3), color, dtype=torch.uint8)
            patched = pixels.copy()
            top, left = place[:2].tolist()
            patched[:, top : top + 2, left : left + 2] = color
            changed = defense.predict(patched) != victim.prediction
            found = victim.submit("color", torch.arange(6), content, place.expand(6, 1, 4))
            assert (found == (changed & ~defense.alert(patched))).all()
            wrong += int((changed & ~found).sum())
    assert wrong > 0


def test_the_nearest_placement_is_the_patch_in_the_middle():
    threat = PatchThreatModel.parse("2+1x4", (6, 7))
    places = every_placement(threat)
    assert (nearest_placements(threat, places) == places).all()
    masks = torch.tensor([[[0, 0, 4, 4], [2, 3, 4, 4]], [[5, 3, 1, 4], [0, 0, 6, 7]]])
    assert nearest_placements(threat, masks)[:, :, :2].tolist()[:1] == [[[1, 1], [3, 4]]]
    assert nearest_placements(threat, masks)[1, 0].tolist() == [5, 3, 1, 4]
    allowed = np.zeros((6, 7), dtype=bool)
    allowed[4:, 5:] = True
    confined = PatchThreatModel((6, 7), ((2, 2),), allowed=allowed)
    assert nearest_placements(confined, masks).tolist() == [[[4, 5, 2, 2]] * 2] * 2
