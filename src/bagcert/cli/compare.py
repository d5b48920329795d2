"""`bagcert compare`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bagcert.cli.console import print_json, print_table, say
from bagcert.cli.options import Json
from bagcert.errors import UsageError

if TYPE_CHECKING:
    from bagcert.evaluation.compare import Comparison


def compare(
    first: Annotated[
        Path, typer.Argument(metavar="A.records.jsonl", help="Records of one run, as evaluate --out writes them.")
    ],
    second: Annotated[Path, typer.Argument(metavar="B.records.jsonl", help="Records of another, on the same images.")],
    patch: Annotated[
        str | None,
        typer.Option(metavar="PATCH", help="Patch to compare. Needed if the runs have several patches in common."),
    ] = None,
    rule: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            help="Rule to compare. Needed if a run has several. Give it twice to use a different rule for each run.",
        ),
    ] = None,
    show: Annotated[int, typer.Option(min=0, help="List at most this many of the images that changed.")] = 10,
    json: Json = False,
) -> None:
    """Test whether two evaluations of the same images differ, and list the images that changed.

    Uses McNemar's exact test and a paired bootstrap, for clean and certified accuracy.
    """
    from bagcert.evaluation.compare import compare as run
    from bagcert.evaluation.results_files import read_image_records

    rules = rule or []
    if len(rules) > 2:
        raise UsageError(f"--rule can be given at most twice, got {len(rules)}")
    pair = (rules[0], rules[-1]) if rules else (None, None)
    found = run(read_image_records(first), read_image_records(second), rules=pair, threat=patch)
    if json:
        print_json(found.to_dict())
    else:
        _print(found, show)


def _print(found: "Comparison", show: int) -> None:
    say(f"{found.images:,} images in both runs; {found.rules[0]} and {found.rules[1]} against {found.threat}")
    rows = [
        (
            test.measure,
            f"{test.first:.1%}",
            f"{test.second:.1%}",
            f"{test.difference:+.1%}",
            f"{test.interval95[0]:+.1%} to {test.interval95[1]:+.1%}",
            f"{test.only_first:,}",
            f"{test.only_second:,}",
            f"{test.p_value:.2g}",
        )
        for test in found.tests
    ]
    right = ("first", "second", "difference", "95 % interval", "only first", "only second", "p (McNemar)")
    print_table(rows, ("accuracy",), right)
    for change in found.changed[:show]:
        before, after = (
            f"{prediction}{' certified' if certified else ''}"
            for prediction, certified in zip(change["prediction"], change["certified"], strict=True)
        )
        say(f"image {change['index']} (label {change['label']}): {before} -> {after}")
    if len(found.changed) > show:
        say(f"... {len(found.changed):,} images changed; --json lists all")
