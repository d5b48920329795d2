"""`bagcert page`."""

from typing import Annotated

import typer

from bagcert.cli.console import progress, say
from bagcert.cli.options import ExportedRule, OnePatch

STEPS = 4  # of an export at most, for the progress bar


def page(
    model: Annotated[
        str,
        typer.Argument(
            help="A shipped model, a model folder, or a hub id (owner/name). Default: digits, with its pictures."
        ),
    ] = "digits",
    patch: OnePatch = None,
    rule: ExportedRule = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Where the sample pictures come from: digits, cifar10, or a path as for evaluate. Default: digits for "
            "a model of the digits, made-up pictures for any other.",
        ),
    ] = None,
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="0 takes any free one.")] = 0,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only say where the page is.")] = False,
) -> None:
    """Try a model in the browser: put a patch on a picture and watch votes, answer and certificate change.

    The model runs in the browser; the page is served to this machine only, asks for nothing outside it and sends no
    picture anywhere. Ctrl-C ends it.
    """
    import sys
    import threading
    import webbrowser

    from bagcert.defenses.bagcert import load
    from bagcert.playground.server import PageServer
    from bagcert.playground.site import build_site

    loaded = load(model, device="cpu", checked=False)
    # The port first: whether it is free is known at once, the export takes seconds.
    with PageServer({}, port) as server:
        with progress("exporting") as report:
            done = iter(range(STEPS * 2))
            server.resources = build_site(
                loaded, patch, rule, data, lambda step: report(min(next(done), STEPS), STEPS, step)
            )
        say(f"{server.url} shows {loaded.name}; Ctrl-C ends it")
        sys.stdout.flush()
        if not no_browser:
            # Some browsers of terminals keep the caller waiting.
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # the regular way to end it
            say("ended")
