"""`bagcert page`."""

from typing import Annotated

import typer

from bagcert.cli.console import progress, say
from bagcert.cli.options import ExportedRule, Model, OnePatch

STEPS = 4  # upper bound of the steps of an export, for the progress bar


def page(
    model: Model = "digits",
    patch: OnePatch = None,
    rule: ExportedRule = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Source of the sample images: digits, cifar10, or a path as for evaluate. Default: digits for a "
            "model trained on digits, generated images for any other.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="Port of the local server; 0 chooses a free port.")
    ] = 0,
    no_browser: Annotated[
        bool, typer.Option("--no-browser", help="Print the URL instead of opening a browser.")
    ] = False,
) -> None:
    """Try a model in the browser: place a patch on an image and watch votes, prediction and certificate change.

    The model runs in the browser. The page is served to this machine only, loads nothing from other hosts and sends
    no images. Press Ctrl-C to stop it.
    """
    import sys
    import threading
    import webbrowser

    from bagcert.defenses.bagcert import load
    from bagcert.playground.server import PageServer
    from bagcert.playground.site import build_site

    loaded = load(model, device="cpu", checked=False)
    # Open the port first: a port in use is reported at once, while the export takes seconds.
    with PageServer({}, port) as server:
        with progress("exporting") as report:
            done = iter(range(STEPS * 2))
            server.resources = build_site(
                loaded, patch, rule, data, lambda step: report(min(next(done), STEPS), STEPS, step)
            )
        say(f"{server.url} shows {loaded.name}; press Ctrl-C to stop")
        sys.stdout.flush()
        if not no_browser:
            # Text browsers block the caller.
            threading.Thread(target=webbrowser.open, args=(server.url,), daemon=True).start()
        try:
            server.serve_forever()
        except KeyboardInterrupt:  # the regular way to stop
            say("stopped")
