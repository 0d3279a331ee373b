"""A TCP proxy that can stop carrying bytes, as a network that is cut: nothing arrives, nothing is refused."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field

from support import free_port


@dataclass
class HoldingProxy:
    """Carries connections on a loopback port of its own to `target`, another port, unless it is `held`."""

    target: int
    port: int = field(default_factory=free_port)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port), backlog=64)
        self._open: set[socket.socket] = set()
        self._mutex = threading.Lock()
        self._carries = threading.Event()
        self._carries.set()
        threading.Thread(target=self._accept, daemon=True).start()

    def hold(self) -> None:
        """Carry nothing from now on; what is sent meanwhile waits."""
        self._carries.clear()

    def release(self, lose: bool) -> None:
        """Carry again: what waited arrives late, or is lost together with its connections."""
        if lose:
            self._break()
        self._carries.set()

    def close(self) -> None:
        """End it; nothing is listening afterwards."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._break()
        self._carries.set()

    def _break(self) -> None:
        with self._mutex:
            broken, self._open = self._open, set()
        for end in broken:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._connect, args=[client], daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        self._carries.wait()
        try:
            server = socket.create_connection(("127.0.0.1", self.target))
        except OSError:
            client.close()
            return
        with self._mutex:
            self._open |= {client, server}
        ways = [
            threading.Thread(target=self._carry, args=ends, daemon=True)
            for ends in ((client, server), (server, client))
        ]
        for way in ways:
            way.start()
        for way in ways:
            way.join()
        for end in (client, server):
            end.close()

    def _carry(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self._carries.wait()
                sink.sendall(data)
        self._carries.wait()
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        with self._mutex:
            self._open -= {source, sink}
