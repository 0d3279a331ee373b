"""A coordinator with its HTTP routes for tests: the application in memory, or listening on a real socket."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx2
import uvicorn
from documented import check_documented
from fastapi import FastAPI
from starlette.testclient import TestClient
from starlette.types import ASGIApp
from support import MANIFEST

from fedmoe.coordinator import Aggregation
from fedmoe.lora.manifest import Manifest
from fedmoe.server.access.tokens import TokenGate
from fedmoe.server.access.turns import Rate
from fedmoe.server.access.uploads import UploadLimits
from fedmoe.server.history.history import History
from fedmoe.server.registrations import RegistrationLimits
from fedmoe.server.routes.routes import create_app
from fedmoe.server.service import CoordinatorService
from fedmoe.server.storage.audit import AuditLog
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.wire.contract.messages import SAFETENSORS, ManifestMessage, RegisterRequest
from fedmoe.wire.http.serving import GuardedProtocol

_DOCUMENTS: dict[bool, dict[str, Any]] = {}
JOIN, ADMIN = "join-token-of-32-characters-00000", "admin-token-of-32-characters-0000"


@dataclass
class House:
    """Everything behind the routes, so that a test can look at what a request left behind."""

    app: FastAPI
    service: CoordinatorService
    gate: TokenGate
    journal: SqliteJournal
    blobs: FolderBlobStore
    folder: Path

    def register(self, *names: str, manifest: Manifest = MANIFEST) -> None:
        """Make experts without the detour over HTTP."""
        for name in names:
            request = RegisterRequest(expert=name, worker="w1", manifest=ManifestMessage.of(manifest))
            asyncio.run(self.service.register(request))

    def kept(self) -> tuple[dict[str, int], int, list[str]]:
        """Versions, journal length and every file of the blob store: what a refused request must not change."""
        deadline = time.monotonic() + 5
        while self.service.intake.uploads and time.monotonic() < deadline:
            time.sleep(0.005)  # a connection that was cut is still being cleaned up
        versions = {name: expert.version for name, expert in self.service.coordinator.experts.items()}
        files = sorted(str(path) for path in self.folder.rglob("*") if path.is_file())
        return versions, self.journal.count(), files

    def client(self, token: str | None = None) -> TestClient:
        """The application without a socket; errors of the house come as answers, not as exceptions."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        client = TestClient(self.app, base_url="http://127.0.0.1", headers=headers, raise_server_exceptions=False)
        client.event_hooks = {"response": [self._check_documented]}
        return client

    def _document(self) -> dict[str, Any]:
        """`/openapi.json`, which all coordinators share that ask for tokens, or that do not: it takes long to make."""
        if self.gate.required not in _DOCUMENTS:
            _DOCUMENTS[self.gate.required] = self.app.openapi()
        return _DOCUMENTS[self.gate.required]

    def _check_documented(self, answer: httpx2.Response) -> None:
        answer.read()
        asked, type_ = answer.request, answer.headers.get("content-type", "")
        check_documented(self._document(), asked.method, asked.url.path, answer.status_code, type_, answer.content)


@contextmanager
def open_house(
    folder: Path,
    aggregation: Aggregation | None = None,
    tokens: bool = False,
    limits: RegistrationLimits | None = None,
    uploads: UploadLimits | None = None,
    min_sync_interval: float | None = None,
    token_rate: Rate | None = None,
    audit: AuditLog | None = None,
) -> Iterator[House]:
    """A coordinator on a folder; with `tokens` it asks for one, and knows `JOIN` and `ADMIN`."""
    journal, blobs = SqliteJournal(folder / "journal.sqlite"), FolderBlobStore(folder / "blobs", reserve_bytes=0)
    history = History(journal, blobs, aggregation or Aggregation())
    service = CoordinatorService(history.recover(), journal, blobs, history, limits=limits)
    service.start()
    gate = TokenGate(journal, tokens, time.time)
    if tokens:
        gate.add(JOIN, "join")
        gate.add(ADMIN, "admin")
    try:
        app = create_app(
            service,
            gate,
            min_sync_interval=min_sync_interval,
            upload_limits=uploads,
            token_rate=token_rate,
            audit=audit,
        )
        yield House(app, service, gate, journal, blobs, folder / "blobs")
    finally:
        service.close()
        journal.close()


def push_parameters(sequence: int = 0, base_version: int = 0, **others: str | float) -> dict[str, str | float]:
    """Query parameters of a push of worker w1 to the expert `python`."""
    fixed: dict[str, str | float] = {"expert": "python", "worker": "w1", "epoch": "e1"}
    return fixed | {"sequence": sequence, "base_version": base_version} | others


def content_digest(body: bytes) -> str:
    return f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:"


def push_headers(body: bytes) -> dict[str, str]:
    """Headers of a correct push."""
    return {"Content-Type": SAFETENSORS, "Content-Digest": content_digest(body)}


@dataclass
class LiveServer:
    """A listening server in a thread."""

    port: int
    uvicorn: uvicorn.Server

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self, timeout: float = 10.0) -> socket.socket:
        """A raw connection."""
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def talk(self, parts: Sequence[bytes], timeout: float = 10.0) -> bytes:
        """Send `parts` and read until the server closes; what the server no longer takes is not sent."""
        with self.connect(timeout) as connection:
            try:
                for part in parts:
                    connection.sendall(part)
            except (BrokenPipeError, ConnectionResetError):
                pass
            return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    """Everything until the server closes or resets; raises `TimeoutError` if it does neither."""
    received = b""
    while True:
        try:
            part = connection.recv(1 << 16)
        except ConnectionResetError:
            return received
        if not part:
            return received
        received += part


def _listener(port: int) -> socket.socket:
    """As the coordinator listens; a socket whose protocol number is 0 gets no TCP_NODELAY from asyncio."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener


@contextmanager
def listening(app: ASGIApp, port: int = 0, loop: Literal["auto", "asyncio"] = "auto") -> Iterator[LiveServer]:
    """Run the application as the coordinator does: uvicorn with our protocol, on a free port of this machine."""
    listener = _listener(port)
    config = uvicorn.Config(
        app,
        loop=loop,
        http=GuardedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
    )
    server = uvicorn.Server(config)

    def run() -> None:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server ended before it began"
            time.sleep(0.002)
        yield LiveServer(listener.getsockname()[1], server)
    finally:
        server.should_exit = True
        thread.join(20)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"
