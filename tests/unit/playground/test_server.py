import http.client
import socket
import threading
from contextlib import contextmanager

import pytest

from bagcert.errors import UsageError
from bagcert.playground.server import HEADERS, PageServer, Resource
from tests import refused

RESOURCES = {
    "/": Resource("text/html; charset=utf-8", b"<p>start</p>"),
    "/vendor/run.wasm": Resource("application/wasm", bytes(range(256))),
}


@contextmanager
def serving():
    with PageServer(RESOURCES) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="module")
def server():
    with serving() as found:
        yield found


def ask(server, path, method="GET", host=None, body=None):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    try:
        connection.putrequest(method, path, skip_host=True)
        connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
        if body is not None:
            connection.putheader("Content-Length", str(len(body)))
        connection.endheaders(body)
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


@pytest.mark.parametrize("path", RESOURCES)
def test_a_resource_comes_whole_with_its_type(server, path):
    status, headers, body = ask(server, path)
    assert (status, headers["Content-Type"], body) == (200, RESOURCES[path].content_type, RESOURCES[path].body)
    assert int(headers["Content-Length"]) == len(body)
    assert ask(server, f"{path}?again=1")[2] == body


def test_head_sends_the_headers_alone(server):
    status, headers, body = ask(server, "/vendor/run.wasm", "HEAD")
    assert (status, headers["Content-Length"], body) == (200, "256", b"")


@pytest.mark.parametrize(
    "path",
    [
        "/vendor",
        "/vendor/",
        "/vendor/../",
        "/../../../../etc/passwd",
        "//etc/passwd",
        "/etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/..%2f..%2fetc%2fpasswd",
        "/vendor/..\\..\\etc\\passwd",
        "/vendor/run.wasm/",
        "/vendor/run.wasm%00",
        "/./",
        "file:///etc/passwd",
        "http://127.0.0.1/etc/passwd",
        "*",
    ],
)  # fmt: skip
def test_no_other_path_leads_anywhere(server, path):
    status, headers, body = ask(server, path)
    assert (status, body) == (404, b"404 Not Found\n")
    assert headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_nothing_can_be_sent(server, method):
    status, headers, _ = ask(server, "/", method, body=b"GET /vendor/run.wasm HTTP/1.1\r\n\r\n")
    assert (status, headers["Allow"], headers["Connection"]) == (405, "GET, HEAD", "close")


@pytest.mark.parametrize("request_", [("/", "GET"), ("/none", "GET"), ("/", "POST"), ("/", "TRACE"), ("/", "HEAD")])
def test_every_answer_forbids_what_lies_outside(server, request_):
    headers = ask(server, *request_)[1]
    assert HEADERS.items() <= headers.items()
    policy = {rule.split()[0]: rule.split()[1:] for rule in headers["Content-Security-Policy"].split(";")}
    assert policy["default-src"] == ["'none'"]
    allowed = {source for sources in policy.values() for source in sources}
    assert allowed <= {"'none'", "'self'", "'wasm-unsafe-eval'", "blob:"}


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "127.0.0.1:1", "localhost.example.org", "0.0.0.0"])
def test_other_host_names_are_refused(server, host):
    assert ask(server, "/", host=host)[0] == 421
    assert ask(server, "/", host=f"LOCALHOST:{server.server_port}")[0] == 200


def test_listens_on_the_loopback_address_alone(server):
    assert server.server_address[0] == "127.0.0.1"
    assert server.url == f"http://127.0.0.1:{server.server_port}/"
    with pytest.raises(OSError, match="refused"):  # another address of this machine
        socket.create_connection(("127.0.0.2", server.server_port), timeout=2)


def test_a_port_that_is_taken_is_a_users_mistake(server):
    refused(UsageError, f"port {server.server_port} is in use", PageServer, RESOURCES, server.server_port)
    refused(UsageError, "a port is 0", PageServer, RESOURCES, 70000)
