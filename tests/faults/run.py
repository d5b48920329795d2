"""Kills training, evaluation and certification at random moments, resumes, and compares with runs never interrupted.

`python -m tests.faults.run --kills 50 [--seed N] [--json] [--out FILE.json]`, on systems that can fork.

Each command runs in a process forked from this one, in which the libraries are imported already: so a kill lands in
the work and not in the imports. A forked process runs the command line as it is. Exit code 1 if a run stayed
incomplete, differs, or a half-written file stood under a final name.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # threads do not survive a fork

MODEL = ("model.safetensors", "config.json")
LONGEST_CHAIN = 3  # kills of one run before it may end
SCHEMA_VERSION = 1

RECIPE = """
name = "small"
model = { architecture = "resnet-rf3", width = 8, depth = 1 }
defense = { rule = "vote", patch = "1" }
augment = { crop = 1, flip = false }
train = { epochs = 6, batch_size = 12, ema = 0.9, precision = "fp32", checkpoint_every = 3, validate_every = 3 }
"""


class Job(ABC):
    """A command with results in a folder, and what must hold of them."""

    name: str

    def __init__(self, shared: Path) -> None:
        self.shared = shared

    @abstractmethod
    def arguments(self, folder: Path) -> list[str]:
        """The command line that starts the job, or goes on with it."""

    @abstractmethod
    def results(self, folder: Path) -> dict[str, Any]:
        """Every file by its name, as it must be alike in all runs: without what the clock says.

        Raises:
            Exception: of any kind, where a file is not whole.
        """

    def half_written(self, folder: Path, whole: dict[str, Any]) -> list[str]:
        """Files under a final name that are not those of the whole run, right after a kill."""
        found = []
        for path in sorted(folder.iterdir()):
            if path.name in whole and not path.name.startswith("."):
                try:
                    same = self.read(path) == whole[path.name]
                except Exception:  # whatever a half-written file does to its reader
                    same = False
                if not same:
                    found.append(path.name)
        return found

    def read(self, path: Path) -> Any:
        """One file without what the clock says."""
        if path.suffix == ".json":
            return _timeless(json.loads(path.read_text()))
        return path.read_bytes()


class Train(Job):
    """`bagcert train`."""

    name = "train"

    def arguments(self, folder: Path) -> list[str]:
        recipe = self.shared / "small.toml"
        recipe.write_text(RECIPE)
        resume = ["--resume"] if (folder / "checkpoint.pt").exists() else []
        return ["train", str(recipe), "--limit", "160", "--out", str(folder), "--device", "cpu", *resume]

    def results(self, folder: Path) -> dict[str, Any]:
        return {path.name: self.read(path) for path in sorted(folder.iterdir())}

    def read(self, path: Path) -> Any:
        if path.suffix == ".jsonl":
            return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]
        return super().read(path)

    @cached_property
    def models(self) -> list[dict[str, Any]]:
        """The files of the model as a whole run writes them, one model for each validation."""
        import bagcert.training.loop as module

        written = _new(self.shared / "models")
        write_model = module.write_model

        def write_and_keep(folder: Path, *model: Any) -> None:
            write_model(folder, *model)
            shutil.copytree(folder, written / str(len(list(written.iterdir()))))

        module.write_model = write_and_keep
        try:
            code = _wait(_start(self.arguments(_new(self.shared / "kept")), self.shared))
        finally:
            module.write_model = write_model
        assert code == 0
        return [{name: self.read(kept / name) for name in MODEL} for kept in written.iterdir()]

    def half_written(self, folder: Path, whole: dict[str, Any]) -> list[str]:
        import torch

        found = [name for name in super().half_written(folder, whole) if name not in ("metrics.jsonl", *MODEL)]
        # A model stands there after each validation: that of one validation as a whole, or its weights alone.
        names = [name for name in MODEL if (folder / name).exists()]
        try:
            model = {name: self.read(folder / name) for name in names}
        except ValueError:
            model = {}
        if names and not any(model and model.items() <= each.items() for each in self.models):
            found += names
        if (folder / "metrics.jsonl").exists():  # grows line by line
            try:
                lines = self.read(folder / "metrics.jsonl")
            except ValueError:
                lines = [None]
            found += ["metrics.jsonl"] * (lines != whole["metrics.jsonl"][: len(lines)])
        if (folder / "checkpoint.pt").exists():
            try:
                torch.load(folder / "checkpoint.pt", weights_only=True)["step"]
            except Exception:  # likewise
                found.append("checkpoint.pt")
        return found


class Evaluate(Job):
    """`bagcert evaluate`."""

    name = "evaluate"

    def arguments(self, folder: Path) -> list[str]:
        run = ["evaluate", "digits", "--data", "digits", "--limit", "160", "--batch-size", "4", "--device", "cpu"]
        verdicts = ["--patch", "2", "--patch", "1x3", "--rule", "vote", "--rule", "double-masking"]
        return [*run, *verdicts, "--json", "--out", str(folder / "r.json"), "--resume"]

    def results(self, folder: Path) -> dict[str, Any]:
        return {path.name: self.read(path) for path in sorted(folder.iterdir())}


class Certify(Job):
    """`bagcert certify` of a folder of images, with records."""

    name = "certify"

    def __init__(self, shared: Path) -> None:
        super().__init__(shared)
        from PIL import Image

        from bagcert.data import load_dataset

        self.photos = shared / "photos"
        self.photos.mkdir()
        for i, photo in enumerate(load_dataset("digits", "test", 60).read(range(60))):
            Image.fromarray(photo.pixels).save(self.photos / f"{i:02}.png")

    def arguments(self, folder: Path) -> list[str]:
        record = folder / "r.jsonl"
        resume = ["--resume"] if record.exists() else []
        run = ["certify", str(self.photos), "--model", "digits", "--device", "cpu", "--patch", "2", "--patch", "1x3"]
        return [*run, "--rule", "vote", "--rule", "double-masking", "--json", "--record", str(record), *resume]

    def results(self, folder: Path) -> dict[str, Any]:
        return {path.name: self.read(path) for path in sorted(folder.iterdir())}

    def half_written(self, folder: Path, whole: dict[str, Any]) -> list[str]:
        found = folder / "r.jsonl"  # grows, so what is there must be a beginning of the whole
        return [] if not found.exists() or whole["r.jsonl"].startswith(found.read_bytes()) else ["r.jsonl"]


JOBS: tuple[type[Job], ...] = (Train, Evaluate, Certify)


def campaign(kills: int, seed: int, jobs: Sequence[type[Job]], work: Path) -> dict[str, Any]:
    """Kills each job as often as the others, in runs of up to LONGEST_CHAIN kills, and counts what went wrong."""
    chance = random.Random(seed)
    counts = {kind.name: 0 for kind in jobs}
    faults: dict[str, list[str]] = {"incomplete": [], "differing": [], "half_written_accepted": []}
    started = time.monotonic()
    prepared = []
    for kind in jobs:
        shared = work / kind.name
        shared.mkdir(parents=True)
        job = kind(shared)
        for name in ("whole", "again"):  # the second is timed: what is kept for later is there by then
            before = time.monotonic()
            code = _wait(_start(job.arguments(_new(shared / name)), shared))
            if code:
                raise SystemExit(f"{kind.name} fails without any kill: {(shared / 'output.txt').read_text()[-2000:]}")
        prepared.append((job, job.results(shared / "whole"), time.monotonic() - before))
        if differing := _differing(job, shared / "again", prepared[-1][1]):
            raise SystemExit(f"{kind.name} differs without any kill: {', '.join(differing)}")
    run = 0
    while sum(counts.values()) < kills:
        job, whole, seconds = min(prepared, key=lambda each: counts[each[0].name])
        run += 1
        folder = _new(job.shared / f"run{run}")
        code = None
        share = -(-kills // len(prepared)) - counts[job.name]
        for _ in range(min(chance.randint(1, LONGEST_CHAIN), share, kills - sum(counts.values()))):
            code = _kill_after(_start(job.arguments(folder), job.shared), chance.uniform(0, seconds))
            if code != -signal.SIGKILL:  # it was faster than the kill
                break
            counts[job.name] += 1
            faults["half_written_accepted"] += [f"{job.name}: {name}" for name in job.half_written(folder, whole)]
        if code == -signal.SIGKILL:
            code = _wait(_start(job.arguments(folder), job.shared))
        if code:
            faults["incomplete"].append(f"{job.name}: {(job.shared / 'output.txt').read_text()[-500:]}")
            continue
        differing = _differing(job, folder, whole)
        faults["differing"] += [f"{job.name}: {name}" for name in differing]
        if not differing:
            shutil.rmtree(folder)
    return {
        "schema_version": SCHEMA_VERSION,
        "kills": counts,
        **{name: len(found) for name, found in faults.items()},
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
        "details": [line for found in faults.values() for line in found],
    }


def _differing(job: Job, folder: Path, whole: dict[str, Any]) -> list[str]:
    try:
        found = job.results(folder)
    except Exception as error:  # whatever a half-written file does to its reader
        return [str(error)]
    return [name for name in sorted(found.keys() | whole.keys()) if found.get(name) != whole.get(name)]


def _timeless(value: dict[str, Any]) -> dict[str, Any]:
    """Without seconds and memory, at any depth."""
    return {
        key: [_timeless(each) if isinstance(each, dict) else each for each in inner]
        if isinstance(inner, list)
        else _timeless(inner)
        if isinstance(inner, dict)
        else inner
        for key, inner in value.items()
        if not key.endswith("seconds") and key != "peak_memory_mib"
    }


def _new(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def _start(arguments: list[str], shared: Path) -> int:
    """The process number of a fork that runs the command line."""
    sys.stdout.flush()
    sys.stderr.flush()
    if process := os.fork():
        return process
    code = 1
    try:
        output = os.open(shared / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(output, stream.fileno())
        sys.argv = ["bagcert", *arguments]
        from bagcert.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = int(error.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(process: int) -> int:
    """Its exit code."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def _kill_after(process: int, seconds: float) -> int:
    """Kills the process after so long, if it still runs then; its exit code."""
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)  # a process that has ended is there until it is waited for
    return _wait(process)


def _import_all() -> None:
    """All that the commands import, and what they load from the package."""
    import bagcert.bulk.files
    import bagcert.cli
    import bagcert.data
    import bagcert.evaluation.evaluate
    import bagcert.training.loop

    bagcert.data.load_dataset("digits")


def main() -> None:
    """The command line of this script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=[kind.name for kind in JOBS], action="append", help="repeatable")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a line")
    parser.add_argument("--out", type=Path, help="write the JSON here too")
    options = parser.parse_args()
    chosen = [kind for kind in JOBS if options.only is None or kind.name in options.only]
    _import_all()
    with tempfile.TemporaryDirectory(prefix="bagcert-faults-") as work:
        os.environ["BAGCERT_CACHE"] = str(Path(work) / "cache")
        found = campaign(options.kills, options.seed, chosen, Path(work))
    text = json.dumps(found, indent=2)
    if options.out:
        options.out.write_text(text + "\n")
    if options.json:
        print(text)
    else:
        each = ", ".join(f"{count} of {name}" for name, count in found["kills"].items())
        print(
            f"{sum(found['kills'].values())} kills ({each}): {found['incomplete']} incomplete, "
            f"{found['differing']} differing, {found['half_written_accepted']} half-written files accepted"
        )
    sys.exit(1 if found["details"] else 0)


if __name__ == "__main__":
    main()
