"""The log of an evaluation: whole batches survive anything, and only the same evaluation goes on with them."""

import errno
import io
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bagcert.data.image_set import ImageSet
from bagcert.data.photo import Photo
from bagcert.errors import BagcertError, UnreadableError, UsageError
from bagcert.evaluation.evaluate import Evaluation, evaluate, write_evaluation
from bagcert.evaluation.journal import EvaluationLog, log_path
from bagcert.records import RunInfo
from tests import refused, tiny

RULES = ("vote", "double-masking")
PATCHES = ("1", "2x3")
BAD = (0, 11, 12, 29)  # the first, two in the middle, the last of a batch that is never full


class Killed(Exception):
    """Stands in for a kill: nothing in the package handles it."""


def _images(stop_at: int | None = None, count: int = 30) -> ImageSet:
    """Images of which some cannot be read; asking for image `stop_at` kills the run."""
    images = tiny.image_set(count, tint=100)

    def source(row: int) -> Photo:
        if row == stop_at:
            raise Killed
        if row in BAD:
            raise UnreadableError(f"image {row} is cut short")
        return images.source(row)

    return replace(images, source=source)


def _run(log: Path | None, images: ImageSet, resume: bool = False, **options) -> Evaluation:
    given = {"patches": PATCHES, "rules": RULES, "batch_size": 4, **options}
    return evaluate(tiny.color_model(), images, log=log, resume=resume, **given)


def _figures(info: RunInfo) -> dict:
    """All but what the clock says."""
    values = info.to_dict()
    del values["seconds"], values["peak_memory_mib"]
    return {**values, "results": [{**row, "seconds": 0} for row in values["results"]]}


@pytest.fixture(scope="module")
def whole() -> Evaluation:
    return _run(None, _images())


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The log of a run that was killed after four of its seven batches."""
    monkeypatch.setattr("bagcert.evaluation.passes.READ_AT_ONCE", 3)
    with pytest.raises(Killed):
        _run(tmp_path / "r.log", _images(stop_at=23))
    return tmp_path / "r.log"


def _same(found: Evaluation, whole: Evaluation) -> None:
    assert found.records == whole.records
    assert found.errors == whole.errors == [f"image {row} is cut short" for row in BAD]
    assert _figures(found.info) == _figures(whole.info)


def test_a_killed_run_goes_on_after_its_last_whole_batch(log: Path, whole: Evaluation) -> None:
    lines = log.read_bytes().splitlines()
    assert len(lines) == 1 + 4
    asked: list[int] = []
    images = _images()
    again = replace(images, source=lambda row: (asked.append(row), images.source(row))[1])
    _same(_run(log, again, resume=True), whole)
    assert min(asked) == json.loads(lines[-1])["records"][-1]["index"] + 1 == 19
    assert len(log.read_bytes().splitlines()) == 1 + 7
    # A run killed before its results are written reads no image again.
    _same(_run(log, _images(stop_at=5), resume=True), whole)


def test_the_log_may_end_anywhere(log: Path, whole: Evaluation) -> None:
    content = log.read_bytes()
    for length in (0, 1, len(content) // 3, len(content) // 2, len(content) - 1):
        log.write_bytes(content[:length])
        _same(_run(log, _images(), resume=True), whole)


def test_seconds_are_those_of_all_batches(log: Path) -> None:
    first, *batches = log.read_bytes().splitlines()
    batches = [json.loads(line) for line in batches]
    for batch in batches:
        batch["seconds"] = [1000.0, 1.0, 2.0, 3.0, 4.0]
    log.write_bytes(b"\n".join([first, *(json.dumps(batch).encode() for batch in batches), b""]))
    info = _run(log, _images(), resume=True, repeat=1).info
    assert 4000 < info.seconds["forward"] < 4100
    assert [int(row.seconds) for row in info.results] == [4, 8, 12, 16]


def test_further_passes_change_no_record(log: Path, whole: Evaluation) -> None:
    found = _run(log, _images(), resume=True, repeat=2)
    assert found.records == whole.records
    assert found.errors == whole.errors
    assert found.info.repeat == 2


def test_failure_before_the_first_batch(tmp_path: Path) -> None:
    refused(UsageError, None, _run, tmp_path / "r.log", _images(), patches=["9"])
    assert not list(tmp_path.iterdir())


def test_log_not_overwritten(log: Path) -> None:
    content = log.read_bytes()
    refused(UsageError, "unfinished evaluation; go on with --resume, or remove it", _run, log, _images())
    assert log.read_bytes() == content


def test_resuming_nothing_starts_at_the_beginning(tmp_path: Path, whole: Evaluation) -> None:
    _same(_run(tmp_path / "r.log", _images(), resume=True), whole)


def _mask(folder: Path) -> Path:
    Image.fromarray(np.full((8, 8), 255, dtype=np.uint8)).save(folder / "mask.png")
    return folder / "mask.png"


OTHERS: dict[str, tuple[str, Callable[[Path], dict]]] = {
    "patch": ("patches", lambda folder: {"patches": ["1", "3x2"]}),
    "rule": ("rules", lambda folder: {"rules": ["vote", "levine-feizi"]}),
    "batch": ("batch_size", lambda folder: {"batch_size": 5}),
    "limit": ("images", lambda folder: {"limit": 29}),
    "a limit beyond the end": ("limit", lambda folder: {"limit": 100}),
    "fit": ("fit", lambda folder: {"fit": "center-crop"}),
    "mask": ("placements", lambda folder: {"placements": _mask(folder)}),
}


@pytest.mark.parametrize("what", OTHERS)
def test_another_run_does_not_go_on_with_it(what: str, log: Path, tmp_path: Path) -> None:
    key, options = OTHERS[what]
    content = log.read_bytes()
    with pytest.raises(UsageError, match=f"was started with another value of {key};") as error:
        _run(log, _images(), resume=True, **options(tmp_path))
    assert "\n" not in str(error.value)
    assert log.read_bytes() == content


def test_resume_with_another_model_or_data_refused(log: Path) -> None:
    model = tiny.color_model()
    model.scorer.net[0].weight.data *= 2
    options = {"patches": PATCHES, "rules": RULES, "batch_size": 4, "log": log, "resume": True}
    refused(UsageError, "another value of weights", evaluate, model, _images(), **options)
    with pytest.raises(UsageError, match="another value of classes"):
        evaluate(tiny.color_model(names=("green", "red", "blue")), _images(), **options)
    images = _images()
    with pytest.raises(UsageError, match="another value of fingerprint"):
        evaluate(tiny.color_model(), replace(images, labels=(images.labels + 1) % 3), **options)


def _changed(content: bytes, line: int, change: Callable[[dict], object]) -> bytes:
    lines = content.splitlines()
    value = json.loads(lines[line])
    change(value)
    lines[line] = json.dumps(value).encode()
    return b"\n".join(lines) + b"\n"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "text": lambda content: b"hello\n",
    "a list": lambda content: b"[1]\n",
    "nesting": lambda content: b"[" * 100_000 + b"\n",
    "zeros": lambda content: content + bytes(100) + b"\n",
    "a line missing in the middle": lambda content: b"\n".join(content.splitlines()[:2]) + b"\n{}\n",
    "a batch twice": lambda content: content + content.splitlines()[-1] + b"\n",
    "no image": lambda content: _changed(content, 2, lambda value: value["records"].clear()),
    "an image beyond the end": lambda content: _changed(
        content, -1, lambda value: value["records"][-1].update(index=10**12)
    ),
    "a verdict less": lambda content: _changed(content, 3, lambda value: value["records"][1]["results"].pop()),
    "text for a number": lambda content: _changed(content, 1, lambda value: value["records"][0].update(label="1")),
    "seconds less": lambda content: _changed(content, 1, lambda value: value["seconds"].pop()),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_damage_before_the_end_refused(how: str, log: Path) -> None:
    log.write_bytes(DAMAGE[how](log.read_bytes()))
    content = log.read_bytes()
    said = refused(UnreadableError, r"line \d+ of .* is damaged", _run, log, _images(), resume=True)
    assert len(said) < 300
    assert log.read_bytes() == content


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name, reason in (("pipe", "not a regular file"), ("folder", "Is a directory")):
        with pytest.raises(UnreadableError, match=reason):
            EvaluationLog(tmp_path / name, {"patches": ["1"], "rules": ["vote"], "images": 1}, resume=True)


def test_full_disk_and_resume(tmp_path: Path, whole: Evaluation, monkeypatch: pytest.MonkeyPatch) -> None:
    room = 6000

    class Disk(io.FileIO):
        """A file on a disk with room for so many bytes: takes a part of the write that fills it."""

        def write(self, content: bytes) -> int:
            nonlocal room
            if not room:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            part = content[:room]
            room -= len(part)
            return super().write(part)

    log = tmp_path / "r.log"
    monkeypatch.setattr(
        "bagcert.evaluation.journal.open", lambda path, mode, buffering: Disk(path, mode), raising=False
    )
    refused(BagcertError, r"r\.log cannot be written: No space left on device", _run, log, _images())
    monkeypatch.undo()
    assert log.stat().st_size == 6000
    assert not log.read_bytes().endswith(b"\n")
    _same(_run(log, _images(), resume=True), whole)


def test_the_log_is_gone_when_the_results_are_there(tmp_path: Path) -> None:
    out = tmp_path / "r.json"
    (tmp_path / ".r.json.abcd1234").write_text("what a killed process left of its results")
    evaluation = _run(log_path(out), _images())
    assert log_path(out).exists()
    write_evaluation(evaluation, out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.json", "r.records.jsonl"]
