"""What is fuzzed: every loader of a file that somebody else may have written, with valid files to start from.

A loader may succeed, or raise a BagcertError with one sentence. Everything else is a crash.
"""

import io
import json
import struct
import tarfile
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from bagcert.bulk.files import certify_files
from bagcert.data.parquet import load_parquet
from bagcert.data.photo import read_image
from bagcert.data.webdataset import load_webdataset
from bagcert.errors import CONTROL, BagcertError
from bagcert.evaluation.evaluate import evaluate
from bagcert.evaluation.journal import EvaluationLog
from bagcert.nets.saved_model import CONFIG, WEIGHTS, read_model
from bagcert.proofs.file import RecordFile
from bagcert.proofs.lines import from_line, lines, seal, to_line
from bagcert.proofs.verify import verify_readout, verify_record
from bagcert.threat import PatchThreatModel
from bagcert.training.checkpoint import CHECKPOINT, RECIPE, RunFolder
from bagcert.training.loop import train
from bagcert.training.recipe import load_recipe, shipped_recipes
from tests import tiny

LONGEST_SENTENCE = 1500
IMAGES_READ = 8  # of a data set
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Target:
    """A loader.

    Attributes:
        seeds: valid files.
        load: takes a file's content.
    """

    seeds: Callable[[], list[bytes]]
    load: Callable[[bytes], None]


def attempt(target: Target, content: bytes) -> bool:
    """Was it taken? A refusal must be one sentence; whatever else is raised is a crash."""
    try:
        target.load(content)
    except BagcertError as error:
        sentence = str(error)
        assert sentence, "an error without a sentence"
        assert not CONTROL.search(sentence), f"control characters in {sentence!r}"
        assert len(sentence) <= LONGEST_SENTENCE, f"a sentence of {len(sentence)} characters: {sentence[:100]!r}"
        return False
    return True


@cache
def _folder() -> Path:
    folder = tempfile.TemporaryDirectory(prefix="bagcert-fuzz-")
    _folder.keep = folder  # type: ignore[attr-defined]  # removed when the process ends
    return Path(folder.name)


def _file(name: str, content: bytes) -> Path:
    path = _folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _pictures() -> list[bytes]:
    """Small images of every format and of many modes."""
    random = np.random.default_rng(0)
    image = Image.fromarray(random.integers(0, 256, (7, 5, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    sixteen = Image.fromarray(random.integers(0, 65536, (3, 4), dtype=np.uint16))
    frames = {"save_all": True, "append_images": [image.rotate(180)]}
    found = []
    for picture, kind, options in (
        (image, "PNG", {}),
        (image, "PNG", {"exif": turned}),
        (image.convert("P"), "PNG", {"transparency": 3}),
        (image.convert("LA"), "PNG", {}),
        (image.convert("1"), "PNG", {}),
        (sixteen, "PNG", {}),
        (image, "PNG", frames),
        (image, "JPEG", {"exif": turned}),
        (image, "JPEG", {"progressive": True}),
        (image.convert("CMYK"), "JPEG", {}),
        (image.convert("L"), "JPEG", {}),
        (image, "BMP", {}),
        (image.convert("P"), "BMP", {}),
        (image, "WEBP", {}),
        (image.convert("RGBA"), "WEBP", {"lossless": True}),
        (image, "WEBP", frames),
        (image, "GIF", frames),
        (image, "TIFF", {"compression": "tiff_lzw"}),
        (image.convert("CMYK"), "TIFF", {}),
        (sixteen, "TIFF", {}),
        (image, "PPM", {}),
        (image.convert("1"), "PPM", {}),
        (image, "ICO", {"sizes": [(5, 7)]}),
        (image, "JPEG2000", {}),
        (image, "MPO", frames),
    ):
        file = io.BytesIO()
        picture.save(file, kind, **options)
        found.append(file.getvalue())
    return found


def _load_image(content: bytes) -> None:
    read_image(content, "image").upright()


def _load_mask(content: bytes) -> None:
    PatchThreatModel.parse("1", (7, 5), _file("mask.png", content))


def _png_with_checksums(content: bytes) -> bytes:
    """Chunks as the content has them, with their checksums put right, so that what is in them is looked at."""
    pieces, at = [PNG_SIGNATURE], len(PNG_SIGNATURE)
    while at + 8 <= len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        body = content[at + 4 : at + 8 + length]
        pieces += [content[at : at + 4], body, struct.pack(">I", zlib.crc32(body))]
        at += 12 + length
    return b"".join(pieces)


def _load_png(content: bytes) -> None:
    read_image(_png_with_checksums(content))


def _shards() -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = _pictures()[:3]
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": ["cat", "dog"]}}}})}
    nested = pa.array([{"bytes": each, "path": "x.png"} for each in pictures])
    found = []
    for images, options in (
        (pa.array(pictures), {}),
        (nested, {"compression": "zstd"}),
        (pa.array([pictures[0]] * 40), {"compression": "none", "row_group_size": 20}),
        (pa.array(pictures, pa.large_binary()), {"use_dictionary": False}),
    ):
        table = pa.table({"image": images, "label": pa.array(np.arange(len(images)) % 2, pa.int8())})
        file = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(metadata), file, **options)
        found.append(file.getvalue())
    return found


def _load_shard(content: bytes) -> None:
    images = load_parquet(_file("shard.parquet", content))
    images.read_each(range(min(IMAGES_READ, len(images))))


def _tars() -> list[bytes]:
    found = []
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT):
        content = io.BytesIO()
        with tarfile.open(fileobj=content, mode="w", format=kind) as file:
            for row, picture in enumerate(_pictures()[:3]):
                folder = "" if kind == tarfile.USTAR_FORMAT else "f" * 120 + "/"
                for name, part in ((f"{folder}{row}.png", picture), (f"{folder}{row}.cls", b"1")):
                    info = tarfile.TarInfo(name)
                    info.size = len(part)
                    info.mtime = 1.5 if kind == tarfile.PAX_FORMAT else 1  # type: ignore[assignment]
                    file.addfile(info, io.BytesIO(part))
        found.append(content.getvalue()[: 24 * 1024])
    return found


def _with_header_sums(content: bytes) -> bytes:
    """Every header of a tar file gets the checksum it should have, so that what is in it reaches the reader."""
    blocks = [content[place : place + 512] for place in range(0, len(content), 512)]
    for number, block in enumerate(blocks):
        if len(block) == 512 and block[257:262] == b"ustar":
            block = block[:148] + b" " * 8 + block[156:]
            blocks[number] = block[:148] + b"%06o\0 " % sum(block) + block[156:]
    return b"".join(blocks)


def _load_tar(content: bytes) -> None:
    images = load_webdataset(_file("shard.tar", _with_header_sums(content)))
    images.read_each(range(min(IMAGES_READ, len(images))))


@cache
def _run() -> Path:
    """A training run that stopped half-way: its recipe and checkpoint."""
    folder = _folder() / "run"

    def stop(at: object) -> None:
        if at.step == 5:  # type: ignore[attr-defined]
            raise InterruptedError

    try:
        train(tiny.recipe(), folder, tiny.image_set(), device="cpu", on_progress=stop)
    except InterruptedError:
        return folder
    raise AssertionError("the run did not stop")


@cache
def _model() -> Path:
    """A small model."""
    return train(tiny.recipe(train__epochs=1), _folder() / "model", tiny.image_set(), device="cpu")


def _load_model(name: str) -> Callable[[bytes], None]:
    def load(content: bytes) -> None:
        other = ({WEIGHTS, CONFIG} - {name}).pop()
        _file(f"fuzzed/{other}", (_model() / other).read_bytes())
        read_model(_file(f"fuzzed/{name}", content).parent)

    return load


def _load_recipe(content: bytes) -> None:
    load_recipe(str(_file("recipe.toml", content))).to_toml()


@cache
def _run_parts() -> tuple:
    """What a run folder is opened with: scorer, average, optimizer and schedule, as training makes them."""
    from torch.optim.swa_utils import AveragedModel

    from bagcert.training.optimizers import learning_rate, make_optimizer, moving_average

    recipe = tiny.recipe()
    scorer, _ = read_model(_model())
    optimizer = make_optimizer(recipe, scorer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate(recipe, 12))
    average = AveragedModel(scorer, multi_avg_fn=moving_average(0.9), use_buffers=True)
    return recipe, scorer, average, optimizer, schedule, 12


def load_checkpoint(content: bytes) -> None:
    """Opens a run with this checkpoint, and makes a step from there."""
    path = _file(f"resumed/{CHECKPOINT}", content)
    _file(f"resumed/{RECIPE}", (_run() / RECIPE).read_bytes())
    recipe, scorer, average, optimizer, schedule, steps = _run_parts()
    RunFolder(path.parent, recipe, scorer, average, optimizer, schedule, steps).open(resume=True)
    for parameter in scorer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    schedule.step()


def _logs() -> list[bytes]:
    path = _folder() / "seed.partial"
    path.unlink(missing_ok=True)
    evaluate(tiny.color_model(), tiny.image_set(9), patches=["1", "2"], rules=["vote"], batch_size=4, log=path)
    return [path.read_bytes()]


def _load_log(content: bytes) -> None:
    path = _file("fuzzed.partial", content)
    head = json.loads(_logs_once()[0].splitlines()[0])
    head.pop("format")
    EvaluationLog(path, head, resume=True).close()


@cache
def _logs_once() -> list[bytes]:
    return _logs()


@cache
def _records() -> list[bytes]:
    photo = _folder() / "photo.png"
    photo.write_bytes(_pictures()[0])
    pooled = tiny.attention_model(size=(7, 5))
    found = []
    for model, rule in ((_color_model(), "vote"), (_color_model(), "double-masking"), (pooled, "detection")):
        path = _folder() / f"{rule}.jsonl"
        path.unlink(missing_ok=True)
        with RecordFile(path, model, [rule], ["1"], ENVIRONMENT) as record:
            list(certify_files(model, [photo], ["1"], [rule], record=record))
        found.append(path.read_bytes())
    return found


ENVIRONMENT = {"device": "cpu", "backend": "torch", "dtype": "float32", "threads": 1, "versions": {}}


@cache
def _color_model() -> object:
    """A model of three colors."""
    return tiny.color_model(size=(7, 5))


def _load_records(content: bytes) -> None:
    """Reads the lines as `bagcert verify` does; with their hashes put right, so that the proof is looked at."""
    readout = None
    for line in lines(_file("records.jsonl", content)):
        try:
            value = json.loads(line)
            line = to_line(seal(value)) if isinstance(value, dict) and "readout_version" not in value else line
        except (ValueError, RecursionError):
            pass  # not JSON: it goes to the reader as it is
        try:
            read = from_line(line)
        except ValueError as error:
            raise BagcertError(str(error)[:LONGEST_SENTENCE]) from None
        if "readout_version" in read:
            readout = read
            verify_readout(read)
        else:
            verify_record(read, readout)


TARGETS: dict[str, Target] = {
    "image": Target(_pictures, _load_image),
    "png": Target(lambda: [each for each in _pictures() if each.startswith(PNG_SIGNATURE)], _load_png),
    "mask": Target(lambda: [each for each in _pictures() if each.startswith(PNG_SIGNATURE)][:1], _load_mask),
    "parquet": Target(_shards, _load_shard),
    "tar": Target(_tars, _load_tar),
    "safetensors": Target(lambda: [(_model() / WEIGHTS).read_bytes()], _load_model(WEIGHTS)),
    "config": Target(lambda: [(_model() / CONFIG).read_bytes()], _load_model(CONFIG)),
    "recipe": Target(lambda: [path.read_bytes() for path in shipped_recipes().values()], _load_recipe),
    "checkpoint": Target(lambda: [(_run() / CHECKPOINT).read_bytes()], load_checkpoint),
    "log": Target(_logs_once, _load_log),
    "records": Target(_records, _load_records),
}
