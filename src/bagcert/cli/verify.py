"""`bagcert verify`."""

from hashlib import sha256
from json import dumps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bagcert.cli.console import fail, print_json, progress, say, warn
from bagcert.cli.options import Device, Json
from bagcert.errors import UnreadableError, UsageError
from bagcert.records import SCHEMA_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from bagcert.proofs.verify import VerifyResult

MOST_CHARACTERS = 500
EXIT_CODES = {"proof": 4, "record": 5, "image": 5, "limit": 1}  # in order of precedence


def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE.jsonl", help="Records written by `bagcert certify --record`.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="Recompute scores and geometry from the image files with this model. Default: trust the recorded ones."
        ),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="With --model: folder of the image files, found by name. Default: the recorded paths.",
        ),
    ] = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Verify certificate records with an independent checker that tries every placement, class and pair of masks.

    Without --model, the verdicts are verified from the recorded scores and geometry. With --model, the scores and the
    geometry are verified as well.
    """
    from bagcert.proofs.lines import from_line, lines
    from bagcert.proofs.verify import VerifyResult, verify_readout, verify_record

    if images is not None and model is None:
        raise UsageError("--images needs --model: the images are only read to recompute the scores")
    again = None if model is None else _recomputing(model, images, device)
    total = sum(1 for _ in lines(file))
    results: list[dict[str, Any]] = []
    images_seen: set[str] = set()
    first_lines: dict[bytes, int] = {}
    readout: dict[str, Any] | None = None  # applies to the records that follow it
    with progress("verifying") as report:
        for number, line in enumerate(lines(file), 1):
            report(number, total)
            record = None
            try:
                content = from_line(line)
                if "readout_version" in content:
                    readout, verdict = content, verify_readout(content)
                    if verdict.ok:
                        continue
                else:
                    record, verdict = content, verify_record(content, readout)
                    if verdict.ok and again is not None:
                        verdict = again(record)
            except ValueError as error:
                verdict = VerifyResult(False, str(error), "record")
            results.append(_result(number, record, verdict))
            if verdict.ok and record is not None:
                images_seen.add(dumps([record["image"][name] for name in ("size_px", "pixels_sha256")]))
                earlier = first_lines.setdefault(_question(record), number)
                results[-1]["repeats_line"] = earlier if earlier < number else None
            if not verdict.ok and not json:
                warn(_sentence(results[-1]))
    if not results:
        raise UnreadableError(f"{file} holds no records")
    bad = [result for result in results if not result["verified"]]
    certified = sum(result["certified"] is True for result in results if result["verified"])
    repeated = sum(result["repeats_line"] is not None for result in results)
    if json:
        print_json(
            {
                "schema_version": SCHEMA_VERSION,
                "file": str(file),
                "model": model,
                "records": len(results),
                "verified": len(results) - len(bad),
                "certified": certified,
                "distinct_images": len(images_seen),
                "repeated": repeated,
                "results": results,
            }
        )
    else:
        basis = "given the recorded scores and geometry" if model is None else f"scores and geometry of {model}"
        held = len(results) - len(bad)
        say(
            f"{held} of {len(results)} records hold, {basis}: {certified} certified, {held - certified} not; "
            f"{_of(len(images_seen), 'distinct image')}, {_of(repeated, 'repeated record')}"
        )
    if bad:
        code = next(code for fault, code in EXIT_CODES.items() if any(result["fault"] == fault for result in bad))
        fail(f"{len(bad)} of {len(results)} records are not verified; {_sentence(bad[0])}", code)


def _recomputing(name: str, images: Path | None, device: str) -> "Callable[[dict[str, Any]], VerifyResult]":
    """Returns a function that checks a record against the model, which is loaded once for each recorded dtype."""
    from functools import cache

    from bagcert.defenses.bagcert import DTYPES, load
    from bagcert.proofs.recompute import image_path, recompute
    from bagcert.proofs.verify import VerifyResult

    loaded = cache(lambda dtype: load(name, device, dtype=dtype))
    loaded("float32")  # reports a missing model before any record is read

    def check(record: dict[str, Any]) -> VerifyResult:
        dtype = record["environment"]["dtype"]
        if dtype not in DTYPES:
            return VerifyResult(False, f"unknown dtype {dtype!r}; known: {' and '.join(DTYPES)}", "record")
        return recompute(record, loaded(dtype), image_path(record, images))

    return check


def _question(record: dict[str, Any]) -> bytes:
    """Returns a hash of the question a record answers: model, rule, patch and pixels."""
    asked = {name: record[name] for name in ("image", "network", "model", "threat", "rule")}
    return sha256(dumps(asked, sort_keys=True).encode("ascii")).digest()


def _of(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def _result(number: int, record: dict[str, Any] | None, verdict: "VerifyResult") -> dict[str, Any]:
    found: dict[str, Any] = {"line": number}
    if record is None:
        found |= dict.fromkeys(("source", "rule", "threat", "prediction", "certified", "margin", "locality"))
    else:
        said = {name: record["verdict"][name] for name in ("prediction", "certified", "margin")}
        threat = record["threat"]["notation"]
        if record["threat"]["allowed"] is not None:
            threat += " within the allowed placements"
        found |= {"source": record["source"], "rule": record["rule"], "threat": threat, **said}
        found["locality"] = record["locality"]
    reason = verdict.reason[:MOST_CHARACTERS]  # may quote content of an untrusted record
    return {**found, "verified": verdict.ok, "fault": verdict.fault or None, "reason": reason, "repeats_line": None}


def _sentence(result: dict[str, Any]) -> str:
    source = "" if result["source"] is None else f" ({result['source']}, {result['rule']}, {result['threat']})"
    return f"line {result['line']}{source}: {result['reason']}"
