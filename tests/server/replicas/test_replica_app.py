"""A replica that is not the owner answers as the owner does; nothing is answered from a memory that may be old."""

from __future__ import annotations

import json
import math
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx2
import pytest
from live import ADMIN, JOIN, push_headers, push_parameters
from replica_pair import SECRET, Pair, open_pair
from support import make_body, sha256

from fedmoe.server.replicas.ownership import FEDERATION, Ownership, steady_seconds
from fedmoe.wire.contract.messages import SAFETENSORS

_PUSH = "/push_expert_update"


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with open_pair(tmp_path) as opened:
        opened.house.register("python")
        yield opened


#: A short body goes on to the owner as it is; one whose length is not said goes into the blob store first.
_each_way = pytest.mark.parametrize("short", [True, False])


def push(
    url: str, body: bytes, sequence: int = 0, others: Mapping[str, str] = {}, short: bool = True
) -> httpx2.Response:
    headers = push_headers(body) | dict(others)
    content = body if short else iter([body])
    return httpx2.post(f"{url}{_PUSH}", params=push_parameters(sequence), content=content, headers=headers, timeout=20)


@_each_way
def test_an_update_through_a_replica_lands_as_one_at_the_owner_and_once(pair: Pair, short: bool) -> None:
    bodies = [make_body(seed) for seed in (1, 2)]
    answers = [push(pair.a.server.url, bodies[0]), push(pair.b.server.url, bodies[1], 1, short=short)]
    again = [push(replica.server.url, bodies[1], 1, short=short) for replica in (pair.a, pair.b)]

    facts = [answer.json() for answer in (*answers, *again)]
    assert [fact["version"] for fact in facts] == [1, 2, 2, 2]
    assert [fact["duplicate"] for fact in facts] == [False, False, True, True]
    assert set(answers[0].headers) == set(answers[1].headers)
    assert pair.house.blobs.read(sha256(bodies[1])) == bodies[1]
    assert pair.house.journal.count() == 3


def test_weights_come_through_a_replica_byte_by_byte_with_their_headers(pair: Pair) -> None:
    push(pair.b.server.url, make_body(1))
    asked = {"expert": "python"}
    answers = [
        httpx2.post(f"{replica.server.url}/get_expert_weights", json=asked, headers={"Accept": SAFETENSORS})
        for replica in (pair.a, pair.b)
    ]
    tag = {"Accept": SAFETENSORS, "If-None-Match": answers[1].headers["etag"]}
    unchanged = httpx2.post(f"{pair.b.server.url}/get_expert_weights", json=asked, headers=tag)
    heads = [
        httpx2.head(f"{replica.server.url}/get_gateway_weights", headers={"Accept": SAFETENSORS})
        for replica in (pair.a, pair.b)
    ]

    assert answers[0].content == answers[1].content
    assert (unchanged.status_code, unchanged.content) == (304, b"")
    for through_both in (answers, heads):
        at_owner, at_other = [
            {name: value for name, value in answer.headers.items() if name != "date"} for answer in through_both
        ]
        assert at_owner == at_other


@pytest.mark.parametrize(
    ("body", "digest_of", "status"),
    [(b"x" * (3 << 20), b"x" * (3 << 20), 413), (make_body(1), b"other bytes", 400), (b"", b"", 400)],
)
@_each_way
def test_a_body_that_the_owner_would_not_take_leaves_nothing(
    pair: Pair, body: bytes, digest_of: bytes, status: int, short: bool
) -> None:
    before = pair.house.journal.count()
    answer = push(pair.b.server.url, body, others=push_headers(digest_of), short=short)
    assert answer.status_code == status
    assert pair.house.journal.count() == before
    assert sha256(body) not in set(pair.house.blobs.digests()) or body == b""
    assert not list((pair.b.blobs.folder / "incoming").iterdir())


def test_what_the_owner_refuses_before_the_body_is_refused_before_the_body(pair: Pair) -> None:
    body = make_body(1)
    unknown = {**push_parameters(), "expert": "nobody"}
    answer = httpx2.post(f"{pair.b.server.url}{_PUSH}", params=unknown, content=body, headers=push_headers(body))
    assert (answer.status_code, answer.json()["code"]) == (404, "unknown_expert")
    assert not set(pair.house.blobs.digests())


def test_tokens_are_the_callers_own_and_the_audit_log_has_the_callers_address(tmp_path: Path) -> None:
    with open_pair(tmp_path, tokens=True) as pair:
        pair.house.register("python")
        transport = httpx2.HTTPTransport(local_address="127.0.0.9")
        with httpx2.Client(base_url=pair.b.server.url, transport=transport) as client:
            body, parameters = make_body(1), push_parameters()
            without = client.post(_PUSH, params=parameters, content=body, headers=push_headers(body))
            landed = client.post(
                _PUSH,
                params=parameters,
                content=body,
                headers=push_headers(body) | {"Authorization": f"Bearer {JOIN}"},
            )
            forbidden = client.get("/replicas", headers={"Authorization": f"Bearer {JOIN}"})
            allowed = client.get("/replicas", headers={"Authorization": f"Bearer {ADMIN}"})
    assert [answer.status_code for answer in (without, landed, forbidden, allowed)] == [401, 200, 403, 200]
    lines = [json.loads(line) for line in (tmp_path / "audit.jsonl").read_text().splitlines()]
    changes = [line for line in lines if line["what"] == f"POST {_PUSH}" and line["status"] == 200]
    assert [(line["from"], line["role"], line["worker"]) for line in changes] == [("127.0.0.9", "join", "w1")]


def test_only_who_knows_the_secret_speaks_for_others(pair: Pair) -> None:
    body = make_body(1)
    stored = {"fedmoe-replica-stored": str(len(body)), "fedmoe-replica-caller": "10.0.0.1"}
    unknown = push(pair.a.server.url, body, others=stored | {"fedmoe-replica-secret": "another"})
    unsaid = push(pair.a.server.url, body, others=stored)
    limit = httpx2.get(f"{pair.a.server.url}/update_limit", params=push_parameters(1))

    assert (unknown.status_code, unknown.json()["code"]) == (403, "forbidden")
    assert unsaid.json()["version"] == 1  # the bytes that were sent are what landed, whatever was said of them
    assert (limit.status_code, limit.json()["code"]) == (403, "forbidden")


def test_a_stored_body_that_is_gone_is_to_be_sent_again(pair: Pair) -> None:
    body = make_body(1)
    claims = {"fedmoe-replica-secret": SECRET.secret, "fedmoe-replica-stored": str(len(body))}
    answer = httpx2.post(f"{pair.a.server.url}{_PUSH}", params=push_parameters(), headers=push_headers(body) | claims)
    assert (answer.status_code, answer.json()["code"], answer.headers["retry-after"]) == (503, "busy", "1")
    assert pair.house.journal.count() == 1


def test_without_an_owner_requests_wait_and_then_are_told_when_to_come_again(tmp_path: Path) -> None:
    with open_pair(tmp_path, patience=0.3) as pair:
        pair.house.register("python")
        pair.lose()
        answers = [push(replica.server.url, make_body(1)) for replica in (pair.a, pair.b)]
        ready = [httpx2.get(f"{replica.server.url}/readyz").status_code for replica in (pair.a, pair.b)]
        alive = httpx2.get(f"{pair.b.server.url}/healthz").status_code
        pair.b.seat.unreachable = "connection refused"
        said = httpx2.get(f"{pair.b.server.url}/readyz").json()["reason"]
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(503, "no_owner")] * 2
    assert [answer.headers["retry-after"] for answer in answers] == ["1", "1"]
    assert (ready, alive) == ([503, 503], 200)
    assert said == "the database does not answer: connection refused"


@_each_way
def test_a_request_that_waits_is_answered_by_the_next_owner(pair: Pair, short: bool) -> None:
    pair.lose()
    threading.Timer(0.3, lambda: pair.own(term=2)).start()
    assert push(pair.b.server.url, make_body(1), short=short).json()["version"] == 1


def test_an_owner_whose_lease_is_over_shows_nothing_that_it_remembers(tmp_path: Path) -> None:
    with open_pair(tmp_path, patience=0.3) as pair:
        pair.house.register("python")
        tenure = pair.own()
        tenure.valid_until = steady_seconds() - 0.001
        answer = httpx2.post(f"{pair.a.server.url}/get_expert_weights", json={"expert": "python"})
        assert (answer.status_code, answer.json()["code"]) == (503, "no_owner")
        tenure.valid_until = math.inf
        assert httpx2.post(f"{pair.a.server.url}/get_expert_weights", json={"expert": "python"}).status_code == 200


def test_what_landed_in_a_term_that_is_over_is_not_called_landed(pair: Pair) -> None:
    tenure = pair.own()
    publish = pair.house.service.coordinator.publish

    def lose_the_term(transaction: object) -> None:
        publish(transaction)  # type: ignore[arg-type]
        tenure.lost = "another replica took over"

    pair.house.service.coordinator.publish = lose_the_term  # type: ignore[method-assign]
    answer = push(pair.a.server.url, make_body(1))
    assert (answer.status_code, answer.json()["code"]) == (503, "no_owner")
    pair.own(term=2)
    assert push(pair.a.server.url, make_body(1)).json()["duplicate"] is True


def test_what_may_have_been_done_is_sent_to_the_next_owner_only_if_it_can_be_done_twice(pair: Pair) -> None:
    coordinator = pair.house.service.coordinator
    publish = coordinator.publish

    def change_owners(transaction: object) -> None:
        coordinator.publish = publish  # type: ignore[method-assign]
        publish(transaction)  # type: ignore[arg-type]
        tenure = pair.a.seat.tenure
        assert tenure is not None
        tenure.lost = "another replica took over"
        pair.own(term=tenure.ownership.term + 1)

    coordinator.publish = change_owners  # type: ignore[method-assign]
    renamed = httpx2.post(f"{pair.b.server.url}/rename_expert", json={"expert": "python", "name": "snake"}, timeout=20)
    coordinator.publish = change_owners  # type: ignore[method-assign]
    landed = push(pair.b.server.url, make_body(1))
    assert (renamed.status_code, renamed.json()["code"]) == (503, "no_owner")
    assert (landed.status_code, landed.json()["version"], landed.json()["duplicate"]) == (200, 1, True)
    assert pair.house.journal.count() == 3


def test_bytes_that_no_url_may_have_reach_the_owner_escaped(pair: Pair) -> None:
    with pair.b.server.connect() as caller:
        caller.sendall(b"GET /no\xff\x80 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
        assert caller.recv(1 << 16).split()[1] in (b"400", b"404")


def test_an_owner_that_hangs_is_waited_for_until_another_one_is_there(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hanging = Ownership(FEDERATION, "c", f"http://127.0.0.1:{silent.getsockname()[1]}", 5, math.inf)
        pair.b.seat.seat(hanging)
        threading.Timer(0.5, lambda: pair.own(term=6)).start()
        began = time.monotonic()
        assert push(pair.b.server.url, make_body(1)).json()["version"] == 1
        assert time.monotonic() - began < 15


def test_a_caller_that_leaves_ends_its_request_at_the_owner(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        pair.b.seat.seat(Ownership(FEDERATION, "c", f"http://127.0.0.1:{owner.getsockname()[1]}", 5, math.inf))
        with pair.b.server.connect() as caller:
            caller.sendall(b"GET /federation HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            passed, _ = owner.accept()
            passed.settimeout(10)
            assert passed.recv(1 << 16).startswith(b"GET /federation HTTP/1.1\r\n")
        assert passed.recv(1 << 16) == b""
        passed.close()


def test_an_answer_that_breaks_off_at_the_owner_breaks_off_at_the_caller(pair: Pair) -> None:
    with socket.create_server(("127.0.0.1", 0)) as owner:
        pair.b.seat.seat(Ownership(FEDERATION, "c", f"http://127.0.0.1:{owner.getsockname()[1]}", 5, math.inf))

        def answer_half() -> None:
            passed, _ = owner.accept()
            passed.recv(1 << 16)
            passed.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")
            passed.close()

        threading.Thread(target=answer_half).start()
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{pair.b.server.url}/federation", timeout=10)
