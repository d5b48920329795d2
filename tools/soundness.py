"""Measures `results/soundness.json`: how many certificates, rules and loaders were tested, and how many tests failed.

    python tools/soundness.py                      # every part
    python tools/soundness.py mutants faults       # these parts; the others keep their last figures

Exit code 1 when anything gave way.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bagcert.evaluation.evaluate import versions
from bagcert.io.files import write_atomically

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "results" / "soundness.json"

# Each writes one JSON document to OUT; beside it, what must be zero or empty in that document.
ATTACK = "bagcert attack default --data data/cifar10 --limit 200 --patch {} --steps 20 --restarts 1 --json --out OUT"
PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "agreement": (
        "python -m tests.properties.agreement --cases 3000 --json",
        ("disagreements", "broken_certificates", "vote_certified_not_double_masking"),
    ),
    "masks": (
        "python -m tests.properties.masks --cases 10000 --json",
        ("broken_certificates", "disagreements", "records_refused"),
    ),
    "pooling": ("python -m tests.properties.pooling --cases 3000 --json", ("disagreements", "broken_certificates")),
    "records": (
        "python -m tests.properties.records --cases 20000 --json",
        ("wrongly_accepted", "crashed", "over_time_limit", "honest_refused"),
    ),
    "model-folders": ("python -m tests.properties.hostile --cases 1000 --dtype bfloat16 --json", ("broken",)),
    "photo-files": (
        "python -m tests.properties.photo_files --cases 3000 --json",
        ("broken_certificates", "misreported"),
    ),
    "networks": ("python -m tests.properties.networks --cases 50000 --json", ("leaks", "crashed", "changed")),
    "mutants": ("python -m tests.mutants.run --out OUT", ("survived", "stale", "broken")),
    "faults": (
        "python -m tests.faults.run --kills 50 --out OUT",
        ("incomplete", "differing", "half_written_accepted"),
    ),
    "fuzz": ("python -m tests.fuzz.run --seconds 330 --out OUT", ("crashes",)),
    "fuzz-again": (  # what gave way in an hour and was mended, and what has come since
        "python -m tests.fuzz.run --seconds 240 --target checkpoint --target tar --out OUT",
        ("crashes",),
    ),
    "attack-2x2": (ATTACK.format(2), ("broken_certificates",)),
    "attack-5x5": (ATTACK.format(5), ("broken_certificates",)),
}


def gave_way(document: Any, names: tuple[str, ...]) -> int:
    """Sums the values with these names anywhere in the document."""
    if isinstance(document, list):
        return sum(gave_way(item, names) for item in document)
    if not isinstance(document, dict):
        return 0
    return sum(
        (len(value) if isinstance(value, list | dict) else int(value)) if key in names else gave_way(value, names)
        for key, value in document.items()
    )


def measure(part: str) -> dict[str, Any]:
    """Runs one part; returns its document with the command and the duration."""
    command, names = PARTS[part]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out.json"
        words = [str(out) if word == "OUT" else word for word in shlex.split(command)]
        if words[0] == "python":
            words[0] = sys.executable
        else:
            words[:1] = [sys.executable, "-m", words[0]]
        started = time.monotonic()
        run = subprocess.run(words, cwd=ROOT, stdout=subprocess.PIPE, check=False)
        seconds = time.monotonic() - started
        text = out.read_text() if out.exists() else run.stdout.decode()
    try:
        document = json.loads(text)
    except json.JSONDecodeError:
        sys.exit(f"{command} gave no JSON (exit code {run.returncode})")
    return {
        "command": command.replace("OUT", f"{part}.json"),
        "exit_code": run.returncode,
        "seconds": round(seconds, 1),
        "gave_way": gave_way(document, names),
        "result": document,
    }


def mended() -> list[dict[str, str]]:
    """Reads the fixed causes of wrong certificates from the table in SECURITY.md."""
    section = (ROOT / "SECURITY.md").read_text().split("## Wrong certificates found and mended")[1].split("\n## ")[0]
    heading, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split(" | ")] for row in (heading, *rows)]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def main() -> int:
    """Measures the requested parts and keeps the others."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}")
    parts = parser.parse_args().parts or list(PARTS)
    if unknown := sorted(set(parts) - PARTS.keys()):
        parser.error(f"there is no part {unknown[0]!r}; parts are {', '.join(PARTS)}")
    done = []
    for part in parts:
        print(f"{part} ...", file=sys.stderr, flush=True)
        found = measure(part)
        kept = {**(json.loads(OUT.read_text())["parts"] if OUT.exists() else {}), part: found}  # parts may run abreast
        done.append(found)
        document = {
            "versions": versions(),
            "mended": mended(),
            "parts": {name: kept[name] for name in PARTS if name in kept},
        }
        write_atomically(OUT, (json.dumps(document, indent=2) + "\n").encode())
        print(f"{part}: gave way {found['gave_way']}, {found['seconds']} s", flush=True)
    return int(any(found["gave_way"] or found["exit_code"] for found in done))


if __name__ == "__main__":
    sys.exit(main())
