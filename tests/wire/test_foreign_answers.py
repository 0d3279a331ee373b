from __future__ import annotations

import gzip
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx2
import pytest
from support import MANIFEST

from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.administration import TokenRequest
from fedmoe.wire.contract.messages import PROBLEM, SAFETENSORS, StatisticRequest, UpdateHeader

TOKEN = "secret-token-of-some-length-000"


def header(sequence: int = 0, base_version: int = 0, answer: str = "result") -> UpdateHeader:
    fixed = {"expert": "python", "worker": "w1", "epoch": "e1", "loss": 1.5, "steps": 3}
    return UpdateHeader.model_validate(fixed | {"sequence": sequence, "base_version": base_version, "answer": answer})


def answers(status: int, body: bytes = b"", **headers: str) -> httpx2.MockTransport:
    """A server that always answers the same."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx2.MockTransport(lambda _: httpx2.Response(status, headers=named, stream=httpx2.ByteStream(body)))


HTML = b"<html><body>please log in</body></html>"
JSON = {"content_type": "application/json"}
FOREIGN = {
    "69 502 of a proxy": (502, HTML, {"content_type": "text/html"}),
    "69 login page": (200, HTML, {"content_type": "text/html"}),
    "69 login page that says JSON": (200, HTML, JSON),
    "69 JSON of somebody else": (200, b'{"status": "up"}', JSON),
    "69 redirect": (301, b"", {"location": "http://elsewhere.example/"}),
    "69 redirect to https": (308, b"", {"location": "https://127.0.0.1/"}),
    "69 not found of a web server": (404, HTML, {"content_type": "text/html"}),
    "69 error with JSON of somebody else": (403, b'{"message": "forbidden"}', JSON),
    "69 problem without a code": (403, b'{"title": "no"}', {"content_type": PROBLEM}),
    "69 gzip of its own": (200, gzip.compress(b"{}"), {"content_type": "application/json", "content_encoding": "gzip"}),
    "69 weights in gzip": (200, gzip.compress(b"x"), {"content_type": SAFETENSORS, "content_encoding": "gzip"}),
    "69 weights that are none": (200, b"x" * 100, {"content_type": SAFETENSORS, "content_length": "100"}),
    "69 weights cut short": (200, b"x" * 50, {"content_type": SAFETENSORS, "content_length": "100"}),
    "69 nothing at all": (200, b"", {}),
    "69 no content": (204, b"", {}),
    "69 nothing new, unasked": (304, b"", {}),
}
CALLS: dict[str, Callable[[CoordinatorClient], object]] = {
    "federation": lambda client: client.federation(),
    "list": lambda client: client.list_experts(),
    "register": lambda client: client.register("python", "w1", MANIFEST),
    "pull": lambda client: client.pull_expert("python"),
    "gateway": lambda client: client.pull_gateway(),
    "push": lambda client: client.push(header(), b"body"),
    "push for weights": lambda client: client.push(header(answer="weights"), b"body"),
    "token": lambda client: client.make_token(TokenRequest()),
}
SILENT: dict[str, Callable[[CoordinatorClient], object]] = {
    "statistic": lambda client: client.push_statistic(
        StatisticRequest(expert="python", worker="w1", kind="loss", values={})
    ),
    "revoke": lambda client: client.revoke_token("0" * 64),
}


@pytest.mark.parametrize(
    ("call", "name"), [(c, n) for c in CALLS | SILENT for n in FOREIGN if not (c in SILENT and FOREIGN[n][0] == 204)]
)
def test_what_no_coordinator_says_is_unavailable_and_never_success_69(name: str, call: str) -> None:
    status, body, headers = FOREIGN[name]
    with CoordinatorClient("http://proxy.example", TOKEN, 1, transport=answers(status, body, **headers)) as client:
        with pytest.raises(CoordinatorUnavailableError) as told:
            (CALLS | SILENT)[call](client)
        assert "check the URL" in str(told.value) or name == "69 weights that are none"
        assert TOKEN not in str(told.value)
        assert not client.healthy()


@contextmanager
def web_server(answer: Callable[[BaseHTTPRequestHandler], None]) -> Iterator[str]:
    """A plain web server that is no coordinator; gives its URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: object) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{running.server_address[1]}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_token_never_follows_a_redirect_69(status: int) -> None:
    seen: list[Mapping[str, str]] = []

    def elsewhere(handler: BaseHTTPRequestHandler) -> None:
        seen.append(dict(handler.headers))
        handler.send_response(200)
        handler.send_header("Content-Length", "0")
        handler.end_headers()

    with web_server(elsewhere) as target:

        def redirect(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            handler.send_header("Location", f"{target}/federation")
            handler.send_header("Content-Length", "0")
            handler.end_headers()

        with (
            web_server(redirect) as url,
            CoordinatorClient(url, TOKEN, attempts=1) as client,
            pytest.raises(CoordinatorUnavailableError, match=str(status)),
        ):
            client.federation()
    assert seen == []


def test_a_bomb_in_an_answer_is_not_unpacked_69() -> None:
    """Fault 40."""
    bomb = gzip.compress(b"\x00" * (64 << 20))
    transport = answers(200, bomb, content_type="application/json", content_encoding="gzip")
    with (
        CoordinatorClient("http://proxy.example", attempts=1, transport=transport) as client,
        pytest.raises(CoordinatorUnavailableError, match="proxy"),
    ):
        client.federation()


def test_an_answer_without_end_is_cut_69() -> None:
    sent = 0

    class Endless(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            nonlocal sent
            while True:
                sent += 1 << 16
                yield b" " * (1 << 16)

    transport = httpx2.MockTransport(lambda _: httpx2.Response(200, stream=Endless()))
    with (
        CoordinatorClient("http://proxy.example", attempts=1, transport=transport) as client,
        pytest.raises(CoordinatorUnavailableError, match="not a FedMoE coordinator"),
    ):
        client.federation()
    assert sent <= 5 << 20
