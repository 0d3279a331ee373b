"""What monitors ask: HEAD wherever there is GET, and whether the coordinator lives and can work."""

from __future__ import annotations

import urllib.request
from pathlib import Path

import pytest
from live import JOIN, House, LiveServer, open_house
from starlette.testclient import TestClient

from fedmoe.wire.contract.messages import SAFETENSORS

WEIGHTS = ("/get_gateway_weights", "/get_all_expert_weights")
READS = ("/healthz", "/readyz", "/openapi.json", "/federation", "/list_experts", "/get_gateway_info", "/statistics")


@pytest.mark.parametrize("path", [*READS, *WEIGHTS, "/nothing"])
@pytest.mark.parametrize("accept", ["application/json", SAFETENSORS])
def test_head_is_answered_as_get_without_a_body(http: TestClient, path: str, accept: str) -> None:
    got = http.get(path, headers={"Accept": accept})
    asked = http.head(path, headers={"Accept": accept})
    assert (asked.status_code, asked.content) == (got.status_code, b"")
    # What only making the body tells may be left out (RFC 9110, 9.3.2).
    left_out = {"content-length", "content-digest", "transfer-encoding"}
    assert {k: v for k, v in asked.headers.items() if k not in left_out} == {
        k: v for k, v in got.headers.items() if k not in left_out
    }


def test_head_makes_no_body_of_weights_and_knows_what_the_caller_has(http: TestClient) -> None:
    headers = {"Accept": SAFETENSORS}
    tag = http.head(WEIGHTS[0], headers=headers).headers["etag"]
    assert tag == http.get(WEIGHTS[0], headers=headers).headers["etag"]
    assert http.head(WEIGHTS[0], headers={**headers, "If-None-Match": tag}).status_code == 304


def test_head_on_a_socket_leaves_the_connection_usable(server: LiveServer) -> None:
    request = urllib.request.Request(server.url + "/healthz", method="HEAD")
    with urllib.request.urlopen(request, timeout=10) as answer:
        assert (answer.status, answer.read()) == (200, b"")
    head = b"%s /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: %s\r\n\r\n"
    told = server.talk([head % (b"HEAD", b"keep-alive") + head % (b"GET", b"close")])
    assert told.count(b"HTTP/1.1 200 OK") == 2
    assert told.count(b'{"status":"ok"}') == 1


def test_head_of_a_route_that_changes_something_is_405_and_names_what_is_there(http: TestClient) -> None:
    refused = http.head("/register_expert")
    assert (refused.status_code, refused.headers["allow"]) == (405, "POST")
    refused = http.delete("/healthz")
    assert (refused.status_code, refused.headers["allow"]) == (405, "GET, HEAD")


def test_health_and_readiness_need_no_token_and_nothing_else_does_without(locked_house: House) -> None:
    with locked_house.client() as client:
        for path in ("/healthz", "/readyz"):
            assert client.get(path).status_code == client.head(path).status_code == 200
            assert client.post(path).status_code == 401
        assert client.head("/federation").status_code == 401
    with locked_house.client(JOIN) as client:
        assert client.head("/federation").status_code == 200


def test_a_coordinator_is_ready_until_storage_fails(house: House) -> None:
    with house.client() as client:
        assert client.get("/readyz").json() == {"status": "ready"}
        house.service.committer.fail("writing /var/secret/place failed: Input/output error")
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["status"]) == (503, "not ready")
        assert "storage failed" in answer.json()["reason"]
        assert "/var" not in answer.text
        assert client.head("/readyz").status_code == client.head("/healthz").status_code == 503


def test_a_coordinator_that_takes_no_decisions_is_not_ready(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, house.client() as client:
        house.service.close()
        answer = client.get("/readyz")
        assert (answer.status_code, answer.json()["reason"]) == (503, "the coordinator is starting or stopping")
