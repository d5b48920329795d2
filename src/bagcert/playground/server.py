"""HTTP server for a few in-memory files, on the loopback address only.

A request path is looked up in a dictionary and never reaches the file system, so path traversal is impossible.
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

# WebAssembly needs wasm-unsafe-eval. Everything else comes from this server, or is an image that the user chose.
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
    "Cross-Origin-Embedder-Policy": "require-corp",  # with the line above: enables shared memory for the runtime
}
"""Headers of every response, including errors."""


@dataclass(frozen=True)
class Resource:
    """One file of the page."""

    content_type: str
    body: bytes


class PageServer(ThreadingHTTPServer):
    """Serves resources to this machine. `serve_forever` runs the server, `server_close` frees the port.

    Requests with another host name are refused, which prevents DNS rebinding attacks by other web pages.

    Args:
        resources: path, such as `/page.js` -> file; `/` is the start page.
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
        """Binds the socket without the host name lookup of the standard library."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = LOOPBACK, self.server_address[1]

    @property
    def url(self) -> str:
        """Returns the URL of the page."""
        return f"http://{LOOPBACK}:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """Returns the accepted values of the header `Host`."""
        names = (LOOPBACK, "localhost")
        return (*(f"{name}:{self.server_port}" for name in names), *(names if self.server_port == 80 else ()))


class _Handler(BaseHTTPRequestHandler):
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
        """Sends the headers of the requested resource and returns it, or sends an error and returns None."""
        if self.headers.get("Host", "").lower() not in self.server.hosts:
            self._refuse(HTTPStatus.MISDIRECTED_REQUEST)
            return None
        # The path is not decoded: the paths of the page need no escapes.
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
        """Sends an error status and closes the connection, since the request may have an unread body."""
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
        """Discards log messages, to keep the terminal clean."""
