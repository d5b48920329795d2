"""Every rule equals the definitions, to the unit, ties included."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from tests import oracle
from tests.properties.agreement import count, expected
from tests.properties.cases import Case, build

# beartype samples what it checks with `random`, also while a strategy builds a case
pytestmark = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
relaxed = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw, **limits) -> Case:
    def choose(many, low, high):
        return draw(st.lists(st.integers(low, high), min_size=many, max_size=many))

    return build(choose, **limits)


def assert_exact(case: Case) -> None:
    for name, rule in RULES.items():
        found = rule.certify(case.score_map, case.threat)
        assert torch.equal(found.certified, found.margin >= 0)
        assert torch.equal(found.prediction, rule.predict(case.score_map, case.threat))
        for image in range(len(found)):
            assert (int(found.prediction[image]), int(found.margin[image])) == expected(case, image)[name], name


@relaxed
@given(cases(most_patches=1))
def test_one_patch_equals_the_definitions(case):
    assert_exact(case)


@settings(relaxed, max_examples=20)
@given(cases(most_patches=3))
def test_several_patches_equal_the_definitions(case):
    assert_exact(case)


@relaxed
@given(cases())
def test_double_masking_is_certified_exactly_when_every_pair_agrees(case):
    found = RULES["double-masking"].certify(case.score_map, case.threat)
    for image, scores in enumerate(case.scores):
        assert bool(found.certified[image]) == oracle.double_masking_certified(scores, case.masks)


@relaxed
@given(cases())
def test_no_alert_means_certified_for_detection(case):
    found = RULES["detection"].certify(case.score_map, case.threat)
    for image, scores in enumerate(case.scores):
        assert bool(found.certified[image]) != oracle.alert(scores, case.masks)


@relaxed
@given(cases(most_patches=1))
def test_the_worst_placement_of_a_vote_is_where_the_margin_is_attained(case):
    found = RULES["vote"].certify(case.score_map, case.threat)
    for image, scores in enumerate(case.scores):
        reach = case.mask_at(found.worst_placement[image, 0].tolist())  # admissible, or this fails
        label, margin = oracle.vote(scores, [reach], case.score_map.low, case.score_map.high)
        assert (label, margin) == (int(found.prediction[image]), int(found.margin[image]))


@relaxed
@given(cases())
def test_worst_placements_are_admissible_and_masks_attain_the_margin(case):
    admissible = {(*corner, *shape) for (shape, *corner), _ in oracle.reaches(*case.geometry)}
    for name, windows in (("vote", 1), ("detection", 1), ("double-masking", 2)):
        found = RULES[name].certify(case.score_map, case.threat).worst_placement
        assert found.shape == (len(case.score_map), windows * case.threat.patches, 4)
        assert {tuple(placement) for placement in found.reshape(-1, 4).tolist()} <= admissible
    if case.threat.patches > 1 or case.threat.allowed is not None:
        return
    found = RULES["double-masking"].certify(case.score_map, case.threat)
    for image, scores in enumerate(case.scores):
        first, second = (case.mask_at(placement) for placement in found.worst_placement[image].tolist())
        label = int(found.prediction[image])
        left = scores[:, ~(first | second)].astype(int).sum(1)
        margin = min(left[label] - left[c] - (c < label) for c in range(len(left)) if c != label)
        capped = any((a | b).all() for a in case.masks for b in case.masks)
        assert (min(margin, -1) if capped else margin) == int(found.margin[image])


@relaxed
@given(cases(), st.integers(-40000, 40000))
def test_only_differences_of_scores_matter(case, offset):
    """A declared range far from 0 must not cost exactness."""
    shift = offset * 1000
    score_map = case.score_map
    moved = ScoreMap(score_map.scores.long() + shift, score_map.low + shift, score_map.high + shift, score_map.grid)
    for name, rule in RULES.items():
        if name == "robust-masking":  # whose evidence starts at 0
            continue
        before, after = rule.certify(score_map, case.threat), rule.certify(moved, case.threat)
        assert torch.equal(before.margin, after.margin)
        assert torch.equal(before.prediction, after.prediction)


@relaxed
@given(cases())
def test_a_batch_is_its_images(case):
    for rule in RULES.values():
        together = rule.certify(case.score_map, case.threat)
        for image in range(len(case.score_map)):
            alone = rule.certify(case.score_map[image : image + 1], case.threat)
            assert torch.equal(alone.margin[0], together.margin[image])
            assert torch.equal(alone.prediction[0], together.prediction[image])
            assert torch.equal(alone.worst_placement[0], together.worst_placement[image])


def test_agreement_script():
    totals = count(60, seed=1, attack_every=4)
    assert totals["cases"] == 60
    assert totals["ties"] > 10
    assert totals["attacked_certificates"] > 10
    assert totals["disagreements"] == totals["broken_certificates"] == totals["vote_certified_not_double_masking"] == 0


def test_maps_with_the_classes_side_by_side_in_memory_equal_the_definitions(monkeypatch):
    """As maps of many classes are laid out; here tiny ones too."""
    monkeypatch.setattr("bagcert.scores.MANY_CLASSES", 2)
    found = count(120, seed=11, attack_every=10**9)
    assert found["certified"] > 100
    assert found["ties"] > 10
    assert found["disagreements"] == 0
