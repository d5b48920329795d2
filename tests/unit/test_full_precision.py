"""One switch for all threads: full precision while any is inside, the user's setting afterwards."""

import sys
import threading
from contextlib import ExitStack

import numpy as np
import pytest
import torch

import bagcert
from bagcert.devices import full_precision, product_precision
from bagcert.errors import UnsoundError
from bagcert.grid import RegionGrid
from bagcert.rules import RULES
from bagcert.scores import ScoreMap
from bagcert.threat import PatchThreatModel
from tests import oracle, refused

FULL = {"ieee"}


@pytest.fixture(params=["highest", "high", "medium"])
def setting(request):
    """What the user has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield product_precision()
    torch.set_float32_matmul_precision(before)


def test_precision_full_inside_and_restored(setting):
    with full_precision():
        assert set(product_precision()) <= FULL
        with full_precision():
            assert set(product_precision()) <= FULL
        assert set(product_precision()) <= FULL
    assert product_precision() == setting


def test_error_inside_restores_precision(setting):
    with pytest.raises(ZeroDivisionError), full_precision():
        1 / 0  # noqa: B018
    assert product_precision() == setting


def test_precision_full_until_the_last_leaves(setting):
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(full_precision())
        second.enter_context(full_precision())
        first.close()
        assert set(product_precision()) <= FULL
        second.close()
        assert product_precision() == setting


@pytest.mark.parametrize("noticed_by", ["the one inside", "the next to enter", "another that leaves"])
def test_setting_made_meanwhile_kept_and_told(setting, noticed_by):
    """In whatever thread: what counts is that it was made between entering and leaving."""
    inside, other = full_precision(), full_precision()
    inside.__enter__()
    if noticed_by == "another that leaves":
        other.__enter__()
    torch.set_float32_matmul_precision("medium")
    own = product_precision()
    if noticed_by == "the next to enter":
        with full_precision():  # which came later, and has full precision all the time
            assert set(product_precision()) <= FULL
    elif noticed_by == "another that leaves":
        refused(UnsoundError, "set it before or after", other.__exit__, None, None, None)
        assert set(product_precision()) <= FULL
    refused(UnsoundError, "another thread changed the precision", inside.__exit__, None, None, None)
    assert product_precision() == own
    with full_precision():  # and nothing is left of it
        pass
    assert product_precision() == own


def test_threads_count_exactly(setting):
    """Scores whose sums end in an odd number beyond what bfloat16 and TF32 hold, against the definitions."""
    grid = RegionGrid.from_axis(2, 1, 0, (6, 7))
    scores = np.random.default_rng(0).integers(-2047, 2048, (2, 3, *grid.map_size))
    scores[:, 1] = np.minimum(scores[:, 1] + 3000, 2047)
    score_map = ScoreMap(torch.as_tensor(scores), -2047, 2047, grid)
    threat = PatchThreatModel.parse("2", (6, 7))
    masks = oracle.mask_set(grid.rows_seen, grid.cols_seen, threat.shapes)
    truth = [oracle.double_masking(one, masks) for one in scores]
    rounds, start, wrong = 25, threading.Barrier(3), []

    def work():
        start.wait()
        for _ in range(rounds):
            found = RULES["double-masking"].certify(score_map, threat)
            if list(zip(found.prediction.tolist(), found.margin.tolist(), strict=True)) != truth:
                wrong.append(found.margin.tolist())

    threads, before = [threading.Thread(target=work) for _ in range(3)], sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []
    assert product_precision() == setting


def test_a_model_is_loaded_whatever_is_set_by_backend(monkeypatch, tmp_path):
    monkeypatch.setenv("BAGCERT_CACHE", str(tmp_path))
    before = torch.backends.mkldnn.matmul.fp32_precision
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert bagcert.load("digits", device="cpu").locality.consequence == "exact"
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = before
