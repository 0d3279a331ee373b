"""Listening sockets, and graceful shutdown of a server by signals."""

from __future__ import annotations

import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

_STOPS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


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
