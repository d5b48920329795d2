"""No certificate can be broken, and the vote refuses none that holds."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings

from bagcert.grid import RegionGrid
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle
from tests.properties.agreement import breaks
from tests.properties.cases import Case, attacked, build, from_generator
from tests.properties.test_exactness import cases, pytestmark, relaxed  # noqa: F401


@settings(relaxed, max_examples=20)
@given(cases())
def test_no_attack_breaks_a_certificate(case):
    for name, rule in RULES.items():
        found = rule.certify(case.score_map, case.threat)
        for image in found.certified.nonzero()[:, 0].tolist():
            assert not breaks(case, image, name, int(found.prediction[image])), name


@relaxed
@given(cases(most_patches=1))
def test_an_uncertified_vote_can_be_overturned(case):
    assume(case.score_map.grid.masks_per_axis is None)  # merged windows are larger than what a patch reaches
    found = RULES["vote"].certify(case.score_map, case.threat)
    for image in (~found.certified).nonzero()[:, 0].tolist():
        labels = {oracle.plain_prediction(scores) for scores in attacked(case, image, limit=1)}
        assert labels - {int(found.prediction[image])}


@settings(relaxed, max_examples=60)
@given(cases(most_patches=1))
def test_double_masking_certifies_what_the_vote_does(case):
    masks = case.masks
    if case.threat.allowed is not None or any((a | b).all() for a in masks for b in masks):
        return
    vote, masked = (RULES[name].certify(case.score_map, case.threat) for name in ("vote", "double-masking"))
    assert bool((masked.certified | ~vote.certified).all())
    assert torch.equal(masked.prediction[vote.certified], vote.prediction[vote.certified])
    assert bool((masked.margin >= vote.margin)[vote.certified].all())


@relaxed
@given(cases())
def test_counting_regions_is_never_better_than_the_vote(case):
    vote, counting = (RULES[name].certify(case.score_map, case.threat) for name in ("vote", "levine-feizi"))
    assert bool((counting.margin <= vote.margin).all())


@pytest.mark.parametrize("rule", ["vote", "double-masking"])
def test_every_content_of_every_placement_leaves_the_deployed_answer(rule):
    """Exhaustive on binary maps: all contents, and the prediction taken literally from the definitions."""
    generator = np.random.default_rng(5)
    grid = RegionGrid.from_axis(2, 1, 0, (4, 5))
    threat = PatchThreatModel(grid.image_size, ((1, 1),))
    checked = 0
    while checked < 4:
        scores = generator.integers(0, 2, (1, 2, *grid.map_size)).astype(np.int16)
        scores[:, 1] |= generator.integers(0, 4, (1, *grid.map_size)) > 0
        case = Case(ScoreMap(torch.as_tensor(scores), 0, 1, grid), threat)
        found = RULES[rule].certify(case.score_map, threat)
        if not found.certified[0]:
            continue
        checked += 1
        predict = oracle.plain_prediction
        if rule == "double-masking":
            masks = case.masks
            predict = lambda scores, masks=masks: oracle.double_masking_prediction(scores, masks)  # noqa: E731
        for reach in case.reaches[:: 3 if rule == "double-masking" else 1]:
            for changed in list(oracle.every_content(scores[0], reach, 0, 1))[:: 4 if rule == "double-masking" else 1]:
                assert predict(changed) == int(found.prediction[0])


def test_scores_at_both_ends_of_the_fixed_point_range():
    """A patch may drive every score it reaches to the ends; sums must stay exact and certificates hold."""
    generator = np.random.default_rng(2)
    choose = from_generator(generator)
    for _ in range(10):
        case = build(choose, most_patches=1)
        ends = generator.choice([-2047, 2047], case.scores.shape).astype(np.int16)
        ends[:, 0][generator.random(ends[:, 0].shape) < 0.8] = 2047
        case = Case(ScoreMap(torch.as_tensor(ends), -2047, 2047, case.score_map.grid), case.threat)
        for name, rule in RULES.items():
            found = rule.certify(case.score_map, case.threat)
            for image in found.certified.nonzero()[:, 0].tolist():
                assert not breaks(case, image, name, int(found.prediction[image]))
