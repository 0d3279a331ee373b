"""An update, a rollback, a gateway's sources: of which history they are, after a state was restored or made anew."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from live import House, open_house, push_headers, push_parameters
from starlette.testclient import TestClient
from support import LAYOUT, MANIFEST, make_body

from fedmoe.lora.codec import decode
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.wire.contract.messages import INCARNATION_HEADER, SAFETENSORS, ManifestMessage

LOST = "0123456789abcdef"


def incarnation_of(journal: SqliteJournal) -> str:
    name = journal.meta("incarnation")
    assert name is not None
    return name


@pytest.fixture
def client(house: House) -> Iterator[TestClient]:
    house.register("python")
    with house.client() as opened:
        yield opened


def push(client: TestClient, seed: int, sequence: int, base_version: int, **others: str) -> httpx2.Response:
    body = make_body(seed)
    parameters = push_parameters(sequence, base_version, **others)
    return client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))


def digest(client: TestClient) -> str:
    (expert,) = client.get("/list_experts").json()["experts"]
    return str(expert["digest"])


def test_every_answer_of_a_coordinator_says_which_history_it_is_of(house: House, client: TestClient) -> None:
    name = incarnation_of(house.journal)
    answers = [
        client.get("/federation"),
        push(client, 1, 0, 0),
        client.get("/list_experts"),
        client.post("/get_expert_weights", json={"expert": "python"}, headers={"Accept": SAFETENSORS}),
        client.get("/get_gateway_weights"),
        client.get("/no_such_route"),
    ]
    assert [answer.headers[INCARNATION_HEADER] for answer in answers] == [name] * len(answers)
    assert [answers[0].json()["incarnation"], answers[1].json()["incarnation"]] == [name, name]


def test_workers_from_before_there_were_names_get_no_keys_that_they_refuse(house: House, client: TestClient) -> None:
    old = {"User-Agent": "python-httpx2/2.16.2"}
    body, manifest = make_body(1), ManifestMessage.of(MANIFEST).model_dump(mode="json")
    message = {"expert": "python", "worker": "w1", "manifest": manifest}
    parameters, headers = push_parameters(0, 0), push_headers(body) | old
    answers = [
        client.get("/federation", headers=old),
        client.post("/register_expert", json=message, headers=old),
        client.post("/push_expert_update", params=parameters, content=body, headers=headers),
        client.post("/rollback", json={"expert": "python", "to_version": 0}, headers=old),
    ]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert not [answer.json() for answer in answers if "incarnation" in answer.json()]
    assert {answer.headers[INCARNATION_HEADER] for answer in answers} == {incarnation_of(house.journal)}
    newer = client.get("/federation", headers=old | {"FedMoE-Protocol": "2"})
    assert newer.json()["incarnation"] == incarnation_of(house.journal)


def test_the_name_of_a_history_stays_over_restarts_and_is_another_in_another_state(tmp_path: Path) -> None:
    names = []
    for folder in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        folder.mkdir(exist_ok=True)
        with open_house(folder) as house:
            names.append(incarnation_of(house.journal))
    assert names[0] == names[1] != names[2]


def test_an_update_of_another_history_is_refused_by_name_and_changes_nothing(house: House, client: TestClient) -> None:
    push(client, 1, 0, 0)
    before = house.kept()
    # From version 1 of a history that is lost: by its number it would be fresh.
    refused = push(client, 2, 1, 1, incarnation=LOST)
    assert (refused.status_code, refused.json()["code"]) == (409, "other_history")
    assert LOST in refused.json()["detail"]
    assert (refused.json()["newest_version"], refused.json()["newest_digest"]) == (1, digest(client))
    assert house.kept() == before
    assert push(client, 2, 1, 1, incarnation=incarnation_of(house.journal)).json()["version"] == 2


def test_a_base_version_with_other_weights_than_here_is_another_history(house: House, client: TestClient) -> None:
    push(client, 1, 0, 0)
    before = house.kept()
    refused = push(client, 2, 1, 1, base_digest="0" * 64)
    assert (refused.status_code, refused.json()["code"]) == (409, "other_history")
    assert digest(client)[:12] in refused.json()["detail"]
    assert house.kept() == before
    assert push(client, 2, 1, 1, base_digest=digest(client)).json()["version"] == 2


def test_older_versions_are_known_by_their_digests_too(client: TestClient) -> None:
    push(client, 1, 0, 0)
    first = digest(client)
    push(client, 2, 1, 1)
    push(client, 3, 2, 2)
    assert push(client, 4, 3, 1, base_digest=digest(client)).json()["code"] == "other_history"
    assert push(client, 4, 3, 1, base_digest=first).json()["version"] == 4


def test_what_another_history_has_not_landed_here_is_refused_before_its_version_is_looked_at(
    client: TestClient,
) -> None:
    refused = push(client, 1, 0, 40, incarnation=LOST)
    assert refused.json()["code"] == "other_history"
    assert push(client, 1, 0, 40).json()["code"] == "unknown_version"


def test_an_update_that_landed_before_the_history_was_renamed_is_still_known(client: TestClient) -> None:
    push(client, 1, 0, 0)
    again = push(client, 1, 0, 0, incarnation=LOST)
    assert (again.status_code, again.json()["duplicate"], again.json()["version"]) == (200, True, 1)


def test_the_refusal_comes_with_the_newest_weights_if_they_were_asked_for(house: House, client: TestClient) -> None:
    push(client, 1, 0, 0)
    body = make_body(2)
    parameters = push_parameters(1, 1, incarnation=LOST, answer="weights")
    headers = push_headers(body) | {"Accept": SAFETENSORS}
    refused = client.post("/push_expert_update", params=parameters, content=body, headers=headers)
    assert refused.status_code == 409
    newest = decode(refused.content, LAYOUT).flat
    assert (newest == house.service.coordinator.expert("python").state.weights).all()


@pytest.mark.parametrize("bad", [{"incarnation": "../x"}, {"incarnation": ""}, {"base_digest": "abc"}])
def test_names_that_are_no_names_of_histories_are_422(client: TestClient, bad: dict[str, str]) -> None:
    assert push(client, 1, 0, 0, **bad).status_code == 422


def test_going_back_to_a_version_of_another_history_is_refused(house: House, client: TestClient) -> None:
    push(client, 1, 0, 0)
    first = digest(client)
    push(client, 2, 1, 1)
    wanted = {"expert": "python", "to_version": 1}
    for other in ({"incarnation": LOST}, {"to_digest": "0" * 12}):
        refused = client.post("/rollback", json=wanted | other)
        assert (refused.status_code, refused.json()["code"]) == (409, "other_history")
    assert house.service.coordinator.expert("python").version == 2
    meant = {"to_digest": first[:12], "incarnation": incarnation_of(house.journal)}
    assert client.post("/rollback", json=wanted | meant).json()["digest"] == first


def test_a_gateway_says_by_content_what_it_is_made_of(house: House, client: TestClient) -> None:
    push(client, 1, 0, 0)
    info = client.get("/get_gateway_info").json()
    assert info["source_digests"] == {"python": digest(client)}
    assert info["incarnation"] == incarnation_of(house.journal)
    assert client.get("/get_gateway_weights").json()["source_digests"] == {"python": digest(client)}
