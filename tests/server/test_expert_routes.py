"""Experts that are renamed, retired and brought back: over HTTP, in the gateway, and after a restart."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from expert_requests import LARGE, change, listed, push, settle
from live import ADMIN, House, open_house
from starlette.testclient import TestClient
from support import LAYOUT, MANIFEST

from fedmoe.federation.aggregation import Aggregation
from fedmoe.lora.codec import decode
from fedmoe.lora.manifest import Manifest
from fedmoe.lora.safetensors_bytes import read_header
from fedmoe.wire.contract.messages import SAFETENSORS, ManifestMessage

BINARY = {"Accept": SAFETENSORS}


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with open_house(tmp_path) as house:
        house.register("law", "sql")
        yield house


@pytest.fixture
def http(house: House) -> Iterator[TestClient]:
    with house.client() as client:
        for number, expert in enumerate(["law", "sql"]):
            push(client, expert, number, 0)
        yield client


def pull(client: TestClient, expert: str) -> tuple[str, bytes, dict[str, str]]:
    answer = client.post("/get_expert_weights", json={"expert": expert}, headers=BINARY)
    assert answer.status_code == 200, answer.text
    flat = decode(answer.content, LAYOUT).flat.tobytes()
    return answer.headers["fedmoe-version"], flat, read_header(answer.content)[1]


def registration(expert: str, manifest: Manifest = MANIFEST) -> dict[str, object]:
    return {"expert": expert, "worker": "w1", "manifest": ManifestMessage.of(manifest).model_dump(mode="json")}


def test_a_retired_expert_leaves_the_gateway_and_comes_back_exactly(
    http: TestClient, house: House, tmp_path: Path
) -> None:
    before, weights = http.get("/get_gateway_info").json(), pull(http, "law")
    assert change(http, "retire", expert="law", reason="mistyped")["retired"] is True
    change(http, "retire", expert="law")
    info = http.get("/get_gateway_info").json()
    assert (info["sources"], info["left_out"]) == ({"sql": 1}, {"law": "it is retired"})
    assert listed(http).keys() == {"sql"}
    assert listed(http, retired=True)["law"]["retired"] is True
    assert pull(http, "law")[:2] == weights[:2]
    house.service.close()
    house.journal.close()
    with open_house(tmp_path) as again, again.client() as client:
        assert client.get("/get_gateway_info").json()["digest"] == info["digest"]
        assert push(client, "law", 7, 1, status=409)["code"] == "retired"
        assert "retired" not in change(client, "unretire", expert="law")
        assert pull(client, "law")[:2] == weights[:2]
        after = client.get("/get_gateway_info").json()
        assert (after["digest"], after["sources"]) == (before["digest"], before["sources"])
        assert after["version"] == before["version"] + 2
        assert push(client, "law", 7, 1)["version"] == 2


def test_what_is_for_a_retired_expert_is_refused_by_name_with_what_to_do(http: TestClient, house: House) -> None:
    change(http, "retire", expert="law")
    kept = house.kept()
    told = {"expert": "law", "worker": "w1", "kind": "held_out", "values": {"loss": 1.0}}
    for answer in (
        push(http, "law", 9, 1, status=409),
        http.post("/register_expert", json=registration("law")).json(),
        http.post("/push_statistics", json=told).json(),
    ):
        assert answer["code"] == "retired"
        assert "law is retired" in str(answer["detail"])
        assert "fedmoe experts unretire law" in str(answer["fix"])
    assert house.kept() == kept
    assert push(http, "law", 0, 0)["duplicate"] is True  # what landed is acknowledged for ever


def test_a_renamed_expert_goes_by_its_new_name_and_its_former_one_still_means_it(
    http: TestClient, house: House, tmp_path: Path
) -> None:
    gateway = http.get("/get_gateway_weights", headers=BINARY).headers["fedmoe-digest"]
    weights = pull(http, "law")
    assert change(http, "rename", expert="law", name="law_expert")["formerly"] == ["law"]
    assert http.get("/get_gateway_weights", headers=BINARY).headers["fedmoe-digest"] == gateway

    def check(client: TestClient, version: int) -> None:
        found = listed(client)
        assert found.keys() == {"law_expert", "sql"}
        assert [worker["updates"] for worker in found["law_expert"]["workers"]] == [version]
        info = client.get("/get_gateway_info").json()
        assert info["sources"] == {"law_expert": version, "sql": 1}
        assert info["weights"] == {"law_expert": 0.5, "sql": 0.5}
        for name in ("law", "law_expert"):
            assert pull(client, name)[0] == str(version)
            assert f'"expert":"{name}"' in pull(client, name)[2]["fedmoe"]
            assert client.post("/register_expert", json=registration(name)).json()["name"] == name

    check(http, 1)
    assert pull(http, "law_expert")[1] == weights[1]
    assert push(http, "law", 5, 1)["expert"] == "law"
    assert push(http, "law_expert", 6, 2)["expert"] == "law_expert"
    settle(house)
    check(http, 3)
    assert push(http, "law_expert", 5, 1)["duplicate"] is True
    house.service.close()
    house.journal.close()
    with open_house(tmp_path) as again, again.client() as client:
        check(client, 3)
        back = client.post("/rollback", json={"expert": "law_expert", "to_version": 1})
        assert (back.status_code, back.json()["expert"]) == (200, "law_expert")
        assert pull(client, "law_expert")[1] == weights[1]
        gone = client.post("/retract", json={"expert": "law", "worker": "w1"}).json()
        assert (gone["expert"], gone["removed"]) == ("law", 1)
        assert client.get("/get_gateway_info").json()["left_out"] == {"law_expert": "no update has landed on it yet"}


def test_names_are_never_given_to_a_second_expert(http: TestClient, house: House) -> None:
    change(http, "rename", expert="law", name="law_expert")
    for to in ("sql", "law_expert"):
        assert (
            change(http, "rename", expert="sql" if to != "sql" else "law", name=to, status=409)["code"] == "name_taken"
        )
    refused = change(http, "rename", expert="sql", name="law", status=409)
    assert "'law' is or was the name of another expert (now law_expert)" in str(refused["detail"])
    before = house.kept()
    assert change(http, "rename", expert="law", name="law_expert")["name"] == "law_expert"
    assert house.kept() == before
    assert "formerly" in change(http, "rename", expert="law_expert", name="law")
    assert listed(http).keys() == {"law", "sql"}
    assert change(http, "rename", expert="tax", name="taxes", status=404)["code"] == "unknown_expert"


def test_a_first_registration_that_was_a_mistake_can_be_taken_back(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, house.client() as client:
        assert client.post("/register_expert", json=registration("typo", LARGE)).status_code == 200
        refused = client.post("/register_expert", json=registration("law"))
        assert refused.json()["code"] == "lora_mismatch"
        change(client, "retire", expert="typo")
        assert client.get("/federation").json()["manifest"] is None
        assert client.get("/get_gateway_info").json()["code"] == "gateway_not_initialised"
    with open_house(tmp_path) as house, house.client() as client:
        assert client.post("/register_expert", json=registration("law")).status_code == 200
        push(client, "law", 0, 0)
        assert client.get("/get_gateway_info").json()["sources"] == {"law": 1}
        assert change(client, "unretire", expert="typo", status=409)["code"] == "lora_mismatch"
    with open_house(tmp_path) as house:
        assert house.service.coordinator.manifest == MANIFEST


def test_only_administrators_change_the_roll(tmp_path: Path) -> None:
    with open_house(tmp_path, tokens=True) as house:
        house.register("law")
        with house.client(ADMIN) as admin:
            wanted = {"role": "worker", "worker": "w1", "experts": ["law"]}
            token = admin.post("/tokens", json=wanted).json()["token"]
            with house.client(token) as client:
                for what, body in (("rename", {"name": "tax"}), ("retire", {}), ("unretire", {})):
                    assert change(client, what, expert="law", status=403, **body)["code"] == "forbidden"
                change(admin, "rename", expert="law", name="tax")
                house.register("sql")
                # The token's scope names the expert as it was called when the token was made.
                assert push(client, "tax", 0, 0)["expert"] == "tax"
                assert listed(client).keys() == {"tax"}
                assert push(client, "sql", 1, 0, status=403)["code"] == "forbidden"


def test_a_retired_expert_is_not_merged_and_one_that_comes_back_goes_on(tmp_path: Path) -> None:
    with open_house(tmp_path, Aggregation(merge_after=1000)) as house, house.client() as client:
        house.register("law", "sql")
        push(client, "law", 0, 0)
        change(client, "retire", expert="law")
        online = house.service.coordinator.transaction().online_gateway
        assert online is not None
        assert client.get("/get_gateway_info").json()["left_out"]["law"] == "it is retired"
        assert online.branch_points["law"].steps == 1
        change(client, "unretire", expert="law")
        assert push(client, "law", 1, 1)["version"] == 2
    with open_house(tmp_path, Aggregation(merge_after=1000)) as house:
        online = house.service.coordinator.transaction().online_gateway
        assert online is not None
        assert online.branch_points["law"].steps == 2
