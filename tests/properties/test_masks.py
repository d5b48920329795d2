"""Under a mask every promised rectangle in its white part is one the attacker may use."""

import numpy as np
import pytest

import bagcert
from bagcert.data import load_dataset
from tests.properties.masks import count


def test_no_patch_within_a_mask_breaks_a_certificate():
    totals = count(40, seed=3, pixels_every=8)
    assert totals["smaller_shapes"] > 10
    assert totals["several_patches"] > 5
    assert totals["attacked_certificates"] > 60
    assert totals["broken_certificates"] == totals["disagreements"] == totals["records_refused"] == 0


@pytest.mark.parametrize("patch", ["area:9", "3"])
def test_a_rectangle_that_fits_where_no_largest_one_does_changes_no_certified_digit(patch):
    model, random = bagcert.load("digits"), np.random.default_rng(0)
    digits = load_dataset("digits", "test", limit=40).array()
    allowed = np.zeros((8, 8), bool)
    allowed[:3, :3] = True  # room for 3x3
    allowed[3:5, 3:6] = True  # and for 2x3 px in the middle
    threat = bagcert.PatchThreatModel.parse(patch, (8, 8), allowed)
    certificate = model.certify(digits, threat)
    certified = np.flatnonzero(certificate.certified.numpy())
    assert 5 < len(certified) < 40
    for number in certified:
        attacked = np.repeat(digits[number][None], 100, 0)
        attacked[:, 3:5, 3:6] = random.choice([0, 255], (100, 2, 3, 1))
        assert (model.predict(attacked, threat) == certificate.prediction[number]).all()
