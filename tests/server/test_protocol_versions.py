"""Old and new ends of the wire: one version apart they work together, further apart both are told what to do."""

from __future__ import annotations

import json

import httpx2
import pytest
from live import House, LiveServer
from support import MANIFEST

from fedmoe import __version__
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.messages import PROBLEM
from fedmoe.wire.contract.versions import PROTOCOL, PROTOCOL_HEADER

NEAR = [None, str(PROTOCOL - 1), str(PROTOCOL), str(PROTOCOL + 1)]
FAR = [str(PROTOCOL - 2), str(PROTOCOL + 2), "999999999", "-1", "", "two", "2.0"]


def headers(told: str | None) -> dict[str, str]:
    return {} if told is None else {PROTOCOL_HEADER: told}


@pytest.mark.parametrize("told", NEAR)
def test_a_client_one_version_apart_or_without_a_number_is_served_71(house: House, told: str | None) -> None:
    house.register("python")
    answer = house.client().get("/list_experts", headers=headers(told))
    assert (answer.status_code, answer.headers[PROTOCOL_HEADER]) == (200, str(PROTOCOL))
    assert answer.json()["experts"][0]["name"] == "python"


@pytest.mark.parametrize("path", ["/list_experts", "/register_expert", "/push_expert_update", "/nowhere", "/healthz"])
@pytest.mark.parametrize("told", FAR)
def test_a_client_further_apart_gets_426_with_both_versions_and_nothing_changes_71(
    house: House, told: str, path: str
) -> None:
    before = house.kept()
    answer = house.client().post(path, headers=headers(told), content=b"x" * 100)
    assert (answer.status_code, answer.headers["content-type"]) == (426, PROBLEM)
    assert answer.headers["upgrade"] == f"fedmoe/{PROTOCOL}"
    said = answer.json()
    assert (said["code"], said["protocol"], said["fedmoe"]) == ("upgrade_required", PROTOCOL, __version__)
    assert f"speaks protocol {PROTOCOL}" in said["detail"]
    assert said["got"] in said["detail"]
    assert said["detail"].isprintable()
    assert "pip install --upgrade fedmoe" in said["fix"]
    older = told.isdecimal() and int(told) > PROTOCOL
    assert said["fix"].startswith("Upgrade this coordinator" if older else "Upgrade the client")
    assert house.kept() == before


def test_the_client_names_its_version_and_a_coordinator_too_far_from_it_71(server: LiveServer) -> None:
    seen: list[str | None] = []

    def far(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers.get(PROTOCOL_HEADER))
        told = {PROTOCOL_HEADER: str(PROTOCOL + 2), "Content-Type": "application/json"}
        return httpx2.Response(200, headers=told, stream=httpx2.ByteStream(b'{"meaning": "another"}'))

    with (
        CoordinatorClient("http://coordinator.example", transport=httpx2.MockTransport(far)) as client,
        pytest.raises(RefusedError, match=rf"example speaks {PROTOCOL + 2}. Upgrade this program") as refused,
    ):
        client.federation()
    assert refused.value.code == "upgrade_required"
    assert seen == [str(PROTOCOL)]
    with CoordinatorClient(server.url) as client:
        assert client.register("python", "w1", MANIFEST).version == 0


def test_keys_of_a_newer_coordinator_are_read_over_and_those_of_a_newer_client_refused_71(house: House) -> None:
    def newer(request: httpx2.Request) -> httpx2.Response:
        row: dict[str, object] = {"name": "python", "version": 1, "rank": 2, "alpha": 4.0, "parameters": 9, "base": "b"}
        worker = {"worker": "w1", "updates": 1, "staleness": 0, "seconds_ago": 1.0, "mood": "good"}
        listing = {
            "experts": [row | {"digest": "0" * 64, "workers": [worker], "colour": [1]}],
            "gateway": None,
            "enable_gateway": True,
        }
        body = json.dumps(listing | {"since": {"later": 1}}).encode()
        return httpx2.Response(200, headers={"Content-Type": "application/json"}, stream=httpx2.ByteStream(body))

    with CoordinatorClient("http://coordinator.example", transport=httpx2.MockTransport(newer)) as client:
        assert client.list_experts().experts[0].workers[0].worker == "w1"
    message = {"expert": "python", "worker": "w1", "manifest": MANIFEST.to_json(), "colour": 1}
    answer = house.client().post("/register_expert", json=message)
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_request")
    assert "colour" in answer.json()["detail"]
