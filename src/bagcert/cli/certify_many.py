"""`bagcert certify --data ... --out DIR`: certification of a whole data source."""

import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from bagcert.cli.console import fail, print_json, print_table, progress, say
from bagcert.errors import BagcertError
from bagcert.records import in_unit


def certify_data(data: str, out: Path, engine: str, json: bool, **choices: Any) -> None:
    """Certifies a data source and prints a summary of the result folder."""
    from bagcert.bulk.run import certify_many

    try:
        # Ray reports dead workers on stdout, which is reserved for results.
        with progress("certifying") as report, redirect_stdout(sys.stderr):
            found = certify_many(data, out, engine=engine, on_progress=report, **choices)
    except KeyboardInterrupt:
        raise BagcertError(f"interrupted; rerun the same command to resume {out}") from None
    if json:
        print_json(found)
    else:
        _print(found, out)
    if found["errors"]:
        fail(f"{found['errors']:,} of {found['images']:,} images could not be certified; see column error in {out}", 5)


def _print(found: dict[str, Any], out: Path) -> None:
    labeled = any(row["clean_accuracy"] is not None for row in found["results"])
    rows = []
    for row in found["results"]:
        shares = (row["clean_accuracy"], row["certified_accuracy"]) if labeled else ()
        certified = (f"{row['certified']:,}", f"{row['certified_share']:.1%}")
        patch = in_unit(row["patch"], "of the photo")
        rows.append((patch, row["rule"], *certified, *(f"{share:.1%}" for share in shares)))
    say(f"{found['model']} on {found['data']}: {found['images']:,} images, {found['errors']:,} with errors")
    right = ("certified images", "share", *(("clean", "certified accuracy") if labeled else ()))
    print_table(rows, ("patch", "rule"), right)
    speed = f", {found['images_per_second']:g} images/s" if found["images_per_second"] else ""
    say(f"{found['certified_now']:,} certified now in {found['seconds']:.1f} s ({found['engine']}){speed}; see {out}")
