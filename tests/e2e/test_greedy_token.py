"""One token that takes all it can get, beside a worker that only wants to work; in processes of their own."""

from __future__ import annotations

import socket
from collections.abc import Callable
from contextlib import ExitStack

import pytest
from live import ADMIN, JOIN, content_digest
from support import MANIFEST, CoordinatorProcess, make_body

from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.administration import TokenRequest
from fedmoe.wire.contract.messages import UpdateHeader

BODY = make_body(1)


def silent_upload(port: int, number: int, body: bytes) -> socket.socket:
    """A push whose head came, and of whose body no more than `body`."""
    query = f"expert=python&worker=greedy{number}&epoch=e1&sequence=0&base_version=0"
    lines = [
        f"POST /push_expert_update?{query} HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/vnd.safetensors",
        f"Content-Digest: {content_digest(BODY)}",
        f"Content-Length: {len(BODY)}",
        f"Authorization: Bearer {JOIN}",
    ]
    connection = socket.create_connection(("127.0.0.1", port), 10)
    connection.sendall("\r\n".join([*lines, "", ""]).encode() + body)
    return connection


def test_beside_seventy_silent_uploads_of_one_token_every_push_of_another_is_taken_at_once(
    coordinator_process: Callable[..., CoordinatorProcess], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDMOE_TOKEN", JOIN)
    monkeypatch.setenv("FEDMOE_ADMIN_TOKEN", ADMIN)
    running = coordinator_process()
    running.start()
    with CoordinatorClient(running.url, ADMIN) as client:
        client.register("python", "w1", MANIFEST)
        honest = client.make_token(TokenRequest(worker="w1")).token
    with ExitStack() as greedy, CoordinatorClient(running.url, honest) as client:
        for number in range(70):
            greedy.enter_context(silent_upload(running.port, number, BODY[:100]))
            greedy.enter_context(silent_upload(running.port, 100 + number, b""))
        for sequence in range(30):
            header = UpdateHeader(expert="python", worker="w1", epoch="e1", sequence=sequence, base_version=sequence)
            assert client.push(header, BODY).result.version == sequence + 1
        assert client.healthy()
    assert running.stop() == 0
