from __future__ import annotations

import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from live import House, LiveServer, content_digest, listening, open_house, read_all
from support import MANIFEST, make_body

from fedmoe.lora.adapter import Layout, ModuleShape
from fedmoe.lora.manifest import Manifest
from fedmoe.wire.http import body_limits as guard
from fedmoe.wire.http import serving as protocol

BODY = make_body(1)
PUSH = b"/push_expert_update?expert=python&worker=w1&epoch=e1&sequence=0&base_version=0"
TYPED = b"Content-Type: application/vnd.safetensors\r\nContent-Digest: " + content_digest(BODY).encode() + b"\r\n"
HEALTH = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"


def head(fields: bytes, target: bytes = PUSH, method: bytes = b"POST") -> bytes:
    return method + b" " + target + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n" + fields + b"\r\n"


def status(answer: bytes) -> int:
    assert answer.startswith(b"HTTP/1.1 "), answer[:200]
    return int(answer[9:12])


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    """One coordinator for the whole file: what is sent here is refused, or the same update again."""
    with open_house(tmp_path_factory.mktemp("protocol")) as opened:
        opened.register("python")
        yield opened


@pytest.fixture(scope="module")
def server(house: House) -> Iterator[LiveServer]:
    with listening(house.app) as running:
        yield running


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines that a test can wait for."""
    monkeypatch.setattr(protocol, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "_LINGER_SECONDS", 0.3)
    monkeypatch.setattr(protocol, "WRITE_SECONDS", 0.3)
    monkeypatch.setattr(guard, "IDLE_SECONDS", 0.3)
    monkeypatch.setattr(guard, "LINGER_SECONDS", 0.3)


@contextmanager
def stays_quick(server: LiveServer, most: float = 1.0) -> Iterator[None]:
    """Ask for `/healthz` all the while; no answer may take longer than `most` seconds (median far below)."""
    stop, times = threading.Event(), []

    def ask() -> None:
        while not stop.wait(0.01):
            started = time.perf_counter()
            with server.connect() as connection:
                connection.sendall(HEALTH)
                assert connection.recv(100).startswith(b"HTTP/1.1 200")
            times.append(time.perf_counter() - started)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    assert max(times) < most
    assert sorted(times)[len(times) // 2] < 0.1


def lengthy(length: int) -> bytes:
    return TYPED + b"Content-Length: %d\r\n" % length


def test_a_truncated_body_changes_nothing_and_prints_no_traceback_17(
    house: House, server: LiveServer, capfd: pytest.CaptureFixture[str]
) -> None:
    before = house.kept()
    with server.connect() as connection:
        connection.sendall(head(lengthy(len(BODY))) + BODY[:-1])
    told, deadline = "", time.monotonic() + 20
    while (house.service.intake.uploads or "truncated" not in told) and time.monotonic() < deadline:
        time.sleep(0.01)
        # Each reading empties both streams: what is read must be kept.
        told += "".join(capfd.readouterr())
    # All that arrived, or nothing where the server hears of the end before it takes the body up.
    assert re.search(rf"the connection closed after (0|{len(BODY) - 1}) bytes", told)
    assert "Traceback" not in told
    assert house.kept() == before


AMBIGUOUS = {
    "18 Content-Length and Transfer-Encoding": lengthy(len(BODY)) + b"Transfer-Encoding: chunked\r\n",
    "18 two equal Content-Lengths": lengthy(len(BODY)) + b"Content-Length: %d\r\n" % len(BODY),
    "18 two other Content-Lengths": lengthy(len(BODY)) + b"Content-Length: 3\r\n",
    "18 a negative Content-Length": TYPED + b"Content-Length: -5\r\n",
    "18 a Content-Length in words": TYPED + b"Content-Length: five\r\n",
    "18 a Content-Length with a sign": TYPED + b"Content-Length: +5\r\n",
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_ambiguous_lengths_are_400_and_the_connection_closes_18(house: House, server: LiveServer, name: str) -> None:
    before = house.kept()
    assert status(server.talk([head(AMBIGUOUS[name]) + BODY])) == 400
    assert house.kept() == before


def test_bytes_after_the_declared_body_are_not_taken_for_a_request_18(server: LiveServer) -> None:
    answer = server.talk([head(lengthy(len(BODY))) + BODY + b"xxxxxxxxxx\r\n\r\n"])
    assert answer.count(b"HTTP/1.1 ") == 1
    assert status(answer) == 400


GARBAGE = {
    "23 a TLS handshake": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
    "23 bytes that are no HTTP": b"\x00\xff\xfe hello\r\n\r\n",
    "23 HTTP/2 without asking": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "23 a path that is not ASCII": b"GET /h\xc3\xa4 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
    "23 a tunnel": b"CONNECT a:1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_not_http_is_400_23(server: LiveServer, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert status(server.talk([GARBAGE[name]])) == 400
    told = "".join(capfd.readouterr())
    assert ("tls_on_the_http_port" in told) == ("TLS" in name)
    assert "Traceback" not in told


@pytest.mark.parametrize("length", [20_000_000, 10**12])
def test_a_body_over_the_cap_is_413_at_once_19_20(house: House, server: LiveServer, length: int) -> None:
    """The answer comes before the body: nothing but the head was sent."""
    before = house.kept()
    with server.connect() as connection:
        started = time.perf_counter()
        connection.sendall(head(lengthy(length)))
        answer = connection.recv(4096)
        assert time.perf_counter() - started < 1.0
    assert status(answer) == 413
    assert b"connection: close" in answer
    assert house.kept() == before


def test_a_client_that_sends_on_still_gets_the_413_19(server: LiveServer) -> None:
    """Closing with unread bytes would reset the connection; the rest is thrown away instead."""
    answer = server.talk([head(lengthy(20_000_000)), b"x" * 20_000_000])
    assert status(answer) == 413
    assert b"too_large" in answer


def test_a_json_body_over_the_cap_is_413_19(server: LiveServer, short: None) -> None:
    fields = b"Content-Type: application/json\r\nContent-Length: 5000000\r\n"
    assert status(server.talk([head(fields, b"/register_expert")], 5)) == 413
    chunked = b"Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n"
    parts = [head(chunked, b"/register_expert"), *[b"10000\r\n" + b" " * 65536 + b"\r\n"] * 80]
    assert status(server.talk(parts)) == 413


def test_a_gigabyte_in_chunks_is_413_and_takes_no_memory_19(house: House, server: LiveServer, short: None) -> None:
    before, memory = house.kept(), psutil.Process().memory_info().rss
    piece = b"100000\r\n" + b"x" * (1 << 20) + b"\r\n"
    with stays_quick(server):
        answer = server.talk([head(TYPED + b"Transfer-Encoding: chunked\r\n"), *[piece] * 1024])
    assert status(answer) == 413
    assert psutil.Process().memory_info().rss - memory < 64 << 20
    assert house.kept() == before


@pytest.mark.parametrize(
    "fields",
    [
        b"X: " + b"a" * 1_000_000 + b"\r\n",
        b"".join(b"h%d: v\r\n" % i for i in range(10_000)),
        b"".join(b"h%d: v\r\n" % i for i in range(200)),
    ],
)
def test_heads_that_are_too_large_are_431_22(server: LiveServer, fields: bytes) -> None:
    assert status(server.talk([b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + fields + b"\r\n"])) == 431


def test_a_target_that_is_too_long_is_431_22(server: LiveServer) -> None:
    assert status(server.talk([b"GET /" + b"a" * 1_000_000 + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"])) == 431


def test_a_head_just_below_the_limits_is_taken_22(server: LiveServer) -> None:
    fields = b"".join(b"h%d: v\r\n" % i for i in range(100)) + b"X: " + b"a" * 60_000 + b"\r\nConnection: close\r\n"
    assert status(server.talk([b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n" + fields + b"\r\n"])) == 200


@pytest.mark.parametrize("cut", [-3, -2, -1])
def test_a_head_cut_anywhere_before_a_large_body_is_not_too_large_22(server: LiveServer, cut: int) -> None:
    """The end of the head may come in another packet than its blank line, together with much of the body."""
    start = head(lengthy(500_000))
    with server.connect() as connection:
        connection.sendall(start[:cut])
        time.sleep(0.05)
        connection.sendall(start[cut:] + b"x" * 500_000)
        assert status(connection.recv(4096)) == 400  # malformed or damaged, but read


def test_slow_heads_are_closed_at_the_deadline_21(server: LiveServer, short: None) -> None:
    with stays_quick(server), server.connect() as connection:
        started = time.perf_counter()
        for byte in head(b"X: " + b"a" * 500 + b"\r\n"):
            try:
                connection.sendall(bytes([byte]))
            except (BrokenPipeError, ConnectionResetError):
                break
            time.sleep(0.02)
        else:
            pytest.fail("the whole head could be sent, at 50 bytes a second")
        assert 0.2 < time.perf_counter() - started < 5


def test_silent_connections_are_closed_at_the_deadline_21(server: LiveServer, short: None) -> None:
    connections = [server.connect() for _ in range(50)]
    with stays_quick(server):
        assert [read_all(connection) for connection in connections] == [b""] * 50
    for connection in connections:
        connection.close()


def test_a_connection_that_begins_a_second_head_and_stops_is_closed_21(server: LiveServer, short: None) -> None:
    with server.connect() as connection:
        connection.sendall(HEALTH + b"GET /healthz HT")
        started = time.perf_counter()
        assert read_all(connection).count(b"HTTP/1.1 200") == 1
        assert time.perf_counter() - started < 5


JSON_HEAD = b"Content-Type: application/json\r\nContent-Length: 1000\r\n"


@pytest.mark.parametrize(
    ("request_head", "route"), [(head(lengthy(len(BODY))), "push"), (head(JSON_HEAD, b"/register_expert"), "json")]
)
def test_slow_bodies_are_408_at_the_deadline_21(
    house: House, server: LiveServer, short: None, request_head: bytes, route: str
) -> None:
    before = house.kept()
    with stays_quick(server), server.connect() as connection:
        connection.sendall(request_head)
        started = time.perf_counter()
        answer = trickle(connection)
        assert 0.2 < time.perf_counter() - started < 5
    assert status(answer) == 408
    assert b"too_slow" in answer
    assert house.kept() == before
    assert house.service.intake.uploads == 0


def trickle(connection: socket.socket) -> bytes:
    """One byte of body every 50 ms: never idle for long, always too slow."""
    connection.settimeout(0.05)
    while True:
        try:
            connection.sendall(b" ")
            answer = connection.recv(4096)
        except TimeoutError:
            continue
        return answer


def test_a_refused_body_does_not_keep_its_connection_for_ever_21(server: LiveServer, short: None) -> None:
    with server.connect() as connection:
        connection.sendall(head(b"Content-Length: 100000\r\n", b"/nothing"))
        answer = read_all(connection)
    assert status(answer) == 404
    assert b"connection: close" in answer


def test_whoever_does_not_read_the_answer_is_dropped_21(tmp_path: Path, short: None) -> None:
    wide = Layout((ModuleShape("layers.0.q", 1 << 20, 1 << 20),), 4)
    request = head(b"Accept: application/vnd.safetensors\r\n", b"/get_all_expert_weights", b"GET")
    with open_house(tmp_path) as house, listening(house.app) as server:
        house.register("wide", manifest=Manifest(MANIFEST.base, wide, 1.0))
        connection = server.connect()
        connection.sendall(request)
        assert status(connection.recv(4096)) == 200
        deadline = time.monotonic() + 5
        while server.uvicorn.server_state.connections and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not server.uvicorn.server_state.connections
        connection.close()


def test_a_slow_but_steady_reader_gets_everything_21(tmp_path: Path, short: None) -> None:
    wide = Layout((ModuleShape("layers.0.q", 1 << 18, 1 << 18),), 4)
    request = head(b"Accept: application/vnd.safetensors\r\nConnection: close\r\n", b"/get_all_expert_weights", b"GET")
    with open_house(tmp_path) as house, listening(house.app) as server, server.connect() as connection:
        house.register("wide", manifest=Manifest(MANIFEST.base, wide, 1.0))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        connection.sendall(request)
        received, started = 0, time.monotonic()
        while part := connection.recv(1 << 16):
            received += len(part)
            time.sleep(0.005)
        assert received > wide.size * 4
        assert time.monotonic() - started > 2 * protocol.WRITE_SECONDS


def test_pipelined_requests_are_answered_in_order(server: LiveServer) -> None:
    last = HEALTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    other = head(b"", b"/nothing", b"GET")
    answer = server.talk([HEALTH * 3 + other + HEALTH * 2 + last])
    assert [int(part[:3]) for part in answer.split(b"HTTP/1.1 ")[1:]] == [200, 200, 200, 404, 200, 200, 200]


def test_a_connection_is_used_again_after_a_complete_request(house: House, server: LiveServer) -> None:
    with server.connect() as connection:
        for _ in range(3):
            connection.sendall(head(lengthy(len(BODY))) + BODY)
            assert status(connection.recv(4096)) == 200
        connection.sendall(head(lengthy(len(BODY))) + b"x" * len(BODY))
        assert status(connection.recv(4096)) == 400
        connection.sendall(HEALTH)
        assert status(connection.recv(4096)) == 200
    assert house.service.coordinator.expert("python").version == 1


@pytest.mark.parametrize(
    ("request_head", "expected"), [(head(lengthy(10**9)), 413), (head(b"X: " + b"a" * 100_000 + b"\r\n"), 431)]
)
def test_after_413_and_431_a_connection_takes_nothing_more(
    house: House, server: LiveServer, short: None, request_head: bytes, expected: int
) -> None:
    answer = server.talk([request_head, HEALTH * 3])
    assert status(answer) == expected
    assert answer.count(b"HTTP/1.1 ") == 1


def test_a_body_that_waits_for_100_continue_is_never_asked_for_when_refused(server: LiveServer) -> None:
    with server.connect() as connection:
        connection.sendall(head(lengthy(10**9) + b"Expect: 100-continue\r\n"))
        assert status(connection.recv(4096)) == 413
    with server.connect() as connection:
        connection.sendall(head(lengthy(len(BODY)) + b"Expect: 100-continue\r\n"))
        assert status(connection.recv(25)) == 100
        connection.sendall(BODY)
        assert status(connection.recv(4096)) == 200


def test_answers_are_not_held_back_for_the_peers_delayed_ack(house: House) -> None:
    """Head and body are two writes: with Nagle's algorithm the second waits 40 ms, on loops that leave it on."""
    times = []
    with listening(house.app, loop="asyncio") as server, server.connect() as connection:
        for _ in range(10):
            started = time.perf_counter()
            connection.sendall(HEALTH)
            answer = b""
            while b"ok" not in answer:
                answer += connection.recv(4096)
            times.append(time.perf_counter() - started)
    assert sorted(times)[5] < 0.03
