"""The machinery of mutants: copies are what the tests run against, and mutants that no longer fit are named.

Whether every mutant fits the sources is not asked here but by `make mutants`: the table pins exact source text, and
renaming a local variable must not fail the tests.
"""

from collections import Counter

import pytest

from tests.mutants.copies import FAILED, PASSED, SOURCE, Mutant, StaleMutantError, run, server
from tests.mutants.run import FAST_TESTS, check, result
from tests.mutants.table import MUTANTS

QUICK = ["tests/unit/test_threat.py::test_the_last_row_and_column_are_placements"]


def named(name: str) -> Mutant:
    (found,) = (mutant for mutant in MUTANTS if mutant.name == name)
    return found


def test_names_say_which_mutant_is_meant():
    assert len(MUTANTS) >= 50
    assert Counter(mutant.name for mutant in MUTANTS).most_common(1)[0][1] == 1
    assert len({mutant.edits for mutant in MUTANTS}) == len(MUTANTS)
    assert {edit[0].split("/")[0] for mutant in MUTANTS for edit in mutant.edits} == {
        "threat.py", "aggregation.py", "proofs", "grid.py", "scores.py", "devices.py", "nets", "locality", "exporting",
        "rules", "data", "defenses",
    }  # fmt: skip


def test_trial_runs_against_a_copy():
    context = server(preload=False)
    mutant = named("the last row is no placement")
    trial = run(context, mutant, QUICK)
    assert (trial.code, trial.killed) == (FAILED, True)
    assert trial.failure.startswith(QUICK[0])
    sound = run(context, None, QUICK)
    assert (sound.code, sound.killed) == (PASSED, False)
    assert "placements" in (SOURCE / "bagcert/threat.py").read_text()  # untouched
    score = result({mutant.name: trial, "harmless": sound}, ["gone"], 1.0)
    assert (score["mutants"], score["killed"], score["survived"]) == (3, 1, ["harmless"])
    assert (score["stale"], score["broken"]) == (["gone"], [])


def test_a_mutant_whose_text_is_gone_is_stale():
    with pytest.raises(StaleMutantError, match=r"0 times in threat\.py"):
        Mutant("old", (("threat.py", "no such line", ""),)).changed(SOURCE / "bagcert")


def test_check_names_the_mutants_that_do_not_fit(capsys):
    stale = Mutant("old", (("threat.py", "no such line", ""),))
    assert check([stale]) == 1
    assert capsys.readouterr().out == (
        "stale     old: 'no such line' is 0 times in threat.py, not once\n0 of 1 mutants fit the sources\n"
    )
    assert check([named("the last row is no placement")]) == 0


def test_the_fast_tests_are_there():
    root = SOURCE.parent
    assert all((root / test.split("::")[0]).exists() for test in FAST_TESTS)
