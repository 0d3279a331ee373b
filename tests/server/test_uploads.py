from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from builders import wait_until
from live import ADMIN, JOIN, House, LiveServer, content_digest, listening, open_house, push_headers, push_parameters
from support import make_body

from fedmoe.server.access.turns import Rate
from fedmoe.server.access.uploads import UploadLimits
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError
from fedmoe.wire.contract.messages import UpdateHeader
from fedmoe.wire.http.bearer import new_token

BODY = make_body(1)


def head(worker: str, token: str | None = None, sequence: int = 0, length: int = len(BODY)) -> bytes:
    lines = [
        f"POST /push_expert_update?expert=python&worker={worker}&epoch=e1&sequence={sequence}&base_version=0 HTTP/1.1",
        "Host: 127.0.0.1",
        "Content-Type: application/vnd.safetensors",
        f"Content-Digest: {content_digest(BODY)}",
        f"Content-Length: {length}",
    ]
    return "\r\n".join([*lines, *([f"Authorization: Bearer {token}"] if token else []), "", ""]).encode()


def header(worker: str = "w1", sequence: int = 0) -> UpdateHeader:
    return UpdateHeader(expert="python", worker=worker, epoch="e1", sequence=sequence, base_version=0)


def test_more_uploads_than_fit_are_sent_away_with_a_time_to_come_back_65(tmp_path: Path) -> None:
    limits = UploadLimits(total=2, silent_seconds=60)
    with open_house(tmp_path, uploads=limits) as house, listening(house.app) as server, ExitStack() as crowd:
        house.register("python")
        first, second = (crowd.enter_context(server.connect()) for _ in range(2))
        for name, connection in (("slow1", first), ("slow2", second)):
            connection.sendall(head(name) + BODY[:10])
        with CoordinatorClient(server.url) as client:
            wait_until(lambda: taken(house) == 2)
            with pytest.raises(CoordinatorUnavailableError, match="busy") as refused:
                client.push(header(), BODY)
            assert refused.value.retry_after == 2.0
            first.sendall(BODY[10:])
            assert first.recv(100).startswith(b"HTTP/1.1 200")
            assert client.push(header(), BODY).result.version == 2
            second.sendall(BODY[10:])
            assert second.recv(100).startswith(b"HTTP/1.1 200")
    assert house.service.coordinator.expert("python").version == 3


def taken(house: House) -> int:
    return len(house.app.state.parts.places._taken)


def test_heads_alone_take_no_place(tmp_path: Path) -> None:
    limits = UploadLimits(total=2, silent_seconds=60)
    with open_house(tmp_path, uploads=limits) as house, listening(house.app) as server, ExitStack() as crowd:
        house.register("python")
        silent = [crowd.enter_context(server.connect()) for _ in range(20)]
        for number, connection in enumerate(silent):
            connection.sendall(head(f"silent{number}"))
        wait_until(lambda: house.service.intake.uploads == 20)
        assert taken(house) == 0
        with CoordinatorClient(server.url) as client:
            assert client.push(header(), BODY).result.version == 1
        silent[0].sendall(BODY)
        assert silent[0].recv(100).startswith(b"HTTP/1.1 200")


def test_a_token_has_its_share_and_its_silent_uploads_give_way_to_its_own(tmp_path: Path) -> None:
    limits = UploadLimits(total=8, of_token=3, silent_seconds=0.2)
    with (
        open_house(tmp_path, tokens=True, uploads=limits) as house,
        listening(house.app) as server,
        ExitStack() as crowd,
    ):
        house.register("python")
        greedy = [crowd.enter_context(server.connect()) for _ in range(3)]
        for number, connection in enumerate(greedy):
            connection.sendall(head(f"greedy{number}", JOIN) + BODY[:10])
            wait_until(lambda number=number: taken(house) == number + 1)  # type: ignore[misc]
        time.sleep(0.25)
        with CoordinatorClient(server.url, JOIN) as client:
            assert client.push(header(), BODY).result.version == 1
        told = greedy[0].recv(4096)
        assert told.startswith(b"HTTP/1.1 408")
        assert b"gave_way" in told
        assert b"retry-after: 2" in told
        for connection in greedy[1:]:
            connection.sendall(BODY[10:])
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert house.service.coordinator.expert("python").version == 3


def test_beside_a_token_that_takes_all_it_may_another_one_pushes_at_once(tmp_path: Path) -> None:
    limits = UploadLimits(total=4, of_token=3, silent_seconds=60)
    with (
        open_house(tmp_path, tokens=True, uploads=limits) as house,
        listening(house.app) as server,
        ExitStack() as crowd,
    ):
        house.register("python")
        honest = new_token()
        house.gate.add(honest, "worker", "w1")
        greedy = [crowd.enter_context(server.connect()) for _ in range(10)]
        for number, connection in enumerate(greedy):
            connection.sendall(head(f"greedy{number}", JOIN) + BODY[:10])
        wait_until(lambda: taken(house) == 3 and house.service.intake.uploads == 3)
        with CoordinatorClient(server.url, honest) as client:
            for sequence in range(5):
                assert client.push(header(sequence=sequence), BODY).result.version == sequence + 1
        refused = pytest.raises(CoordinatorUnavailableError, match="quota_exceeded: this token has 3 uploads")
        with CoordinatorClient(server.url, JOIN) as client, refused:
            client.push(header("w3"), BODY)


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_a_token_that_ends_ends_its_upload_with_401_and_nothing_lands_52(
    locked_server: tuple[House, LiveServer], how: str
) -> None:
    house, server = locked_server
    token = new_token()
    expires_in = 0.6 if how == "expired" else None
    record = house.gate.add(token, "worker", "w1", expires_in=expires_in)
    before = house.kept()
    with server.connect() as connection:
        connection.sendall(head("w1", token) + BODY[:10])
        wait_until(lambda: taken(house) == 1)
        if how == "revoked":
            with CoordinatorClient(server.url, ADMIN) as client:
                client.revoke_token(record.hash)
        told = connection.recv(4096)
        assert told.startswith(b"HTTP/1.1 401")
        assert f"this token {'was revoked' if how == 'revoked' else 'has expired'}".encode() in told
        connection.sendall(BODY[10:])
    assert house.kept() == before
    assert taken(house) == 0


def test_a_token_may_revoke_itself(locked_server: tuple[House, LiveServer]) -> None:
    house, server = locked_server
    token = new_token()
    record = house.gate.add(token, "admin")
    with CoordinatorClient(server.url, token) as client:
        client.revoke_token(record.hash)
        with pytest.raises(Exception, match="this token was revoked"):
            client.federation()


@pytest.fixture
def locked_server(tmp_path: Path) -> Iterator[tuple[House, LiveServer]]:
    """A coordinator that asks for tokens, with the expert `python`, on a socket."""
    with open_house(tmp_path, tokens=True) as house:
        house.register("python")
        with listening(house.app) as server:
            yield house, server


def test_a_push_before_the_least_interval_is_429_with_the_seconds_left_58(tmp_path: Path) -> None:
    with open_house(tmp_path, min_sync_interval=30.0) as house, house.client() as client:
        house.register("python", "law")

        def push(sequence: int, body: bytes = BODY, expert: str = "python", worker: str = "w1") -> tuple[int, str]:
            parameters = push_parameters(sequence, expert=expert, worker=worker)
            answer = client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
            return answer.status_code, answer.json().get("code", "ok")

        assert push(0) == (200, "ok")
        answer = client.post("/push_expert_update", params=push_parameters(1), content=BODY, headers=push_headers(BODY))
        assert (answer.status_code, answer.json()["code"]) == (429, "too_soon")
        assert 27 <= answer.json()["seconds_left"] <= 30
        assert int(answer.headers["retry-after"]) in (28, 29, 30)
        # Sent again, it is not early; nor is another worker, or another expert.
        assert push(0) == (200, "ok")
        assert push(0, worker="w2") == (200, "ok")
        assert push(1, expert="law") == (200, "ok")
        # What was refused does not count: it may be sent right again.
        assert push(0, b"no update", worker="w3") == (400, "malformed")
        assert push(0, worker="w3") == (200, "ok")
    assert house.service.coordinator.expert("python").version == 3


def test_an_older_push_that_is_sent_again_is_not_early(tmp_path: Path) -> None:
    with open_house(tmp_path, min_sync_interval=0.3) as house, listening(house.app) as server:
        house.register("python")
        with CoordinatorClient(server.url) as client:
            client.push(header(sequence=0), BODY)
            time.sleep(0.3)
            client.push(header(sequence=1), BODY)
            assert client.push(header(sequence=0), BODY).result.duplicate


def test_without_an_interval_pushes_may_follow_at_once(house: House) -> None:
    house.register("python")
    with house.client() as client:
        for sequence in range(5):
            parameters = push_parameters(sequence)
            answer = client.post("/push_expert_update", params=parameters, content=BODY, headers=push_headers(BODY))
            assert answer.status_code == 200


def test_a_token_that_asks_too_fast_waits_and_then_is_429(tmp_path: Path) -> None:
    rate = Rate(0.1, 3)
    with open_house(tmp_path, tokens=True, token_rate=rate) as house, listening(house.app) as server:
        with CoordinatorClient(server.url, JOIN, attempts=1) as client:
            for _ in range(3):
                client.federation()
            with pytest.raises(CoordinatorUnavailableError, match="too_many_requests") as refused:
                client.federation()
        assert refused.value.retry_after is not None
        assert 7 <= refused.value.retry_after <= 8
        with CoordinatorClient(server.url, ADMIN, attempts=1) as client:
            client.federation()
            assert client.healthy()


def test_a_token_a_little_too_fast_waits_for_its_turn(tmp_path: Path) -> None:
    rate = Rate(20.0, 2)
    open_for_all = open_house(tmp_path, tokens=True, token_rate=rate)
    with open_for_all as house, listening(house.app) as server, CoordinatorClient(server.url, JOIN, 1) as client:
        started = time.monotonic()
        for _ in range(8):
            client.federation()
        assert time.monotonic() - started >= 6 / 20.0 - 0.05


def test_without_tokens_nobody_waits(tmp_path: Path) -> None:
    with open_house(tmp_path, token_rate=Rate(0.001, 1)) as house, house.client() as client:
        assert [client.get("/federation").status_code for _ in range(20)] == [200] * 20


def test_a_stranger_who_tries_on_and_on_is_answered_slowly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmoe.server.access.turns.STRANGER_RATE", Rate(1.0, 3))
    with open_house(tmp_path, tokens=True) as house, listening(house.app) as server, server.connect() as connection:
        request = b"GET /list_experts HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer guess\r\n\r\n"
        seconds = []
        for _ in range(5):
            started = time.monotonic()
            connection.sendall(request)
            told = read_answer(connection)
            assert told.startswith(b"HTTP/1.1 401")
            seconds.append(time.monotonic() - started)
        assert seconds[4] >= 0.9


def read_answer(connection: socket.socket) -> bytes:
    told = b""
    while b"\r\n\r\n" not in told or not told.rstrip().endswith(b"}"):
        told += connection.recv(4096)
    return told
