"""The demo, end to end: train on the embedded digits, certify the held-out ones."""

import json
import subprocess
import sys

import numpy as np
import pytest

from bagcert.data import load_dataset
from bagcert.defenses.bagcert import load
from bagcert.evaluation.evaluate import evaluate


@pytest.mark.timeout(600)
def test_demo_trains_and_certifies_above_its_floor():
    done = subprocess.run(
        [sys.executable, "-m", "bagcert", "demo", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    run = json.loads(done.stdout)
    assert run["data"] == "digits"
    assert run["split"] == "test"
    rows = {tuple(row["patch"]): row for row in run["results"] if row["rule"] == "double-masking"}
    assert rows[1, 1]["clean_accuracy"] >= 0.95
    assert rows[2, 2]["clean_accuracy"] >= 0.95
    assert rows[1, 1]["certified_accuracy"] >= 0.70
    assert rows[2, 2]["certified_accuracy"] >= 0.55


def test_shipped_digits_model_holds_what_its_results_say():
    model = load("digits")
    run = evaluate(model, "digits", patches=["1", "2"])
    for row, floor in zip(run.info.results, (0.70, 0.55), strict=True):
        assert row.clean_accuracy >= 0.95
        assert row.certified_accuracy >= floor
        assert row.certified_accuracy <= row.clean_accuracy


def test_double_masking_certifies_what_the_vote_does():
    model = load("digits")
    model.scorer.head = "binary"  # the same network, its scores cut to [z > 0]
    score_map = model.score_map(load_dataset("digits", "test").array())
    for patch in ("1", "2", "1x3"):
        vote = model.certify_scores(score_map, patch, rule="vote")
        masking = model.certify_scores(score_map, patch, rule="double-masking")
        assert vote.certified.any()
        assert masking.certified[vote.certified].all()
        assert (masking.prediction == vote.prediction)[vote.certified].all()
        assert masking.certified.sum() > vote.certified.sum()


@pytest.mark.parametrize("rule", ["double-masking", "vote"])
def test_no_patch_pasted_anywhere_changes_a_certified_answer(rule):
    model = load("digits")
    if rule == "vote":
        model.scorer.head = "binary"
    images = load_dataset("digits", "test").array()
    certificate = model.certify(images, 2, rule=rule)
    chosen = certificate.certified.nonzero()[:12, 0].tolist()
    assert chosen
    random = np.random.default_rng(0)
    contents = [np.zeros((2, 2, 3)), np.full((2, 2, 3), 255), random.integers(0, 256, (2, 2, 3))]
    for image in chosen:
        attacked = np.repeat(images[image][None], 49 * len(contents), axis=0)
        placements = [(top, left) for top in range(7) for left in range(7)]
        for number, (top, left) in enumerate(placements):
            for kind, content in enumerate(contents):
                attacked[number * len(contents) + kind, top : top + 2, left : left + 2] = content
        assert (model.predict(attacked, 2, rule=rule) == certificate.prediction[image]).all()
