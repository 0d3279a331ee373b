"""A pinned key: only who has it is spoken to, whatever its certificate says, and nobody else learns anything."""

from __future__ import annotations

import socket
import socketserver
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from fedmoe.runtime.fingerprint import key_fingerprint
from fedmoe.wire.client import ConnectionSettingError, CoordinatorClient, CoordinatorUnavailableError

CERTIFICATES = Path(__file__).parents[1] / "fixtures" / "certificates"


class _Server(ThreadingHTTPServer):
    """Keeps every request that arrives."""

    requests: list[str]

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away after the handshake is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self.server.requests.append(self.path)
        body = b'{"status": "ok"}'
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@contextmanager
def server(certificate: str) -> Iterator[tuple[str, list[str]]]:
    """A server with this certificate: its address, and the requests that reached it."""
    running = _Server(("127.0.0.1", 0), _Handler)
    running.requests = []
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATES / f"{certificate}.pem")
    running.socket = context.wrap_socket(running.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"https://127.0.0.1:{running.server_port}", running.requests
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def pin_of(certificate: str) -> str:
    text = (CERTIFICATES / f"{certificate}.pem").read_text()
    begin = text.index("-----BEGIN CERTIFICATE")
    end = text.index("-----END CERTIFICATE-----") + len("-----END CERTIFICATE-----")
    return key_fingerprint(ssl.PEM_cert_to_DER_cert(text[begin:end]))


@pytest.mark.parametrize("certificate", ["self", "expired", "other"])
def test_the_pinned_key_is_taken_whatever_else_is_in_its_certificate(certificate: str) -> None:
    with server(certificate) as (url, requests), CoordinatorClient(f"{url}#{pin_of(certificate)}") as client:
        assert client.healthy()
        assert (client.url, requests) == (url, ["/healthz"])


def test_another_key_gets_no_request_even_with_a_certificate_that_is_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "ca.pem"))
    with server("good") as (url, requests):
        with CoordinatorClient(url, attempts=1) as trusting:
            assert trusting.healthy()
        with (
            CoordinatorClient(f"{url}#{pin_of('self')}", "a-secret-token-of-some-length", attempts=1) as client,
            pytest.raises(CoordinatorUnavailableError, match="nothing was sent") as caught,
        ):
            client.federation()
        assert caught.value.advised
        assert requests == ["/healthz"]


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (f"http://127.0.0.1:1#{'a' * 64}", "a fingerprint is of TLS"),
        ("https://127.0.0.1:1#", "is no fingerprint"),
        (f"https://127.0.0.1:1#{'a' * 63}", "is no fingerprint"),
        (f"https://127.0.0.1:1#{'g' * 64}", "is no fingerprint"),
        (f"https://127.0.0.1:1#{'a' * 64}#{'a' * 64}", "is no fingerprint"),
    ],
)
def test_what_is_no_fingerprint_is_refused_before_a_connection(url: str, told: str) -> None:
    with pytest.raises(ConnectionSettingError, match=told):
        CoordinatorClient(url)


@contextmanager
def tunnel(port: int) -> Iterator[tuple[str, list[bytes]]]:
    """A proxy that leads every CONNECT to a port of this machine: its URL, and every byte that it can read."""
    read: list[bytes] = []

    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            while (line := self.rfile.readline()) not in (b"\r\n", b""):
                read.append(line)
            self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
            with socket.create_connection(("127.0.0.1", port)) as beyond:
                back = threading.Thread(target=_passed_on, args=(beyond, self.connection, []))
                back.start()
                _passed_on(self.connection, beyond, read)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{proxy.server_address[1]}", read
        finally:
            proxy.shutdown()
            thread.join()


def _passed_on(source: socket.socket, target: socket.socket, read: list[bytes]) -> None:
    with suppress(OSError):
        while part := source.recv(1 << 16):
            read.append(part)
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("certificate", ["self", "other"])
def test_through_a_proxy_the_pinned_key_alone_is_spoken_to_and_the_proxy_reads_nothing(
    certificate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_PROXY", "no_proxy", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    token = "a-token-that-nobody-else-may-read"
    with server(certificate) as (url, requests), tunnel(int(url.rpartition(":")[2])) as (proxy, read):
        monkeypatch.setenv("HTTPS_PROXY", proxy)
        with CoordinatorClient(f"https://coordinator.example:5000#{pin_of('self')}", token, attempts=1) as client:
            if certificate == "self":
                assert client.healthy()
            else:
                with pytest.raises(CoordinatorUnavailableError, match="another one than the pinned one"):
                    client.federation()
    assert read[0].startswith(b"CONNECT coordinator.example:5000")
    assert token.encode() not in b"".join(read)
    assert requests == (["/healthz"] if certificate == "self" else [])
