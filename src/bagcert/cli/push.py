"""`bagcert push`."""

from pathlib import Path
from typing import Annotated

import typer

from bagcert.cli.console import print_json, say, tell
from bagcert.cli.options import Json, Model
from bagcert.records import SCHEMA_VERSION


def push(
    model: Model,
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository on the Hugging Face hub.")],
    private: Annotated[bool, typer.Option("--private", help="Create a new repository as private.")] = False,
    dry_run: Annotated[
        Path | None,
        typer.Option(
            "--dry-run",
            metavar="DIR",
            help="Upload nothing; write the files that would be uploaded to this new folder.",
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Publish a model on the Hugging Face hub, with a model card that lists measured results and limitations.

    Uploads the weights, config, recipe, training log, results.json and the card, and no other file. To use the model:
    bagcert certify photo.jpg --model OWNER/NAME.
    """
    import hashlib

    from bagcert.hub import push as hub
    from bagcert.hub.card import RESULTS

    files = hub.prepare(model, repo_id)
    if dry_run is not None:
        hub.write(files, dry_run)
        url = None
    else:
        if not json:
            tell(f"uploading {sum(map(len, files.values())):,} bytes")
        url = hub.push(files, repo_id, private)
    if json:
        listing = [
            {"name": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for name, content in files.items()
        ]
        where = None if dry_run is None else str(dry_run)
        print_json(
            {"schema_version": SCHEMA_VERSION, "repo_id": repo_id, "dry_run": where, "url": url, "files": listing}
        )
        return
    for name, content in files.items():
        say(f"{len(content):>12,}  {name}")
    if RESULTS not in files:
        say(f"The card has no results; to add them: bagcert evaluate {model} --data DATA --out {model}/{RESULTS}")
    say(f"Files for {repo_id} are in {dry_run}; nothing was uploaded" if url is None else f"The model is at {url}")
