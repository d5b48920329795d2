"""Mutated certificate records: none crashes the checker, and what it accepts follows from what it holds."""

import numpy as np

from tests.properties import records
from tests.properties.records import agrees, count, honest


def test_no_mutated_record_is_wrongly_accepted() -> None:
    totals = count(300, seed=3)
    assert totals["wrongly_accepted"] == totals["crashed"] == totals["over_time_limit"] == 0
    assert totals["honest_refused"] == 0
    assert totals["accepted"] > 20


def test_the_brute_force_refuses_another_verdict() -> None:
    random = np.random.default_rng(0)
    for _ in range(20):
        case = honest(random)
        assert agrees(case.record, case.readout)
        case.record["verdict"]["margin"] += 1
        assert not agrees(case.record, case.readout)


def test_what_a_careless_checker_accepts_is_counted(monkeypatch) -> None:
    careless = records.verify_record({}).__class__(True, "")
    monkeypatch.setattr(records, "verify_record", lambda *_: careless)
    totals = count(40, seed=0)
    assert totals["wrongly_accepted"] > 5
    monkeypatch.setattr(records, "verify_record", lambda *_: 1 / 0)
    totals = {"accepted": 0, "wrongly_accepted": 0, "crashed": 0, "over_time_limit": 0}
    case = honest(np.random.default_rng(1))
    records.check([records.line_of(case.record, np.random.default_rng(0))], totals)
    assert totals["crashed"] == 1
