"""One target under atheris: `python -m tests.fuzz.one TARGET CRASHES CORPUS [options of libFuzzer]`.

A crash is saved under the place it happened at, and the fuzzing goes on.
"""

import hashlib
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import atheris


def main() -> None:
    """Fuzzes until libFuzzer's own limits end it."""
    name, crashes, corpus, *limits = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.disable()
    import torch  # noqa: F401  # its own code is none of ours to instrument

    with atheris.instrument_imports(include=["bagcert", "PIL", "tomllib", "safetensors", "zipfile"]):
        from tests.fuzz.targets import TARGETS, attempt

    target = TARGETS[name]
    for i, seed in enumerate(target.seeds()):
        attempt(target, seed)
        (Path(corpus) / f"seed{i:02}").write_bytes(seed)

    def one(content: bytes) -> None:
        try:
            attempt(target, content)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            label = f"{type(error).__name__}-{Path(place.filename).stem}-{place.lineno}"
            path = Path(crashes) / f"{name}-{label}.bin"
            if not path.exists():
                path.write_bytes(content)
                digest = hashlib.sha256(content).hexdigest()[:12]
                print(f"{path.name} ({digest}): {error!r}", file=sys.stderr)
                traceback.print_exception(error, limit=-6)

    atheris.Setup([sys.argv[0], *limits, corpus], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
