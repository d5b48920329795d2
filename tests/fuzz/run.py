"""Coverage-guided fuzzing of every loader, each in a process of its own.

`python -m tests.fuzz.run --seconds N [--target NAME] [--crashes FOLDER] [--json] [--out FILE.json]`; needs atheris,
the extra `fuzz`. Inputs that crash a loader are saved in the folder, one for each place that crashed. Exit code 1 if
there are any.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SCHEMA_VERSION = 1
LONGEST_INPUT = 1 << 16
LONGEST_SECONDS = 300  # of one input, on a busy machine
MOST_MEMORY_MIB = 4096
STARTS = 20  # of a target whose process dies
TARGETS = ("image", "png", "mask", "parquet", "safetensors", "config", "recipe", "checkpoint", "log")
TARGETS += ("records", "tar")


def fuzz(name: str, seconds: int, crashes: Path) -> dict[str, Any]:
    """Fuzzes one target for so long, starting its process again when it dies."""
    crashes.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    ends = time.monotonic() + seconds
    executions = 0
    with tempfile.TemporaryDirectory() as corpus:
        for _ in range(STARTS):
            left = round(ends - time.monotonic())
            if left < 1:
                break
            run = [sys.executable, "-m", "tests.fuzz.one", name, str(crashes), corpus]
            limits = [f"-max_total_time={left}", f"-timeout={LONGEST_SECONDS}", f"-rss_limit_mb={MOST_MEMORY_MIB}"]
            more = [
                f"-report_slow_units={LONGEST_SECONDS}",
                f"-max_len={LONGEST_INPUT}",
                "-print_final_stats=1",
                f"-artifact_prefix={crashes}/{name}-",
            ]
            done = subprocess.run([*run, *limits, *more], stderr=subprocess.PIPE, text=True, errors="replace")
            counts = re.findall(r"number_of_executed_units: *(\d+)", done.stderr) or re.findall(
                r"^#(\d+)", done.stderr, re.M
            )
            executions += int(counts[-1]) if counts else 0
            if not counts:
                raise SystemExit(f"the fuzzer of {name} does not start: {done.stderr[-2000:]}")
        kept = len(list(Path(corpus).iterdir()))
    found = sorted(path.name for path in set(crashes.iterdir()) - before)
    return {"target": name, "executions": executions, "inputs_kept": kept, "crashes": found}


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--target", action="append", choices=TARGETS, help="repeatable; all by default")
    parser.add_argument("--crashes", type=Path, default=Path("fuzz-crashes"), help="where crashing inputs are saved")
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    results = []
    for name in options.target or TARGETS:
        results.append(fuzz(name, options.seconds, options.crashes))
        if not options.json:
            print("{target}: {executions:,} inputs, {inputs_kept:,} kept, crashes: ".format(**results[-1]), end="")
            print(", ".join(results[-1]["crashes"]) or "none", flush=True)
    found = {
        "schema_version": SCHEMA_VERSION,
        "seconds": options.seconds,
        "executions": sum(each["executions"] for each in results),
        "crashes": sum(len(each["crashes"]) for each in results),
        "targets": results,
    }
    text = json.dumps(found, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    sys.exit(1 if found["crashes"] else 0)


if __name__ == "__main__":
    main()
