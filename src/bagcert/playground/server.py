"""A server for a handful of files held in memory, on the loopback address alone.

A request names a key of a dictionary or gets 404: no path of a request ever reaches the file system, so there is
nothing to traverse and no folder to list.
"""

import errno
import socketserver
from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from bagcert.errors import BagcertError, UsageError

LOOPBACK = "127.0.0.1"
IDLE_SECONDS = 30

# WebAssembly counts as evaluation of code; everything else comes from this server or from pictures the user chose.
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' 'wasm-unsafe-eval'; style-src 'self'; img-src 'self' blob:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",  # browsers give the runtime shared memory under these two only
}
"""Sent with every answer, refusals included."""


@dataclass(frozen=True)
class Resource:
    """One file of the page.

    Attributes:
        content_type: as in the header of that name.
        body: its bytes.
    """

    content_type: str
    body: bytes


class PageServer(ThreadingHTTPServer):
    """Serves resources to this machine; `serve_forever` runs it, `server_close` frees the port.

    Requests under another host name are refused, so that a page elsewhere cannot reach in by a name of its own that
    leads to the loopback address.

    Args:
        resources: path, such as `/page.js`, to file; `/` is the start page.
        port: 0 for any free one.

    Raises:
        UsageError: no such port, or it is taken or reserved.
        BagcertError: the loopback address cannot be listened on.
    """

    daemon_threads = True

    def __init__(self, resources: Mapping[str, Resource], port: int = 0) -> None:
        if not 0 <= port <= 65535:
            raise UsageError(f"a port is 0 (any free one) to 65535, got {port}")
        self.resources = dict(resources)
        try:
            super().__init__((LOOPBACK, port), _Handler)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                why = "is in use" if error.errno == errno.EADDRINUSE else "is reserved"
                raise UsageError(f"port {port} {why}; choose another, or 0 for any free one") from None
            raise BagcertError(f"cannot listen on {LOOPBACK}: {error.strerror or error}") from error

    def server_bind(self) -> None:
        """Without the look-up of a host name that the standard library makes here."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    @property
    def url(self) -> str:
        """Where the page is."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What the header `Host` may say."""
        names = (LOOPBACK, "localhost")
        return (*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == 80 else ()))


class _Handler(BaseHTTPRequestHandler):
    """GET and HEAD of the resources."""

    server: PageServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "bagcert", ""
    timeout = IDLE_SECONDS

    def do_GET(self) -> None:
        resource = self._resource()
        if resource is not None:
            self.wfile.write(resource.body)

    def do_HEAD(self) -> None:
        self._resource()

    def _refuse_method(self) -> None:
        self._refuse(HTTPStatus.METHOD_NOT_ALLOWED, {"Allow": "GET, HEAD"})

    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse_method  # noqa: N815  # noqa: N815  # the library's names

    def _resource(self) -> Resource | None:
        """Answers with the headers of what was asked for, or with a refusal and None."""
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
            return None
        # Taken as it came, undecoded: the paths of the page need no escapes.
        resource = self.server.resources.get(self.path.split("?", 1)[0])
        if resource is None:
            self._refuse(HTTPStatus.NOT_FOUND)
            return None
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", resource.content_type)
        self.send_header("Content-Length", str(len(resource.body)))
        self.end_headers()
        return resource

    def _refuse(self, status: HTTPStatus, headers: Mapping[str, str] | None = None) -> None:
        """Only a status and its name; the connection ends, since a body may be on its way."""
        body = f"{status.value} {status.phrase}\n".encode()
        self.close_connection = True
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def end_headers(self) -> None:
        for name, value in HEADERS.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing: the command line is for the user."""
