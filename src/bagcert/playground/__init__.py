"""A page to try a model on: the exported model in the browser, a patch to drag, the verdict beside it.

The model runs in the browser by a vendored runtime; the server only hands out files, and only to this machine.
"""
