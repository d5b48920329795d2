"""A web page to try a model: the exported model in the browser, a patch to drag, and the verdict.

The model runs in the browser with a vendored runtime. The server only serves files, and only to this machine.
"""
