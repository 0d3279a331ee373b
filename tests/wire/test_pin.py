"""A pinned key: only who has it is spoken to, whatever its certificate says, and nobody else learns anything."""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
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
