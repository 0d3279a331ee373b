from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from live import ADMIN, JOIN, House, open_house, push_headers, push_parameters
from support import make_body

from fedmoe.server.storage.audit import AuditHead, AuditLog
from fedmoe.wire.http.bearer import hash_token

BODY = make_body(1)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[AuditLog]:
    (tmp_path / "audit").mkdir()
    opened = AuditLog(tmp_path / "audit", lambda: 0.0, AuditHead())
    yield opened
    if opened._thread.is_alive():
        opened.close()


def noted(log: AuditLog) -> list[dict[str, Any]]:
    """Everything that was noted; closes the log."""
    log.close()
    path = log._path
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture
def house(tmp_path: Path, log: AuditLog) -> Iterator[House]:
    (tmp_path / "house").mkdir()
    with open_house(tmp_path / "house", tokens=True, audit=log) as opened:
        opened.register("python", "law")
        opened.gate.add("token-of-w1-32-characters-000000", "worker", "w1", ["python"], label="site A")
        yield opened


def bearer(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"}


def test_a_change_is_noted_with_who_what_and_from_where(house: House, log: AuditLog) -> None:
    with house.client() as client:
        mine = bearer("token-of-w1-32-characters-000000")
        pushed = client.post(
            "/push_expert_update", params=push_parameters(), content=BODY, headers=push_headers(BODY) | mine
        )
        assert pushed.status_code == 200
        client.post("/rollback", json={"expert": "python", "to_version": 0}, headers=bearer(ADMIN))
        client.post("/tokens/revoke", json={"hash": hash_token(JOIN)}, headers=bearer(ADMIN))
    first, second, third = noted(log)
    assert {key: first[key] for key in first if key not in ("n", "at", "chain")} == {
        "what": "POST /push_expert_update",
        "outcome": "ok",
        "status": 200,
        "from": "testclient",
        "role": "worker",
        "token": hash_token("token-of-w1-32-characters-000000")[:12],
        "label": "site A",
        "worker": "w1",
        "expert": "python",
    }
    assert (second["what"], second["role"], second["expert"]) == ("POST /rollback", "admin", "python")
    assert (third["what"], third["outcome"], third["named"]) == ("POST /tokens/revoke", "ok", hash_token(JOIN)[:12])


def test_every_refusal_of_a_permission_is_noted_and_reading_is_not(house: House, log: AuditLog) -> None:
    with house.client() as client:
        mine = bearer("token-of-w1-32-characters-000000")
        assert client.get("/list_experts", headers=mine).status_code == 200
        assert client.post("/get_expert_weights", json={"expert": "python"}, headers=mine).status_code == 200
        assert client.get("/healthz").status_code == 200
        assert client.get("/nothing", headers=mine).status_code == 404
        assert client.get("/list_experts", headers=bearer("guess")).status_code == 401
        assert client.post("/get_expert_weights", json={"expert": "law"}, headers=mine).status_code == 403
        assert client.post("/retract", json={"expert": "python", "worker": "w1"}, headers=mine).status_code == 403
    found = [(line["what"], line["outcome"], line.get("label"), line.get("expert")) for line in noted(log)]
    assert found == [
        ("GET /list_experts", "unauthorised", None, None),
        ("POST /get_expert_weights", "forbidden", "site A", "law"),
        ("POST /retract", "forbidden", "site A", "python"),
    ]


def test_what_a_page_of_another_site_tried_is_noted(tmp_path: Path, log: AuditLog) -> None:
    (tmp_path / "house").mkdir()
    with open_house(tmp_path / "house", audit=log) as house, house.client() as client:
        client.get("/list_experts", headers={"Origin": "http://evil.example"})
        client.get("/list_experts", headers={"Host": "evil.example"})
    assert [line["outcome"] for line in noted(log)] == ["cross_site", "host_not_allowed"]


def test_a_change_that_was_refused_is_noted_with_its_code(house: House, log: AuditLog) -> None:
    with house.client() as client:
        client.post("/rollback", json={"expert": "nobody", "to_version": 0}, headers=bearer(ADMIN))
        client.post("/rollback", content=b"{", headers=bearer(ADMIN) | {"Content-Type": "application/json"})
    assert [(line["outcome"], line["status"]) for line in noted(log)] == [("unknown_expert", 404), ("malformed", 400)]


def test_whoever_knocks_without_end_does_not_push_out_what_was_changed(house: House, log: AuditLog) -> None:
    with house.client() as client:
        for _ in range(150):
            client.get("/list_experts", headers=bearer("guess"))
        client.post("/tokens", json={"label": "site B"}, headers=bearer(ADMIN))
    found = noted(log)
    assert 100 <= len(found) < 150
    assert (found[-1]["what"], found[-1]["named_label"]) == ("POST /tokens", "site B")
    assert sum(line.get("refusals_not_noted", 0) for line in found) == 151 - len(found)


def test_no_token_is_ever_noted_and_no_control_character_is_raw(house: House, log: AuditLog) -> None:
    with house.client() as client:
        client.get("/%1b[31mred%1b%0a%7f", headers=bearer("guess\x7f"))
        client.post("/tokens", json={"label": "site B"}, headers=bearer(ADMIN))
    log.close()
    told = log._path.read_bytes()
    assert ADMIN.encode() not in told
    assert b"guess" not in told
    assert all(byte >= 0x20 or byte == 0x0A for byte in told)
    assert b"\x7f" not in told
