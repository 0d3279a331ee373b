"""Serving with uvicorn: sockets, graceful shutdown, deadlines and size limits on heads; slow readers are cut off.

uvicorn waits for ever for a head that trickles in, takes heads of any size, and keeps an answer in memory for as long
as its receiver does not read. `GuardedProtocol` closes a connection that has not delivered a complete head within
`HEAD_SECONDS`, be it slow, silent or idle from the start, answers 431 to one that is too large, and drops receivers
that read slower than `MIN_READ_BYTES_PER_SECOND`.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import structlog
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedmoe.wire.http.live import WITHOUT_END

_log = structlog.get_logger("fedmoe.http")

HEAD_SECONDS = 10.0
MAX_HEAD_BYTES = 64 << 10
MAX_HEAD_FIELDS = 128
#: How long requests under way may take to end after a stop.
DRAIN_SECONDS = 30
#: How often the progress of a receiver is measured, and what it must read in between.
WRITE_SECONDS = 20.0
MIN_READ_BYTES_PER_SECOND = 16 << 10
# How long a reader of an answer without an end has at a stop to take what was written before.
_LAST_READ_SECONDS = 1.0
# After a refusal the rest of the head is thrown away this long; closing at once could destroy the answer on its way.
_LINGER_SECONDS = 2.0
_SLICE = 16 << 10
_TLS_HANDSHAKE = b"\x16\x03"
_TOO_LARGE = b"HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\nconnection: close\r\n\r\n"
# Windows has no SIGHUP.
_STOPS = (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class _TooManyFieldsError(Exception):
    """Stops the parser in the middle of a head."""


class GuardedProtocol(HttpToolsProtocol):
    """uvicorn's protocol with deadlines and caps on request heads, and a least pace for whoever receives."""

    _head_timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None
    _stop_timer: asyncio.TimerHandle | None = None
    _opening = b""
    _head_bytes = 0
    _in_head = True
    _too_many_fields = False
    _refused = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            # Head and body of an answer are two writes; Nagle would hold the second for the peer's delayed ack, 40 ms.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_head_timer()
        self._stop_write_timer()
        if self._stop_timer is not None:
            self._stop_timer.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """What uvicorn calls at a stop; a page that does not read its stream, as one in the background, is cut off."""
        super().shutdown()
        if self.cycle is not None and self.cycle.scope["state"].get(WITHOUT_END):
            self._stop_timer = self.loop.call_later(_LAST_READ_SECONDS, self.transport.abort)

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        self._opening = self._opening or data[: len(_TLS_HANDSHAKE)]
        rest = data
        # A head is parsed slice by slice, so that its size is known to a slice wherever the body begins.
        while self._in_head and rest and not self.transport.is_closing():
            part, rest = rest[:_SLICE], rest[_SLICE:]
            self._head_bytes += len(part)
            super().data_received(part)
            if self._in_head and self._head_bytes > MAX_HEAD_BYTES:
                self._refuse()
                return
        if rest and not self.transport.is_closing() and not self._refused:
            super().data_received(rest)

    def send_400_response(self, msg: str) -> None:
        """What uvicorn answers to what its parser cannot read; 431 if it was us who stopped the parser."""
        if self._too_many_fields:
            self._refuse()
            return
        if self._opening.startswith(_TLS_HANDSHAKE):
            _log.warning("tls_on_the_http_port", client=self.client, fix="use http://, or start with --tls-cert")
        super().send_400_response(msg)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head = True
        if self._head_timer is None:
            self._await_head()

    def on_header(self, name: bytes, value: bytes) -> None:
        if len(self.headers) >= MAX_HEAD_FIELDS:
            self._too_many_fields = True
            raise _TooManyFieldsError
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._stop_head_timer()
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        super().on_message_complete()
        self._in_head = True
        self._head_bytes = 0

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._write_timer is None:
            self._watch_writing(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        self._stop_write_timer()
        super().resume_writing()

    def _await_head(self) -> None:
        self._head_timer = self.loop.call_later(HEAD_SECONDS, self._give_up)

    def _give_up(self) -> None:
        self._head_timer = None
        if not self.transport.is_closing():
            self.transport.close()

    def _watch_writing(self, unsent: int) -> None:
        self._write_timer = self.loop.call_later(WRITE_SECONDS, self._check_writing, unsent)

    def _check_writing(self, before: int) -> None:
        unsent = self.transport.get_write_buffer_size()
        if before - unsent < WRITE_SECONDS * MIN_READ_BYTES_PER_SECOND:
            _log.warning("receiver_too_slow", client=self.client, unsent_bytes=unsent)
            self.transport.abort()
        else:
            self._watch_writing(unsent)

    def _refuse(self) -> None:
        self._stop_head_timer()
        if self._refused or self.transport.is_closing():
            return
        self._refused = True
        self.transport.write(_TOO_LARGE)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._head_timer = self.loop.call_later(_LINGER_SECONDS, self._give_up)

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None


def server_of(app: ASGIApp, tls_cert: str | None = None, tls_key: str | None = None) -> uvicorn.Server:
    """uvicorn with our protocol; at a stop it gives requests under way `DRAIN_SECONDS`."""
    return uvicorn.Server(
        uvicorn.Config(
            app,
            http=GuardedProtocol,
            ws="none",
            log_config=None,
            access_log=False,
            server_header=False,
            timeout_keep_alive=75,
            timeout_graceful_shutdown=DRAIN_SECONDS,
            ssl_certfile=tls_cert,
            ssl_keyfile=tls_key,
        )
    )


async def end_at_stop(server: uvicorn.Server, end: Callable[[], None]) -> None:
    """Call `end` once the server is to stop: answers without an end of their own would be waited for."""
    while not server.should_exit:
        await asyncio.sleep(0.1)
    end()


def run(server: uvicorn.Server, listener: socket.socket, end: Callable[[], None]) -> None:
    """Serve until a stop; `end` is called as in `end_at_stop`."""

    async def serve() -> None:
        ending = asyncio.create_task(end_at_stop(server, end))
        try:
            await server.serve(sockets=[listener])
        finally:
            ending.cancel()

    with asyncio.Runner(loop_factory=server.config.get_loop_factory()) as runner:
        runner.run(serve())


class PortInUseError(Exception):
    """The address cannot be listened on; the message names it and the way out."""


@contextmanager
def own_signals(server: uvicorn.Server) -> Iterator[None]:
    """Let a stop end in our clean-up: the first signal finishes what is under way, the second ends it at once.

    A terminal that is closed is a stop too, unless whoever started this process said otherwise (`nohup`). uvicorn's own
    handler would raise the signal again when it is done, which would end the process.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        server.force_exit = server.should_exit
        server.should_exit = True

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    server.handle_exit = stop  # type: ignore[method-assign, assignment]
    stops = [number for number in _STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in stops}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def listen(host: str, port: int) -> socket.socket:
    """A bound socket; raises `PortInUseError` where that is not to be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise PortInUseError(
            f"cannot listen on {host}:{port}: {error.strerror}. "
            "Stop what holds the port (on macOS AirPlay uses 5000), or choose another --port."
        ) from error
    return listener
