"""Certification of image files in this process, one after the other."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bagcert.data.folder import images_below
from bagcert.data.photo import Photo, read_image
from bagcert.data.preprocess import Preprocessing
from bagcert.defenses.bagcert import BagCert
from bagcert.errors import UnreadableError, UsageError
from bagcert.proofs.certificate_record import certificate_record
from bagcert.proofs.file import RecordFile
from bagcert.records import Record
from bagcert.rules import get_rule
from bagcert.rules.largest import VOTING_RULES, largest_certifiable_px, largest_certified_px
from bagcert.threat import PatchThreatModel, check_notation


@dataclass(frozen=True)
class FileVerdict:
    """The result for one image file. Sizes and placements are in pixels of the file as stored.

    Attributes:
        size_px: [height, width] as stored.
        exif_orientation: 1 (upright) to 8.
        prediction, class_name: prediction of the first requested rule and patch.
        largest_certified_px: side of the largest square patch that the deployed defense certifies, 0 if none. A
            double-masking defense is built for one patch; it certifies that size and all smaller ones.
        largest_certifiable_px: side of the largest square patch for which a defense built for it would certify the
            same prediction.
    """

    source: str
    size_px: list[int]
    exif_orientation: int
    prediction: int
    class_name: str
    largest_certified_px: int
    largest_certifiable_px: int
    results: list[Record]


@dataclass(frozen=True)
class FileError:
    """A file that could not be certified, and the reason."""

    source: str
    error: str
    exit_code: int


def image_files(paths: Iterable[str | Path]) -> list[Path]:
    """Lists the given files and all images below the given folders, sorted within each folder.

    Raises:
        UnreadableError: a folder holds no images.
    """
    files: list[Path] = []
    for path in map(Path, paths):
        if not path.is_dir():
            files.append(path)
            continue
        found = images_below(path)
        if not found:
            raise UnreadableError(f"the folder {path} holds no images")
        files += found
    return files


def certify_files(
    model: BagCert,
    files: Sequence[Path],
    patches: Sequence[str] = (),
    rules: Sequence[str] = (),
    fit: str = "squash",
    placements: str | Path | None = None,
    record: RecordFile | None = None,
) -> Iterator[FileVerdict | FileError]:
    """Certifies files and iterates over one verdict per file, or an error for a file that cannot be read.

    With several files, an image that is too small for a patch is also an error of that file. With `record`, images
    that the record already holds (same name and pixels) are skipped, and certificates are written to it before the
    verdict is returned.

    Raises:
        UsageError: an invalid patch, an unknown rule, or a patch that does not fit into the only image.
        BagcertError: the record cannot be written.
    """
    preprocessing = Preprocessing(model.image_size, fit)
    for rule in rules:
        get_rule(rule)
    for patch in patches:
        check_notation(patch)
    for file in files:
        try:
            photo = read_image(file)
        except UnreadableError as error:
            yield FileError(str(file), str(error), error.exit_code)
            continue
        if record is not None and record.holds(photo):
            continue
        try:
            yield certify_photo(model, photo, preprocessing, patches, rules, placements, record)
        except UsageError as error:
            if len(files) == 1:
                raise
            yield FileError(str(file), f"{file}: {error}", error.exit_code)


def certify_photo(
    model: BagCert,
    photo: Photo,
    preprocessing: Preprocessing,
    patches: Sequence[str] = (),
    rules: Sequence[str] = (),
    placements: str | Path | None = None,
    record: RecordFile | None = None,
) -> FileVerdict:
    """Certifies one photo with each rule against each patch, and appends the certificates to `record`."""
    geometry = preprocessing.geometry(photo.stored_size, photo.orientation)
    score_map = geometry.score_map(model.score_map(preprocessing.apply(photo)[None]))
    results: list[Record] = []
    records = []
    largest = (0, 0)
    for rule in rules or (model.rule,):
        for notation in patches or (str(model.patch),):
            threat = PatchThreatModel.parse(notation, photo.stored_size, placements)
            certificate = get_rule(rule).certify(score_map, threat)
            if not results:
                # The side a vote certifies is over all placements; masks are built for the allowed ones.
                asked = replace(threat, allowed=None) if rule in VOTING_RULES else threat
                largest = (
                    int(largest_certified_px(score_map, rule, threat=asked, certificate=certificate)[0]),
                    int(largest_certifiable_px(score_map, certificate.prediction)[0]),
                )
            results += Record.each(certificate)
            if record is not None:
                environment = record.environment
                records.append(certificate_record(model, preprocessing, photo, score_map, certificate, environment))
    if record is not None:
        record.append(records)
    first = results[0]
    return FileVerdict(
        source=photo.source,
        size_px=list(photo.stored_size),
        exif_orientation=photo.orientation,
        prediction=first.prediction,
        class_name=model.class_names[first.prediction],
        largest_certified_px=largest[0],
        largest_certifiable_px=largest[1],
        results=results,
    )
