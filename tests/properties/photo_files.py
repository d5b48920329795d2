"""Attacks certificates of image files in the file alone: are certificate, mask and record those of the stored pixels?

Each case writes a picture of a digit in one format with one EXIF orientation, certifies the file, and then changes
the stored pixels under one allowed patch. How the file is read is not known here: what is changed is the array that
the file was written from, or the very bytes of the file.

python -m tests.properties.photo_files --cases 3000 --json
"""

import hashlib
import io
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

import bagcert
from bagcert.bulk.files import FileVerdict, certify_files
from bagcert.data import load_dataset
from bagcert.data.photo import read_image
from bagcert.data.preprocess import Preprocessing
from bagcert.errors import UsageError
from bagcert.proofs.file import RecordFile
from bagcert.proofs.lines import from_line, lines
from bagcert.proofs.recompute import recompute
from bagcert.proofs.verify import verify_record
from bagcert.rules import RULES
from bagcert.threat import PatchThreatModel
from tests.properties.command import run

ENVIRONMENT = {"device": "cpu", "backend": "torch", "dtype": "float32", "threads": 1, "versions": {}}
ASKED = (*["double-masking"] * 5, "vote")  # of digits the vote certifies none
ATTACKS = 24
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="{}"/></x:xmpmeta>'


@dataclass(frozen=True)
class Format:
    """How pictures are written.

    Attributes:
        save: (stored uint8 [height, width, 3], orientation) -> the bytes of a file.
        turned: does the format keep an orientation?
        block: sides of the pixels that the encoder writes together, so that it changes no others.
        gray: does only a gray picture keep its values?
    """

    save: Callable[[np.ndarray, int], bytes]
    turned: bool = True
    block: int = 1
    gray: bool = False


def exif(format: str, mode: str = "RGB", **options: object) -> Callable[[np.ndarray, int], bytes]:
    """Writes by Pillow, with the orientation in an EXIF block or, in a TIFF, as its tag."""

    def save(stored: np.ndarray, orientation: int) -> bytes:
        file, tags = io.BytesIO(), Image.Exif()
        tags[0x0112] = orientation
        turn = {"tiffinfo": {0x0112: orientation}} if format == "TIFF" else {"exif": tags}
        Image.fromarray(stored).convert(mode).save(file, format, **options, **turn)
        return file.getvalue()

    return save


def xmp(format: str) -> Callable[[np.ndarray, int], bytes]:
    """Writes by Pillow, with the orientation in an XMP block alone."""

    def save(stored: np.ndarray, orientation: int) -> bytes:
        file, packet = io.BytesIO(), XMP.format(orientation).encode()
        options = {"tiffinfo": {700: packet}} if format == "TIFF" else {"xmp": packet}
        Image.fromarray(stored).save(file, format, **options)
        return file.getvalue()

    return save


FORMATS = {
    "tiff": Format(exif("TIFF")),
    "tiff lzw": Format(exif("TIFF", compression="tiff_lzw")),
    "tiff deflate, big": Format(exif("TIFF", compression="tiff_adobe_deflate", big_tiff=True)),
    "tiff gray": Format(exif("TIFF", "L"), gray=True),
    "tiff cmyk": Format(exif("TIFF", "CMYK", compression="packbits")),
    "tiff palette": Format(exif("TIFF", "P"), gray=True),
    "tiff jpeg": Format(exif("TIFF", "L", compression="jpeg", quality=95), block=8, gray=True),
    "tiff ycbcr": Format(exif("TIFF", "YCbCr", compression="tiff_lzw"), gray=True),
    "tiff xmp": Format(xmp("TIFF")),
    "png": Format(exif("PNG")),
    "png rgba": Format(exif("PNG", "RGBA")),
    "jpeg": Format(exif("JPEG", "L", quality=95), block=8, gray=True),
    "mpo": Format(exif("MPO", "L", quality=95), block=8, gray=True),
    "jpeg xmp": Format(xmp("JPEG"), block=16, gray=True),
    "webp": Format(exif("WEBP", lossless=True, exact=True)),
    "avif": Format(exif("AVIF", quality=100, subsampling="4:4:4"), gray=True),
    "jpeg2000": Format(exif("JPEG2000"), turned=False),
    "bmp": Format(exif("BMP"), turned=False),
    "gif": Format(exif("GIF", "L"), turned=False, gray=True),
    "ppm": Format(exif("PPM"), turned=False),
    "ico": Format(lambda stored, _: exif("ICO", sizes=[stored.shape[1::-1]])(stored, 1), turned=False),
}
MAY_BE_REFUSED = {"tiff ycbcr"}


def as_stored(upright: np.ndarray, orientation: int) -> np.ndarray:
    """The picture as a camera stores it that says to turn it so; by the EXIF standard's table of row 0 and column 0."""
    row0, col0 = ("top left", "top right", "bottom right", "bottom left", "left top", "right top", "right bottom",
                  "left bottom")[orientation - 1].split()  # fmt: skip
    axes = upright if row0 in ("top", "bottom") else upright.transpose(1, 0, 2)
    axes = axes[::-1] if row0 in ("bottom", "right") else axes
    return np.ascontiguousarray(axes[:, ::-1] if col0 in ("bottom", "right") else axes)


@dataclass(frozen=True)
class Case:
    """A file, and how it is certified; sizes and `allowed` are those of the stored pixels."""

    name: str
    orientation: int
    stored: np.ndarray
    patch: tuple[int, int]
    allowed: np.ndarray | None
    fit: str
    rule: str

    @property
    def placements(self) -> list[tuple[int, int]]:
        """The allowed corners at which an attacker of this format changes no other pixel."""
        (height, width), (h, w), block = self.stored.shape[:2], self.patch, FORMATS[self.name].block
        corners = ((i, j) for i in range(0, height - h + 1, block) for j in range(0, width - w + 1, block))
        return [(i, j) for i, j in corners if self.allowed is None or self.allowed[i : i + h, j : j + w].all()]


def build(random: np.random.Generator, name: str, digits: np.ndarray) -> Case:
    """A random case of one format."""
    format = FORMATS[name]
    orientation = int(random.integers(1, 9)) if format.turned else 1
    block = format.block
    sides = block * random.integers(8, 12, 2) if block > 1 else random.integers(8, 25, 2)
    digit = Image.fromarray(digits[random.integers(len(digits))])
    upright = np.asarray(digit.resize((int(sides[1]), int(sides[0])), Image.Resampling.BILINEAR))
    stored = as_stored(upright, orientation)
    height, width = stored.shape[:2]
    allowed, (h, w) = (
        None,
        (block * int(random.integers(1, max(1, side // block // 4) + 1)) for side in (height, width)),
    )
    if random.integers(2):  # long and thin: turned, it reaches other regions
        h, w = (block, width // block // 2 * block) if random.integers(2) else (height // block // 2 * block, block)
    if random.integers(4):  # in one half or corner, whose patches may be larger
        h, w = (
            (block * max(1, round(3 * side / block / 8)) for side in (height, width)) if random.integers(2) else (h, w)
        )
        allowed = np.zeros((height, width), dtype=bool)
        part = [slice(0, height), slice(0, width)]
        for axis in ([0], [1], [0, 1])[random.integers(3)]:
            side, most = (height, width)[axis], max((h, w)[axis], (height, width)[axis] // 2 // block * block)
            part[axis] = slice(0, most) if random.integers(2) else slice((side - most) // block * block, side)
        allowed[part[0], part[1]] = True
    fit = ("squash", "center-crop")[random.integers(2)]
    return Case(name, orientation, stored, (h, w), allowed, fit, ASKED[random.integers(len(ASKED))])


def attack(random: np.random.Generator, case: Case, digits: np.ndarray) -> np.ndarray:
    """The stored pixels with something under one allowed patch."""
    (h, w), block = case.patch, FORMATS[case.name].block
    i, j = case.placements[random.integers(len(case.placements))]
    kind = random.integers(4)
    if kind == 0:  # part of another digit, as it would be stored
        other = Image.fromarray(digits[random.integers(len(digits))]).resize((64, 64))
        content = as_stored(np.asarray(other.resize(case.stored.shape[1::-1])), case.orientation)
        content = np.resize(content[:h, :w] if content.shape[0] >= h and content.shape[1] >= w else content, (h, w, 3))
    elif kind == 1:
        content = np.full((h, w, 3), random.choice([0, 255]))
    else:
        channels = 1 if FORMATS[case.name].gray else 3
        content = random.choice([0, 255], (-(-h // block), -(-w // block), channels))
        content = np.broadcast_to(content.repeat(block, 0).repeat(block, 1)[:h, :w], (h, w, 3))
    attacked = case.stored.copy()
    attacked[i : i + h, j : j + w] = content
    return attacked


def certify(case: Case, content: bytes, model: bagcert.BagCert, folder: Path) -> object:
    """What `bagcert certify --record` says of a file with this content."""
    path, patch = folder / "x", f"{case.patch[0]}x{case.patch[1]}"
    path.write_bytes(content)
    if case.allowed is not None:
        Image.fromarray(case.allowed.astype(np.uint8) * 255).save(folder / "mask.png")
    mask = None if case.allowed is None else folder / "mask.png"
    (folder / "r.jsonl").unlink(missing_ok=True)
    with RecordFile(folder / "r.jsonl", model, [case.rule], [patch], ENVIRONMENT, case.fit, mask) as file:
        try:
            (verdict,) = certify_files(model, [path], [patch], [case.rule], case.fit, mask, file)
        except UsageError as error:  # such as a mask of another size
            return error
    return verdict


def answer(case: Case, content: bytes, model: bagcert.BagCert) -> int | None:
    """The deployed answer on a file with this content, without the rest of the verdict, which takes longer."""
    photo, preprocessing = read_image(content), Preprocessing(model.image_size, case.fit)
    geometry = preprocessing.geometry(photo.stored_size, photo.orientation)
    try:
        threat = PatchThreatModel(photo.stored_size, (case.patch,), allowed=case.allowed)
    except UsageError:
        return None
    scores = geometry.score_map(model.score_map(preprocessing.apply(photo)[None]))
    return int(RULES[case.rule].predict(scores, threat)[0])


def misreported(case: Case, verdict: FileVerdict, model: bagcert.BagCert, folder: Path) -> bool:
    """Is anything said of the file, in the verdict or the record, not so of the pixels as they are stored?"""
    height, width = case.stored.shape[:2]
    (record,) = map(from_line, lines(folder / "r.jsonl"))
    lossy = FORMATS[case.name].block > 1
    stored = record["image"]["pixels_sha256"] if lossy else hashlib.sha256(rgb(case).tobytes()).hexdigest()
    said = {"size_px": [height, width], "exif_orientation": case.orientation, "pixels_sha256": stored}
    i, j, h, w = verdict.results[0].worst_placement[:4] if case.rule == "vote" else (0, 0, *case.patch)
    inside = case.allowed is None or case.rule != "vote" or bool(case.allowed[i : i + h, j : j + w].all())
    return (
        (verdict.size_px, verdict.exif_orientation) != ([height, width], case.orientation)
        or record["image"] != said
        or not inside
        or not verify_record(record).ok
        or not recompute(record, model, folder / "x").ok
    )


def rgb(case: Case) -> np.ndarray:
    """What a lossless format makes of the stored pixels, by Pillow from a file that is not turned."""
    return raw(case.name, case.stored)


def raw(name: str, stored: np.ndarray) -> np.ndarray:
    """What is left of these pixels in the format, where there is no orientation that anybody could apply."""
    return np.asarray(Image.open(io.BytesIO(FORMATS[name].save(stored, 1))).convert("RGB"))


def written(case: Case, attacked: np.ndarray, original: bytes) -> bytes:
    """The file with other stored pixels; where they stand in it as they are, these bytes and nothing else."""
    if case.name in ("tiff", "ppm"):
        assert original.count(case.stored.tobytes()) == 1
        return original.replace(case.stored.tobytes(), attacked.tobytes())
    return FORMATS[case.name].save(attacked, case.orientation)


def outside_kept(case: Case, attacked: np.ndarray) -> bool:
    """Has the encoder left all pixels alone that differ in no allowed patch?"""
    changed = (raw(case.name, attacked) != raw(case.name, case.stored)).any(2)
    rows, cols = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
    if not len(rows):
        return True
    (h, w), (top, bottom), (left, right) = case.patch, (rows[0], rows[-1]), (cols[0], cols[-1])
    return any(i <= top and bottom < i + h and j <= left and right < j + w for i, j in case.placements)


def count(cases: int, seed: int = 0, attacks: int = ATTACKS) -> dict[str, object]:
    """Runs `cases` cases, the formats in turn; each certificate is attacked `attacks` times."""
    names = tuple(FORMATS)
    random, model = np.random.default_rng(seed), bagcert.load("digits")
    digits = load_dataset("digits", "test").array()
    totals = Counter(dict.fromkeys(("cases", "refused", "certified", "attacks", "broken_certificates"), 0))
    totals |= Counter(dict.fromkeys(("misreported", "not_local"), 0))
    certified_of: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number in range(cases):
            case = build(random, names[number % len(names)], digits)
            totals["cases"] += 1
            content = FORMATS[case.name].save(case.stored, case.orientation)
            verdict = certify(case, content, model, folder)
            if not isinstance(verdict, FileVerdict):
                totals["refused"] += 1
                totals["misreported"] += case.name not in MAY_BE_REFUSED
                continue
            totals["misreported"] += misreported(case, verdict, model, folder)
            if not verdict.results[0].certified:
                continue
            totals["certified"] += 1
            certified_of[case.name] += 1
            broken = False
            for _ in range(attacks):
                attacked = attack(random, case, digits)
                if not outside_kept(case, attacked):
                    totals["not_local"] += 1
                    continue
                totals["attacks"] += 1
                broken |= answer(case, written(case, attacked, content), model) != verdict.prediction
            totals["broken_certificates"] += broken
    return {**totals, "certified_by_format": dict(sorted(certified_of.items()))}


if __name__ == "__main__":
    run(count, "photo_files", __doc__, cases=3000)
