"""Makes every mistake of the table in a copy of the sources, one at a time; the fast tests must notice each.

python -m tests.mutants.run --json --out mutants.json
python -m tests.mutants.run --check                    # only whether each fits the sources exactly once
"""

import argparse
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

from tests.mutants.copies import PASSED, SOURCE, Mutant, StaleMutantError, Trial, run, server
from tests.mutants.table import MUTANTS

# The quickest first: a mutant is done with at its first failure.
FAST_TESTS = [
    "tests/unit/test_threat.py",
    "tests/unit/test_grid.py",
    "tests/unit/test_scores.py",
    "tests/unit/test_full_precision.py::test_precision_full_inside_and_restored",
    "tests/unit/test_full_precision.py::test_precision_full_until_the_last_leaves",
    "tests/unit/test_full_precision.py::test_setting_made_meanwhile_kept_and_told",
    "tests/unit/nets/test_saved_model.py::test_config_refused",
    "tests/unit/nets/test_saved_model.py::test_mean_in_float32_digits",
    "tests/unit/nets/test_saved_model.py::test_normalization_beside_config_refused",
    "tests/unit/nets/test_saved_model.py::test_std_refused",
    "tests/unit/nets/test_saved_model.py::test_tensors_accepted",
    "tests/unit/nets/test_saved_model.py::test_tensors_refused",
    "tests/unit/locality/test_locality.py::test_bound_holds",
    "tests/unit/locality/test_locality.py::test_bound_attained",
    "tests/unit/locality/test_locality.py::test_bound_covers_the_normalized_image",
    "tests/unit/locality/test_locality.py::test_bound_ignores_signs",
    "tests/unit/locality/test_locality.py::test_bound_of_weights_infinite_in_bfloat16",
    "tests/unit/locality/test_locality.py::test_scores_nan_before_and_after_have_moved",
    "tests/unit/locality/test_locality.py::test_scores_of_other_types_measured",
    "tests/unit/locality/test_locality.py::test_scores_not_finite_refused",
    "tests/unit/locality/test_locality.py::test_bound_infinite",
    "tests/unit/locality/test_locality.py::test_bound_helps_where_nan_spreads",
    "tests/unit/locality/test_locality.py::test_bound_missing_for_a_geometry_too_small",
    "tests/unit/exporting/test_export.py::test_images_out_of_range_not_certified",
    "tests/unit/exporting/test_export.py::test_the_guard_counts_what_the_tolerance_allows",
    "tests/unit/rules/test_vote.py",
    "tests/unit/rules/test_guard.py",
    "tests/unit/rules/test_attention_masking.py",
    "tests/unit/test_aggregation.py",
    "tests/proofs/test_theorem_cases.py",
    "tests/unit/rules/test_double_masking.py",
    "tests/unit/rules/test_largest.py",
    "tests/unit/data/test_photo.py::test_tiff_keeps_stored_pixels",
    "tests/unit/proofs/test_record.py::test_a_name_given_twice_is_done_twice",
    "tests/unit/proofs/test_pooling_records.py",
    "tests/properties/test_exactness.py::test_agreement_script",
    "tests/properties/test_masks.py::test_no_patch_within_a_mask_breaks_a_certificate",
    "tests/proofs/test_double_masking_exhaustive.py::test_every_binary_map_under_every_attack[2x4-1x2]",
    "tests/unit/defenses/test_interval_bounds.py",
    "tests/unit/nets/test_escapes.py",
]


def result(trials: dict[str, Trial], stale: list[str], seconds: float) -> dict:
    """The score: `broken` are mutants under which the tests could not even start, which proves nothing."""
    killed = sum(trial.killed for trial in trials.values())
    return {
        "command": "python -m tests.mutants.run",
        "mutants": len(trials) + len(stale),
        "killed": killed,
        "survived": [name for name, trial in trials.items() if trial.code == PASSED],
        "stale": stale,
        "broken": [name for name, trial in trials.items() if not trial.killed and trial.code != PASSED],
        "killers": {name: trial.failure for name, trial in trials.items() if trial.killed},
        "seconds": round(seconds, 1),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}},
    }


def check(mutants: list[Mutant]) -> int:
    """Prints the mutants that do not fit the sources exactly once; 1 if there are any, else 0."""
    stale = 0
    for mutant in mutants:
        try:
            mutant.changed(SOURCE / "bagcert")
        except (StaleMutantError, SyntaxError, FileNotFoundError) as error:
            print(f"stale     {error}")
            stale += 1
    print(f"{len(mutants) - stale} of {len(mutants)} mutants fit the sources")
    return int(stale > 0)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="mutants at once")
    parser.add_argument("--only", default="", help="mutants whose name or file contains this")
    parser.add_argument("--check", action="store_true", help="run no tests; name the mutants that no longer fit")
    parser.add_argument("--json", action="store_true", help="one line of JSON")
    parser.add_argument("--out", type=Path, help="a file to write the same JSON to")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if any(options.only in text for text in (m.name, *(edit[0] for edit in m.edits)))]
    if options.check:
        return check(chosen)
    started, context = time.monotonic(), server()
    sound = run(context, None, FAST_TESTS, timeout_s=1800)
    if sound.code != PASSED:
        print(f"{sound.output}\nThe tests fail on the sources as they are; mutants prove nothing.", file=sys.stderr)
        return 1

    def trial(mutant: Mutant) -> Trial | None:
        try:
            found = run(context, mutant, FAST_TESTS, timeout_s=60 + 10 * sound.seconds)
        except StaleMutantError as error:
            print(f"stale     {error}", file=sys.stderr, flush=True)
            return None
        verdict = "killed" if found.killed else "SURVIVED" if found.code == PASSED else "broken"
        print(f"{verdict:9} {found.seconds:5.1f} s  {mutant.name}  {found.failure}", file=sys.stderr, flush=True)
        if verdict == "broken":
            print(found.output, file=sys.stderr)
        return found

    with ThreadPoolExecutor(options.jobs) as pool:
        trials = dict(zip([mutant.name for mutant in chosen], pool.map(trial, chosen), strict=True))
    stale = [name for name, found in trials.items() if found is None]
    done = {name: found for name, found in trials.items() if found is not None}
    score = result(done, stale, time.monotonic() - started)
    if options.out:
        options.out.write_text(json.dumps(score, indent=2) + "\n")
    if options.json:
        print(json.dumps(score))
    else:
        print(f"{score['killed']} of {score['mutants']} mutants killed in {score['seconds']:.0f} s")
        for kind in ("survived", "stale", "broken"):
            print("".join(f"{kind}: {name}\n" for name in score[kind]), end="")
    return int(score["killed"] < score["mutants"])


if __name__ == "__main__":
    sys.exit(main())
