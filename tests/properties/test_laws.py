"""What must hold between threats and between orders of the classes."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from bagcert.errors import UsageError
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests.properties.test_exactness import cases, pytestmark, relaxed  # noqa: F401

VOTES = ("vote", "levine-feizi")


def margins(score_map, threat, rules=VOTES):
    return torch.stack([RULES[name].certify(score_map, threat).margin for name in rules])


@relaxed
@given(cases(most_patches=1))
def test_a_larger_patch_never_has_a_larger_vote_margin(case):
    image_size = case.threat.image_size
    previous = None
    for side in range(1, min(image_size) + 1):
        found = margins(case.score_map, PatchThreatModel(image_size, ((side, side),)))
        assert previous is None or bool((found <= previous).all())
        previous = found


@relaxed
@given(cases(most_patches=1), st.tuples(st.integers(1, 3), st.integers(1, 3)))
def test_more_shapes_patches_and_placements_never_help(case, shape):
    threat = case.threat
    plain = PatchThreatModel(threat.image_size, threat.shapes)
    more_shapes = PatchThreatModel(threat.image_size, (*threat.shapes, shape))
    two = PatchThreatModel(threat.image_size, threat.shapes, 2)
    found = margins(case.score_map, plain)
    assert bool((margins(case.score_map, more_shapes) <= found).all())
    assert bool((margins(case.score_map, two) <= found).all())
    assert bool((margins(case.score_map, threat) >= found).all())  # the case's threat may allow fewer placements


@relaxed
@given(cases(most_patches=1), st.integers(0, 2**30))
def test_fewer_allowed_placements_never_hurt_the_vote(case, seed):
    if case.threat.allowed is None:
        return
    allowed = case.threat.allowed & (np.random.default_rng(seed).random(case.threat.image_size) < 0.8)
    try:
        fewer = PatchThreatModel(case.threat.image_size, case.threat.shapes, 1, allowed)
    except UsageError:  # no room left
        return
    assert bool((margins(case.score_map, fewer) >= margins(case.score_map, case.threat)).all())


@relaxed
@given(cases(), st.randoms(use_true_random=False))
def test_another_order_of_the_classes_moves_labels_not_certificates(case, random):
    score_map = case.score_map
    order = list(range(score_map.classes))
    random.shuffle(order)
    permuted = ScoreMap(score_map.scores[:, order], score_map.low, score_map.high, score_map.grid)
    for rule in RULES.values():
        before, after = rule.certify(score_map, case.threat), rule.certify(permuted, case.threat)
        clear = before.margin >= 1  # at least 1 ahead outside every mask: there the tie rule has no say
        if rule.name == "detection":  # whose answer is the plain one, which a mask may be what decides
            first, second = score_map.class_sums.topk(2).values.T
            clear &= first > second
        assert bool((after.certified | ~clear).all())
        assert bool(((after.margin - before.margin).abs() <= 1)[clear].all())
        assert torch.equal(torch.tensor(order)[after.prediction][clear], before.prediction[clear])


@relaxed
@given(cases())
def test_transposing_image_and_map_changes_no_vote(case):
    threat = case.threat
    turned = PatchThreatModel(
        threat.image_size[::-1],
        tuple((w, h) for h, w in threat.shapes),
        threat.patches,
        None if threat.allowed is None else threat.allowed.T,
    )
    assert torch.equal(margins(case.score_map, threat), margins(case.score_map.transposed(), turned))
