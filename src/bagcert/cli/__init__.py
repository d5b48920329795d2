"""The `bagcert` command line. Results go to stdout, progress and errors to stderr.

Exit codes: 0 success, 1 error, 2 usage error, 3 below the --fail-under threshold, 4 broken certificate or failed
locality check, 5 unreadable inputs.
"""

import os
import signal
import sys
import warnings
from contextlib import suppress
from typing import Annotated

import typer

from bagcert import __version__
from bagcert.cli.attack import attack
from bagcert.cli.benchmark import benchmark
from bagcert.cli.certify import certify
from bagcert.cli.compare import compare
from bagcert.cli.console import fail, say, warn
from bagcert.cli.demo import demo
from bagcert.cli.doctor import doctor
from bagcert.cli.evaluate import evaluate
from bagcert.cli.export import export
from bagcert.cli.info import info
from bagcert.cli.page import page
from bagcert.cli.push import push
from bagcert.cli.report import report
from bagcert.cli.train import train
from bagcert.cli.verify import verify
from bagcert.errors import BagcertError, UsageError

INTERRUPTED = 130  # the exit code that typer returns after Ctrl-C

app = typer.Typer(
    name="bagcert",
    help="Certified defense against adversarial patches: train, certify and evaluate BagCert models.",
    epilog=(
        "Exit codes: 0 success, 1 error, 2 usage error, 3 below the --fail-under threshold, 4 broken certificate or "
        "failed locality check, 5 unreadable inputs. Shell completion: bagcert --install-completion."
    ),
    rich_markup_mode=None,  # rich truncates long option names in narrow terminals
    pretty_exceptions_enable=False,
    add_completion=True,
)


def _version(asked: bool) -> bool:
    if asked:
        say(f"bagcert {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


for command in (
    demo,
    train,
    evaluate,
    report,
    compare,
    benchmark,
    certify,
    attack,
    verify,
    export,
    page,
    push,
    doctor,
    info,
):
    app.command()(command)


def main() -> None:
    """Runs the command line. User errors end with a one-sentence message and an exit code, without a traceback."""
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names need not be valid text
    warnings.showwarning = lambda message, category, *where: warn(f"{category.__name__}: {message}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handled like Ctrl-C: no partial files, exit code 1
    code = None
    command = typer.main.get_command(app)
    for parameter in command.params:
        parameter.hidden = parameter.hidden or "completion" in (parameter.name or "")  # type: ignore[attr-defined]
    try:
        code = command(args=sys.argv[1:] or ["--help"], standalone_mode=False)
        sys.stdout.flush()
    except BagcertError as error:
        fail(str(error), error.exit_code)
    except BrokenPipeError:  # the reader closed the pipe, as `head` does
        _give_up_stdout()
        sys.exit(1)
    except OSError as error:
        _give_up_stdout()
        where = f"{error.filename}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}", 1)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:
        if not hasattr(error, "format_message"):  # only typer's usage errors have it
            raise
        fail(error.format_message(), UsageError.exit_code)
    if code == INTERRUPTED:
        fail("interrupted", 1)
    sys.exit(code or 0)


def _give_up_stdout() -> None:
    """Discards unwritable output, so that the interpreter does not try to flush it again at exit."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
