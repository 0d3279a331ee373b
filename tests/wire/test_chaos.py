"""A network that cuts, holds up and swallows: whatever it does to a push, its client's next try lands it once."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from live import LiveServer, listening, open_house
from support import EPOCH, make_body

from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import UpdateHeader, UpdateResult


@dataclass
class Weather:
    """What happens to the bytes of the next connections.

    `up` and `down` bytes pass before the connection is reset, None: all. `swallow`: what the server says is lost, and
    the connection stays. `piece` bytes go at once, with a pause of `pause` seconds after each.
    """

    up: int | None = None
    down: int | None = None
    swallow: bool = False
    piece: int = 1 << 16
    pause: float = 0.0
    passed: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})


def _pump(source: socket.socket, target: socket.socket, weather: Weather, way: str, left: int | None) -> None:
    """Bytes of one direction until somebody closes, or the weather does."""
    with suppress(OSError):
        while data := source.recv(weather.piece):
            if way == "down" and weather.swallow:
                continue
            part = data if left is None else data[:left]
            weather.passed[way] += len(part)  # before the receiver can go on
            target.sendall(part)
            if left is not None and (left := left - len(part)) <= 0:
                # A reset, not an orderly end: nothing that is still on its way arrives.
                for end in (source, target):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                break
            time.sleep(weather.pause)
    for end in (source, target):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
        end.close()


@contextmanager
def proxy(server: LiveServer) -> Iterator[tuple[str, Weather]]:
    """A proxy in front of the server: its URL, and the weather to be set."""
    weather, listener = Weather(), socket.create_server(("127.0.0.1", 0))
    threads: list[threading.Thread] = []

    def accept() -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                inner = server.connect()
                for way in (("up", client, inner, weather.up), ("down", inner, client, weather.down)):
                    threads.append(threading.Thread(target=_pump, args=(way[1], way[2], weather, way[0], way[3])))
                    threads[-1].start()

    acceptor = threading.Thread(target=accept)
    acceptor.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", weather
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        acceptor.join()
        for thread in threads:
            thread.join()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    with open_house(tmp_path) as house:
        house.register("python")
        with listening(house.app) as running:
            yield running


def push(url: str, sequence: int, timeout: float = 60.0) -> UpdateResult:
    header = UpdateHeader(expert="python", worker="w1", epoch=EPOCH, sequence=sequence, base_version=sequence)
    with CoordinatorClient(url, attempts=1, timeout=timeout) as client:
        return client.push(header, make_body(sequence)).result


def test_a_push_whose_connection_is_reset_at_any_byte_lands_once_68(server: LiveServer) -> None:
    with proxy(server) as (url, weather):
        push(url, 0)
        sizes = dict(weather.passed)
        cuts = [("up", at) for at in range(1, sizes["up"], 61)] + [("down", at) for at in range(1, sizes["down"], 37)]
        for sequence, (way, at) in enumerate(cuts, 1):
            weather.up, weather.down = (at, None) if way == "up" else (None, at)
            with pytest.raises(CoordinatorUnavailableError):
                push(url, sequence)
            weather.up = weather.down = None
            result = push(url, sequence)
            assert (result.version, result.staleness) == (sequence + 1, 0)
            # An answer on its way was of an update that had landed; a request cut short never was.
            assert result.duplicate or way == "up"
        assert len(cuts) > 20


def test_a_push_on_a_slow_line_takes_as_long_as_it_takes_68(server: LiveServer) -> None:
    """Pieces of 100 bytes with pauses, both ways."""
    with proxy(server) as (url, weather):
        weather.piece, weather.pause = 100, 0.05
        assert push(url, 0, timeout=60.0).version == 1
        assert weather.passed["up"] > 500


def test_a_push_into_a_line_that_carries_one_way_only_lands_once_67(server: LiveServer) -> None:
    with proxy(server) as (url, weather):
        weather.swallow = True
        with pytest.raises(CoordinatorUnavailableError):
            push(url, 0, timeout=0.5)
        with CoordinatorClient(server.url) as direct:
            until = time.monotonic() + 60
            while direct.list_experts().experts[0].version < 1 and time.monotonic() < until:
                with pytest.raises(CoordinatorUnavailableError):  # what the client gave up too early
                    push(url, 0, timeout=5.0)
        weather.swallow = False
        result = push(url, 0, timeout=60.0)
        assert (result.version, result.duplicate) == (1, True)
        assert push(url, 1, timeout=60.0).version == 2
