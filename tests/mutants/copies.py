"""A mutant on trial: a copy of the sources with one mistake in it, and the fast tests run against that copy."""

import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.context import ForkServerContext
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PASSED, FAILED, WRONG_COPY = 0, 1, 99  # pytest's own codes, and one of ours


class StaleMutantError(Exception):
    """The text a mutant replaces is not in the sources exactly once."""


@dataclass(frozen=True)
class Mutant:
    """One mistake.

    Attributes:
        name: what is wrong, in words.
        edits: (file within src/bagcert, the exact text there, what stands in its place).
    """

    name: str
    edits: tuple[tuple[str, str, str], ...]

    def changed(self, package: Path) -> dict[str, str]:
        """The new text of each file that the mistake is in; nothing is written.

        Raises:
            StaleMutantError: a text is not there exactly once, or nothing changes.
            SyntaxError: the result is not Python.
        """
        sources = {file: (package / file).read_text() for file, _, _ in self.edits}
        for file, text, replacement in self.edits:
            count = sources[file].count(text)
            if count != 1:
                raise StaleMutantError(f"{self.name}: {text!r} is {count} times in {file}, not once")
            if text == replacement:
                raise StaleMutantError(f"{self.name}: {text!r} in {file} stays as it is")
            sources[file] = sources[file].replace(text, replacement)
        for file, source in sources.items():
            compile(source, file, "exec")
        return sources

    def apply(self, package: Path) -> None:
        """Makes the mistake in a copy of the package.

        Raises:
            StaleMutantError, SyntaxError: see `changed`.
        """
        for file, source in self.changed(package).items():
            path = package / file
            path.write_text(source)
            for compiled in path.parent.glob(f"__pycache__/{path.stem}.*"):
                compiled.unlink()


@dataclass(frozen=True)
class Trial:
    """What became of one copy.

    Attributes:
        code: pytest's exit code; None if the tests did not end in time.
        seconds: wall clock.
        failure: the first failing test and its error, empty if there is none.
        output: all that pytest said.
    """

    code: int | None
    seconds: float
    failure: str
    output: str

    @property
    def killed(self) -> bool:
        """Did a test fail, or never end? An error before any test ran is neither killed nor survived."""
        return self.code in (None, FAILED)


def server(preload: bool = True) -> ForkServerContext:
    """Processes that start with the heavy libraries loaded, which would otherwise cost more than the tests."""
    context = get_context("forkserver")
    if preload:
        context.set_forkserver_preload(["tests.mutants.warm"])
    return context


def run(context: ForkServerContext, mutant: Mutant | None, tests: list[str], timeout_s: float = 300) -> Trial:
    """Runs the tests against a copy of the sources with the mutant in it (None: as they are), to the first failure.

    Raises:
        RuntimeError: the tests ran against other sources than the copy.
        StaleMutantError, SyntaxError: see `Mutant.apply`.
    """
    with tempfile.TemporaryDirectory(prefix="bagcert-mutant-") as folder:
        # Compiled files come along, with the times of their sources: only what is changed is compiled again.
        copy = Path(folder) / "src"
        shutil.copytree(SOURCE, copy, ignore=shutil.ignore_patterns("weights"))
        if mutant is not None:
            mutant.apply(copy / "bagcert")
        output, started = Path(folder) / "output.txt", time.monotonic()
        process = context.Process(target=_test, args=(str(copy), tests, str(output)))
        process.start()
        process.join(timeout_s)
        code = process.exitcode
        if code is None:
            process.kill()
            process.join()
        text = output.read_text() if output.exists() else ""
    if code == WRONG_COPY:
        raise RuntimeError(f"the tests did not run against the copy {copy}")
    failures = [line.removeprefix("FAILED ") for line in text.splitlines() if line.startswith("FAILED ")]
    failure = failures[0] if failures else "no end in time" if code is None else ""
    return Trial(code, time.monotonic() - started, failure, text)


def _test(copy: str, tests: list[str], output: str) -> None:
    """In the process of its own: the copy goes before any installed package."""
    os.chdir(ROOT)
    os.environ |= {"PYTHONPATH": copy, "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    sys.path.insert(0, copy)
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import pytest

    options = ["-x", "-q", "--no-header", "--tb=line", "-rf", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    code = int(pytest.main([*options, *tests]))
    sys.stdout.flush()
    tested = Path(sys.modules["bagcert"].__file__ or "") if "bagcert" in sys.modules else None
    if tested is None or not tested.is_relative_to(copy):
        code = WRONG_COPY
    sys.exit(code)
