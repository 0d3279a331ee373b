"""Every variable that names a proxy works or is refused in words; this machine is never asked through one."""

from __future__ import annotations

import socket
import socketserver
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import structlog
from live import JOIN, LiveServer, listening, open_house
from support import MANIFEST

from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import ConnectionSettingError, CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import UpdateHeader
from fedmoe.wire.transport import names_this_machine, proxy_for

TOKEN = "secret-token-of-some-length-000"
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
HEADER = UpdateHeader(expert="python", worker="w1", epoch="e1", sequence=0, base_version=0)


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@dataclass
class Proxy:
    """A proxy that answers everything itself, with `status`; `asked` is what it saw: method, target, token."""

    status: int = 200
    body: bytes = b"<html>proxy</html>"
    headers: dict[str, str] = field(default_factory=dict)
    asked: list[tuple[str, str, str | None]] = field(default_factory=list)
    credentials: list[str | None] = field(default_factory=list)
    port: int = 0

    @contextmanager
    def running(self) -> Iterator[Proxy]:
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.asked.append((self.command, self.path, self.headers.get("Authorization")))
                proxy.credentials.append(self.headers.get("Proxy-Authorization"))
                self.send_response(proxy.status)
                for name, value in ({"Content-Type": "text/html"} | proxy.headers).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(proxy.body)))
                self.end_headers()
                self.wfile.write(proxy.body)

            do_POST = do_CONNECT = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = server.server_port
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            thread.join()
            server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


LISTING = b'{"experts": [], "gateway": null, "enable_gateway": true}'
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "LOCALHOST"])
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_loopback_is_asked_directly_and_no_token_goes_to_a_proxy(
    host: str, variable: str, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Proxy(403).running() as proxy:
        monkeypatch.setenv(variable, proxy.url)
        with CoordinatorClient(f"http://{host}:{server.port}", TOKEN, attempts=1) as client:
            assert client.register("python", "w1", MANIFEST).version == 0
    assert proxy.asked == []


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"])
def test_what_is_elsewhere_is_asked_through_the_proxy(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(200, LISTING, JSON).running() as proxy:
        monkeypatch.setenv(variable, proxy.url if variable.isupper() else proxy.url.removeprefix("http://"))
        with CoordinatorClient("http://coordinator.example:5000", attempts=1) as client:
            assert client.list_experts().experts == []
    assert proxy.asked == [("GET", "http://coordinator.example:5000/list_experts?held_out=true&flags=true", None)]


def test_a_token_that_a_proxy_can_read_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(200, LISTING, JSON).running() as proxy, structlog.testing.capture_logs() as said:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//user:p%40ss@"))
        with CoordinatorClient("http://coordinator.example", TOKEN, attempts=1) as client:
            client.list_experts()
    (warned,) = said
    assert warned["event"] == "token_passes_a_proxy"
    assert "https" in warned["fix"]
    assert "p%40ss" not in str(warned)
    assert TOKEN not in str(warned)
    assert proxy.asked[0][2] == f"Bearer {TOKEN}"
    assert proxy.credentials == ["Basic dXNlcjpwQHNz"]


def test_over_https_the_proxy_sees_the_address_only(monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(403).running() as proxy:
        monkeypatch.setenv("https_proxy", proxy.url)
        with (
            CoordinatorClient("https://coordinator.example", TOKEN, attempts=1) as client,
            pytest.raises(CoordinatorUnavailableError, match=r"the proxy .* \(HTTPS_PROXY\) answered 403") as told,
        ):
            client.federation()
    assert proxy.asked == [("CONNECT", "coordinator.example:443", None)]
    assert told.value.advised


@pytest.mark.parametrize("url", ["http://coordinator.example", "https://coordinator.example"])
def test_a_proxy_that_wants_a_password_is_no_outage(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with Proxy(407).running() as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        with (
            CoordinatorClient(url, TOKEN, attempts=1) as client,
            pytest.raises(RefusedError, match=r"the proxy .*\(ALL_PROXY\) answered 407.*USER:PASSWORD@HOST") as told,
        ):
            client.federation()
    assert told.value.code == "proxy_authentication"


@pytest.mark.parametrize("status", [403, 502, 503, 504, 429])
@pytest.mark.parametrize("named", [True, False])
def test_what_a_proxy_answers_is_told_as_the_proxys(status: int, named: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its variable if one names it; as a proxy in front of the coordinator if none does."""
    headers = {"Server": "nginx/1.2\x9b[31m", "Retry-After": "7"}
    with Proxy(status, headers=headers).running() as proxy:
        if named:
            monkeypatch.setenv("HTTP_PROXY", proxy.url)
        url = "http://coordinator.example" if named else proxy.url
        with (
            CoordinatorClient(url, attempts=1) as client,
            pytest.raises(CoordinatorUnavailableError) as told,
        ):
            client.federation()
    who = f"the proxy {proxy.url} (HTTP_PROXY)" if named else "a proxy in front of 127.0.0.1 ("
    assert str(told.value).startswith(who)
    assert f"answered {status}" in str(told.value)
    assert str(told.value).isprintable()
    assert told.value.retry_after == 7.0


@pytest.mark.parametrize("size", [100, 3 << 20])
def test_a_proxy_that_refuses_the_size_is_told_with_the_size_to_set(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    body = (40).to_bytes(8, "little") + b" " * 40 + b"x" * size
    with Proxy(413).running() as proxy:
        with (
            CoordinatorClient(proxy.url, attempts=1) as client,
            pytest.raises(RefusedError, match="answered 413") as told,
        ):
            client.push(HEADER, body)
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        with (
            CoordinatorClient("http://coordinator.example", attempts=1) as client,
            pytest.raises(RefusedError, match=r"the proxy .* \(ALL_PROXY\) answered 413"),
        ):
            client.push(HEADER, body)
    assert told.value.code == "proxy_size_limit"
    assert f"{len(body):,} bytes ({size:,} of them" in told.value.detail
    limit = 1 if size == 100 else 4
    assert f"client_max_body_size {limit}m" in told.value.fix
    assert limit << 20 >= len(body)


BAD = {
    "ftp://proxy.example:21": "of the kind 'ftp'",
    "socks4://proxy.example:1080": "of the kind 'socks4'",
    "http://": "no URL of a proxy",
    "http://[::1": "no URL of a proxy",
    "http://proxy.example:port": "no URL of a proxy",
}


@pytest.mark.parametrize("proxy", BAD)
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "ALL_PROXY"])
def test_a_proxy_that_cannot_be_used_is_refused_in_words(
    proxy: str, variable: str, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, proxy)
    with pytest.raises(ConnectionSettingError, match=rf"{variable} .*{BAD[proxy]}.*NO_PROXY"):
        CoordinatorClient("http://coordinator.example")
    monkeypatch.setenv("NO_PROXY", "coordinator.example")
    CoordinatorClient("http://coordinator.example").close()
    monkeypatch.delenv("NO_PROXY")
    with CoordinatorClient(server.url) as client:  # on this machine no proxy counts, and none is looked at
        client.federation()


SOCKS = ("socks5", "socks5h")


@pytest.mark.parametrize("scheme", SOCKS)
def test_without_its_package_a_socks_proxy_is_refused_with_the_command_that_installs_it(
    scheme: str, server: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:9")
    with pytest.raises(ConnectionSettingError, match=r"ALL_PROXY names a SOCKS proxy.* run: pip install socksio, or"):
        CoordinatorClient("http://coordinator.example")
    with CoordinatorClient(server.url) as client:  # on this machine no proxy counts
        client.federation()


@contextmanager
def socks_proxy(target: int) -> Iterator[tuple[int, list[bytes]]]:
    """A SOCKS5 proxy (RFC 1928) that leads all requests to a port of this machine; its port, and what was asked for."""
    asked: list[bytes] = []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            taken = self.request.makefile("rb")
            taken.read(taken.read(2)[1])
            self.request.sendall(b"\x05\x00")
            kind = taken.read(4)[3]
            asked.append(taken.read(taken.read(1)[0] if kind == 3 else 4))
            taken.read(2)
            self.request.sendall(bytes([5, 0, 0, 1, 0, 0, 0, 0, 0, 0]))
            with socket.create_connection(("127.0.0.1", target)) as beyond:
                back = threading.Thread(target=_passed_on, args=(beyond, self.request))
                back.start()
                _passed_on(self.request, beyond)
                back.join()

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as proxy:
        thread = threading.Thread(target=proxy.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield proxy.server_address[1], asked
        finally:
            proxy.shutdown()
            thread.join()


def _passed_on(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while part := source.recv(1 << 16):
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("scheme", SOCKS)
def test_with_its_package_a_socks_proxy_leads_to_the_coordinator(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("socksio")
    with (
        open_house(tmp_path, tokens=True) as house,
        listening(house.app) as locked,
        socks_proxy(locked.port) as (port, asked),
    ):
        monkeypatch.setenv("ALL_PROXY", f"{scheme}://127.0.0.1:{port}")
        with CoordinatorClient("http://coordinator.example:5000", JOIN, attempts=1) as client:
            assert client.register("python", "w1", MANIFEST).version == 0
    assert asked == [b"coordinator.example"]


def test_a_socks_proxy_that_is_away_is_told_as_the_proxys(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("socksio")
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    with (
        CoordinatorClient("http://coordinator.example", attempts=1) as client,
        pytest.raises(CoordinatorUnavailableError, match=r"through the proxy socks5://127.0.0.1:9 \(ALL_PROXY\)"),
    ):
        client.federation()


EXCEPTED: dict[str, Callable[[str], bool]] = {
    "*": lambda host: True,
    "coordinator.example": lambda host: host in ("coordinator.example", "a.coordinator.example"),
    "example": lambda host: host.endswith(".example"),
    ".coordinator.example": lambda host: host == "a.coordinator.example",
    "*.coordinator.example": lambda host: host == "a.coordinator.example",
    "10.0.0.0/8": lambda host: host.startswith("10."),
    "10.1.2.3": lambda host: host == "10.1.2.3",
    "fd00::/8": lambda host: host.startswith("[fd"),
    "[fd00::1]": lambda host: host == "[fd00::1]",
    "coordinator.example:5000": lambda host: host in ("coordinator.example", "a.coordinator.example"),
    "coordinator.example:5001": lambda host: False,
    "https://coordinator.example": lambda host: False,
    "all://coordinator.example": lambda host: host in ("coordinator.example", "a.coordinator.example"),
    " , other.example ,10.1.2.3": lambda host: host == "10.1.2.3",
    "": lambda host: False,
}
HOSTS = ["coordinator.example", "a.coordinator.example", "bcoordinator.example", "10.1.2.3", "10.9.9.9", "[fd00::1]"]


@pytest.mark.parametrize("entries", EXCEPTED)
@pytest.mark.parametrize("host", HOSTS)
def test_who_is_excepted_from_the_proxy(entries: str, host: str) -> None:
    proxies = {"http": "http://proxy.example:3128", "no": entries}
    direct = proxy_for(f"http://{host}:5000", proxies) is None
    assert direct == EXCEPTED[entries](host)


def test_https_and_http_have_their_own_variables_and_all_is_for_the_rest() -> None:
    proxies = {"http": "http://one.example", "all": "http://rest.example"}
    assert proxy_for("http://a.example", proxies).url == "http://one.example"  # type: ignore[union-attr]
    assert proxy_for("https://a.example", proxies).variable == "ALL_PROXY"  # type: ignore[union-attr]
    assert proxy_for("https://a.example", {"http": "http://one.example"}) is None


@pytest.mark.parametrize("host", ["10.0.0.1", "example", "localhost.example", "128.0.0.1", "1270.0.0.1", "fd00::1", ""])
def test_what_is_not_this_machine(host: str) -> None:
    assert not names_this_machine(host)


@pytest.mark.parametrize("host", ["::1", "::ffff:127.0.0.1", "::", "a.localhost", "0x7f000001", "127.1"])
def test_other_spellings_of_this_machine(host: str) -> None:
    assert names_this_machine(host)


def test_a_command_tells_a_wrong_proxy_in_one_line_with_status_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from fedmoe.cli import main

    monkeypatch.setenv("HTTP_PROXY", "ftp://proxy.example")
    with pytest.raises(SystemExit) as left:
        main(["experts", "--coordinator-url", "http://coordinator.example"])
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("error: HTTP_PROXY names a proxy of the kind 'ftp'")
