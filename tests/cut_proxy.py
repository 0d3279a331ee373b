"""A TCP proxy before a database that can be cut off: altogether, or at the next COMMIT before or after it arrives."""

from __future__ import annotations

import contextlib
import socket
import threading
from dataclasses import dataclass, field
from typing import Literal

from support import free_port


@dataclass
class CutProxy:
    """Forwards connections on a loopback port of its own to `target`, another port."""

    target: int
    port: int = field(default_factory=free_port)
    #: What to do with the next COMMIT: let it through, lose it, or lose the answer to it.
    commit: Literal["pass", "lose", "lose the answer"] = "pass"
    #: Whether new connections are refused.
    closed: bool = False
    #: How many COMMITs or answers were lost.
    cuts: int = 0

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._open: set[socket.socket] = set()
        self._mutex = threading.Lock()
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """Break all connections there are."""
        with self._mutex:
            cut, self._open = self._open, set()
        for end in cut:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End it; nothing is listening afterwards."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.closed:
                client.close()
                continue
            try:
                server = socket.create_connection(("127.0.0.1", self.target))
            except OSError:
                client.close()
                continue
            with self._mutex:
                self._open |= {client, server}
            swallow = threading.Event()
            threading.Thread(target=self._pump, args=(client, server, swallow, True), daemon=True).start()
            threading.Thread(target=self._pump, args=(server, client, swallow, False), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, swallow: threading.Event, to_server: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if to_server and b"COMMIT\0" in data and self.commit != "pass":
                    lost, self.commit, self.cuts = self.commit, "pass", self.cuts + 1
                    if lost == "lose":
                        break
                    swallow.set()
                if not to_server and swallow.is_set():
                    break
                sink.sendall(data)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        source.close()
        with self._mutex:
            self._open.discard(source)
