"""Validation in batches: the same figures as on all images at once, and the scale of the whole set."""

import numpy as np
import pytest
import torch

from bagcert.rules import get_rule
from bagcert.scores import FIXED_POINT_LIMIT
from bagcert.threat import PatchThreatModel
from bagcert.training.held_out import scale_of, validate, validation_scores
from tests import tiny


def test_scores_in_parts_are_the_scores_and_so_is_their_scale() -> None:
    model, images = tiny.color_model(), tiny.image_set()
    whole = model.scorer.real_scores(images.array())
    for batch in (7, 59, 60, 1000):
        parts = list(validation_scores(model.scorer, images.array(), batch))
        assert max(map(len, parts)) <= batch
        assert torch.equal(torch.cat(parts), whole)
        assert scale_of(parts) == FIXED_POINT_LIMIT / whole.abs().max().item()
    assert scale_of([torch.zeros(1, 2, 1, 1)]) == FIXED_POINT_LIMIT / 1e-6


@pytest.mark.parametrize("head", ["fixed-point", "binary"])
def test_figures_are_those_of_all_images_at_once(head: str) -> None:
    images = tiny.image_set(600)  # more than one batch
    recipe = tiny.recipe(defense__rule="double-masking", train__validate_images=580)
    threat = PatchThreatModel.parse("2", (8, 8))
    scorer = tiny.color_model().scorer
    scorer.head = head
    scorer.normalize.mean.fill_(0.5)  # so that binary scores differ
    found = validate(scorer, images.array(), images.labels, recipe, threat)
    assert found["validation_images"] == 580
    certificate = get_rule("double-masking").certify(scorer.score_map(images.array()[:580]), threat)
    right = certificate.prediction.numpy() == images.labels[:580]
    assert 0 < right.mean() < 1
    assert 0 < certificate.certified.float().mean() < 1
    assert found["clean_accuracy"] == pytest.approx(right.mean())
    assert found["certified_accuracy"] == pytest.approx((right & certificate.certified.numpy()).mean())
    if head == "fixed-point":
        assert scorer.scale == pytest.approx(FIXED_POINT_LIMIT / np.abs(images.array()[:580] / 255 - 0.5).max())
