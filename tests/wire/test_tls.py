"""What is wrong with a connection that should be private, in words that help; and who speaks what on a port.

The certificates in tests/fixtures/certificates are of an authority of their own, `ca.pem`; their keys are known to all.
"""

from __future__ import annotations

import gc
import json
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from live import LiveServer

from fedmoe.wire.client import ConnectionSettingError, CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.unreachable import speaks_tls

CERTIFICATES = Path(__file__).parents[1] / "fixtures" / "certificates"
FEDERATION = {"fedmoe": "1", "manifest": None, "min_sync_interval": 1.0, "wire_dtypes": ["fp32"]}


class _Coordinator(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps(FEDERATION).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Quiet(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A handshake that fails is what these tests are about."""


@contextmanager
def encrypted(certificate: str) -> Iterator[int]:
    """A coordinator behind TLS with this certificate; gives its port."""
    server = _Quiet(("127.0.0.1", 0), _Coordinator)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(CERTIFICATES / f"{certificate}.pem")
    server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def _trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "ca.pem"))
    monkeypatch.delenv("SSL_CERT_DIR", raising=False)


def told(url: str) -> str:
    with CoordinatorClient(url, attempts=1) as client, pytest.raises(CoordinatorUnavailableError) as caught:
        client.federation()
    assert caught.value.advised
    return str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1"])
def test_a_certificate_of_a_trusted_authority_is_taken_70(host: str) -> None:
    with encrypted("good") as port, CoordinatorClient(f"https://{host}:{port}", attempts=1) as client:
        assert client.federation().fedmoe == "1"


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        ("expired", ["certificate expired", "make a new one"]),
        ("early", ["certificate is not valid yet", "clock"]),
        ("other", ["certificate is for another address", "127.0.0.1"]),
        ("self", ["certificate not trusted", "self-signed", "set SSL_CERT_FILE"]),
    ],
)
def test_a_certificate_that_is_refused_is_told_with_the_reason_and_the_way_out_70(
    certificate: str, words: list[str]
) -> None:
    with encrypted(certificate) as port:
        text = told(f"https://127.0.0.1:{port}")
    for word in (*words, "fedmoe doctor"):
        assert word in text


def test_one_for_another_host_name_is_told_70() -> None:
    with encrypted("other") as port:
        assert "certificate is for another host" in told(f"https://localhost:{port}")


def test_an_unknown_authority_is_told_and_the_advice_works_70(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    with encrypted("good") as port:
        text = told(f"https://localhost:{port}")
        assert "certificate not trusted" in text
        assert "set SSL_CERT_FILE" in text
        monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "ca.pem"))
        with CoordinatorClient(f"https://localhost:{port}", attempts=1) as client:
            client.federation()


def test_so_does_the_advice_for_a_self_signed_one_70(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(CERTIFICATES / "self.pem"))
    with encrypted("self") as port, CoordinatorClient(f"https://localhost:{port}", attempts=1) as client:
        client.federation()


@pytest.mark.parametrize("content", [None, "no certificate at all"])
def test_a_file_of_certificates_that_cannot_be_used_is_named(
    content: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "authorities.pem"
    if content is not None:
        file.write_text(content)
    monkeypatch.setenv("SSL_CERT_FILE", str(file))
    with pytest.raises(ConnectionSettingError, match=r"SSL_CERT_FILE names .*authorities\.pem.*PEM"):
        CoordinatorClient("https://localhost:5000")


def test_without_tls_such_a_file_does_no_harm(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere.pem")
    with CoordinatorClient(server.url, attempts=1) as client:
        client.federation()


def test_https_to_a_port_that_speaks_http_is_told_23(server: LiveServer) -> None:
    assert "this port speaks http, not https" in told(f"https://127.0.0.1:{server.port}")


def test_http_to_a_port_that_speaks_https_is_told_23() -> None:
    with encrypted("self") as port:
        assert "this port speaks https: write https://" in told(f"http://127.0.0.1:{port}")


def test_a_port_that_hangs_up_is_not_called_https() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]

        def hang_up() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                connection.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        with (
            CoordinatorClient(f"http://127.0.0.1:{port}", attempts=1) as client,
            pytest.raises(CoordinatorUnavailableError, match="does not answer"),
        ):
            client.federation()


def test_a_port_that_resets_leaves_no_socket_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """The connection is reset before the handshake begins: Python 3.11 leaves its own TLS socket unclosed there."""
    connect = socket.create_connection
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reset(address: tuple[str, int], timeout: float) -> socket.socket:
            connection = connect(address, timeout)
            peer, _ = listener.accept()
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            return connection

        monkeypatch.setattr(socket, "create_connection", reset)
        assert not speaks_tls(*listener.getsockname())
        gc.collect()
