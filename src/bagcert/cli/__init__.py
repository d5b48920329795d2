"""The command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 fine, 1 failed, 2 usage, 3 a --fail-under bar not met, 4 a certificate was broken or locality
failed, 5 some inputs unreadable.
"""

import sys
from typing import Annotated

import typer

from bagcert import __version__
from bagcert.cli.certify import certify
from bagcert.cli.console import fail
from bagcert.cli.demo import demo
from bagcert.cli.evaluate import evaluate
from bagcert.cli.info import info
from bagcert.cli.train import train
from bagcert.errors import BagcertError

app = typer.Typer(
    name="bagcert",
    help="Certified defence against adversarial patches: train, certify and evaluate BagCert models.",
    epilog=(
        "Exit codes: 0 fine, 1 failed, 2 usage, 3 a --fail-under bar not met, 4 a certificate was broken or "
        "locality failed, 5 some inputs unreadable."
    ),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"bagcert {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in (demo, train, evaluate, certify, info):
    app.command()(command)


def main() -> None:
    """Runs the command line; a user's mistake is one sentence and an exit code, never a traceback."""
    try:
        app()
    except BagcertError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output went away, which is its right
        sys.exit(1)
    except KeyboardInterrupt:
        fail("interrupted", 1)
