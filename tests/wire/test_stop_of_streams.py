"""A stop of a server whose readers stay connected: streams end at once, also where nobody reads them."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest
from builders import wait_until
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from fedmoe.wire.http import serving
from fedmoe.wire.http.live import LiveState, LiveStates

# More than the sockets of this machine hold for somebody who does not read.
_LARGE = 64 << 20


@contextmanager
def asked(port: int, path: str, buffer: int | None = None) -> Iterator[socket.socket]:
    """A connection on which a path was asked for, and the head of the answer read."""
    with socket.socket() as connection:
        if buffer is not None:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        connection.settimeout(60)
        connection.connect(("127.0.0.1", port))
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        assert connection.recv(15) == b"HTTP/1.1 200 OK"
        yield connection


def rest_of(connection: socket.socket) -> bytes:
    """All that still comes, until the server closes the connection."""
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def test_a_stop_ends_streams_at_once_though_nobody_reads_and_connections_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    # Neither the end of the drain nor the watch over slow readers may be what ends it.
    monkeypatch.setattr(serving, "DRAIN_SECONDS", 3600)
    monkeypatch.setattr(serving, "WRITE_SECONDS", 3600.0)
    states = LiveStates[int](lambda size: LiveState("1", "x" * size), lambda: 1)

    async def live(request: Request) -> Response:
        return states.response(request, int(request.query_params["size"]))

    async def short(request: Request) -> Response:
        return PlainTextResponse("short")

    server = serving.server_of(Starlette(routes=[Route("/live", live), Route("/short", short)]))
    with ExitStack() as opened:
        listener = opened.enter_context(serving.listen("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        serve = threading.Thread(target=serving.run, args=(server, listener, states.close), daemon=True)
        serve.start()
        readers = [opened.enter_context(asked(port, "/live?size=3")) for _ in range(2)]
        idle = opened.enter_context(asked(port, "/short"))
        unread = opened.enter_context(asked(port, f"/live?size={_LARGE}", buffer=4096))
        connections = server.server_state.connections
        wait_until(lambda: any(one.transport.get_write_buffer_size() for one in [*connections]), 60)
        server.should_exit = True
        serve.join(120)
        assert not serve.is_alive()
        for reader in readers:
            assert rest_of(reader).endswith(b"data: xxx\n\n\r\n0\r\n\r\n")  # whole, and its end is said
        assert rest_of(idle).endswith(b"short")
        assert len(rest_of(unread)) < _LARGE
