from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from live import ADMIN, JOIN, LiveServer, listening, open_house

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.access.authentication import BodyLimits, BufferedBodies, BufferedBody
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import StatisticRequest

LIMITS = BodyLimits(of_token=50, total=100, free=10)
SMALL = StatisticRequest(expert="python", worker="w1", kind="held_out", values={"loss": 1.0})


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from(["", "a", "b", "c"]), st.integers(0, 60)), max_size=80))
def test_no_more_is_held_than_the_limits_allow_and_all_of_it_is_given_back(steps: list[tuple[int, str, int]]) -> None:
    bodies = BufferedBodies(LIMITS)
    held: dict[int, BufferedBody] = {}
    for number, token, size in steps:
        body = held.get(number) or held.setdefault(number, bodies.of(token))
        try:
            body.add(size)
        except RefusedError:
            held.pop(number).release()
        assert bodies.total == sum(bodies.by_token.values()) <= LIMITS.total
        assert all(size <= LIMITS.of_token for name, size in bodies.by_token.items() if name)
    for body in held.values():
        body.release()
    assert (bodies.total, dict(bodies.by_token)) == (0, {})


def test_small_bodies_always_find_room() -> None:
    bodies = BufferedBodies(LIMITS)
    for token in ("a", "b"):
        bodies.of(token).add(LIMITS.of_token + LIMITS.free)
    assert bodies.total == LIMITS.total
    for _ in range(100):
        bodies.of("a").add(LIMITS.free)
    with pytest.raises(RefusedError, match="this token's"):
        bodies.of("a").add(LIMITS.free + 1)
    with pytest.raises(RefusedError, match="all requests"):
        bodies.of("c").add(LIMITS.free + 1)


def begun(server: LiveServer, token: str, size: int) -> socket.socket:
    """A statistic of which `size` bytes were sent and more are promised."""
    connection = server.connect()
    lines = [
        "POST /push_statistics HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/json",
        f"Content-Length: {size + 1}",
        f"Authorization: Bearer {token}",
    ]
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + b" " * size)
    return connection


def answer(connection: socket.socket, seconds: float) -> bytes:
    connection.settimeout(seconds)
    try:
        return connection.recv(4096)
    except TimeoutError:
        return b""


def code_of_whole(server: LiveServer, size: int) -> str:
    """The code of the answer to a body that arrives whole: blanks are no JSON."""
    with begun(server, JOIN, size) as connection:
        connection.sendall(b" ")
        return str(json.loads(answer(connection, 10.0).partition(b"\r\n\r\n")[2])["code"])


def test_slow_statistics_of_one_token_take_bounded_memory_and_nobody_elses_room_51(tmp_path: Path) -> None:
    size = 3 << 20
    with open_house(tmp_path, tokens=True) as house, listening(house.app) as server, ExitStack() as opened:
        house.register("python")
        slow = [opened.enter_context(begun(server, JOIN, size)) for _ in range(BodyLimits().of_token // size + 1)]
        told = [answer(connection, 0.5) for connection in slow]
        refused = [one for one in told if one]
        assert 1 <= len(refused) < len(slow)
        assert all(b" 429 " in one and b"retry-after: 2" in one.lower() for one in refused)
        with CoordinatorClient(server.url, ADMIN, attempts=1) as client:
            client.push_statistic(SMALL)
        with CoordinatorClient(server.url, JOIN, attempts=1) as client:
            client.push_statistic(SMALL)  # a small body of the same token too
        opened.close()

        deadline = time.monotonic() + 20
        while (code := code_of_whole(server, size)) != "malformed":
            assert (code, time.monotonic() < deadline) == ("quota_exceeded", True)
