"""A worker withdraws: its bytes go for good, the chain and all that others gave stay."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from live import House, open_house, push_headers, push_parameters
from reported_data import REGMEAN, body_of, send
from starlette.testclient import TestClient
from support import LAYOUT, make_body, make_flat, make_push, sha256

from fedmoe.lora.codec import encode
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.replay import snapshot_bytes
from fedmoe.server.history.verification import check_start, verify_state
from fedmoe.server.storage.backup import make_backup
from fedmoe.server.storage.blobs import put
from fedmoe.server.storage.restore import restore
from fedmoe.server.upkeep.undo import Undo
from fedmoe.wire.contract.messages import ChangeResult, RetractRequest

TOLD = "a-fact-that-only-w1-tells"


def push(client: TestClient, seed: int, worker: str, sequence: int, base: int) -> str:
    body = make_body(seed)
    parameters = push_parameters(sequence, base, worker=worker)
    answer = client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
    assert answer.status_code == 200, answer.text
    return sha256(body)


def keep_snapshot(house: House) -> str:
    """A snapshot of the version there is, as one is made every 50 versions."""
    expert = house.service.coordinator.expert("python")
    digest = put(house.blobs, snapshot_bytes(expert.state))
    house.journal.add_snapshot("python", expert.version, digest)
    return digest


def erase(client: TestClient, worker: str = "w1") -> dict[str, object]:
    answer = client.post("/retract", json={"expert": "python", "worker": worker, "erase": True})
    assert answer.status_code == 200, answer.text
    found: dict[str, object] = answer.json()
    return found


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with open_house(tmp_path, REGMEAN) as opened:
        opened.register("python")
        yield opened


@pytest.fixture
def client(house: House) -> Iterator[TestClient]:
    """Of w1 and w2: two updates each, statistics and moments; snapshots of versions 1 (w2 alone), 2 and 4."""
    with house.client() as opened:
        push(opened, 1, "w2", 0, 0)
        keep_snapshot(house)
        push(opened, 2, "w1", 0, 1)
        keep_snapshot(house)
        push(opened, 3, "w2", 1, 2)
        push(opened, 4, "w1", 1, 3)
        keep_snapshot(house)
        for worker, fact in (("w1", TOLD), ("w2", "of-w2")):
            facts = {"expert": "python", "worker": worker, "kind": "k", "values": {fact: 1.0}}
            assert opened.post("/push_statistics", json=facts).status_code == 204
            for kind in ("moments", "prompts"):
                assert send(opened, kind, body_of(kind, 7 if worker == "w1" else 8), worker)[0] == 200
        yield opened


def test_what_the_worker_gave_is_gone_and_what_others_gave_is_there(house: House, client: TestClient) -> None:
    snapshots = house.journal.snapshots("python")
    note = str(erase(client)["note"])
    assert note.startswith("Erased for good: 2 updates, 2 snapshots made of them, 3 statistics.")
    assert "Backups of this state" in note
    there = set(house.blobs.digests())
    of_w1 = {sha256(make_body(seed)) for seed in (2, 4)} | {sha256(body_of(kind, 7)) for kind in ("moments", "prompts")}
    assert not there & (of_w1 | {snapshots[2], snapshots[4]})
    of_w2 = {sha256(make_body(seed)) for seed in (1, 3)} | {sha256(body_of(kind, 8)) for kind in ("moments", "prompts")}
    assert of_w2 | {snapshots[1]} <= there
    # The newest version can be recovered without anything older.
    assert sorted(house.journal.snapshots("python")) == [1, 5]


def test_what_it_told_is_in_no_file_any_more(house: House, client: TestClient) -> None:
    folder = house.folder.parent
    assert any(TOLD.encode() in file.read_bytes() for file in folder.glob("journal.sqlite*"))
    erase(client)
    assert not [file for file in folder.glob("journal.sqlite*") if TOLD.encode() in file.read_bytes()]
    told = client.get("/statistics").json()
    assert [one["worker"] for one in told] == ["w2"]


def test_it_is_the_same_after_a_restart(tmp_path: Path, house: House, client: TestClient) -> None:
    erase(client)
    expert = house.service.coordinator.expert("python")
    gateway = house.service.gateway()
    house.service.close()
    house.journal.close()
    with open_house(tmp_path, REGMEAN) as again:
        found = again.service.coordinator.expert("python")
        np.testing.assert_array_equal(found.state.weights, expert.state.weights)
        assert (found.version, again.journal.version_digest("python", 2) is not None) == (5, True)
        after = again.service.gateway()
        assert (after.version, after.digest, after.statistics) == (gateway.version, gateway.digest, gateway.statistics)
        assert after.statistics["python"] == sha256(body_of("moments", 8))
        with again.client() as client_again:
            push(client_again, 9, "w2", 2, 5)
            assert again.service.coordinator.expert("python").version == 6


def test_versions_made_of_it_are_refused_by_name_and_others_are_not(house: House, client: TestClient) -> None:
    erase(client)
    refused = client.post("/rollback", json={"expert": "python", "to_version": 3})
    assert (refused.status_code, refused.json()["code"]) == (410, "history_pruned")
    assert "'w1' gave was erased" in refused.json()["fix"]
    assert client.post("/rollback", json={"expert": "python", "to_version": 1}).status_code == 200


def test_bytes_that_another_worker_sent_too_stay(house: House, client: TestClient) -> None:
    shared = push(client, 4, "w3", 0, 4)
    erase(client)
    assert shared in set(house.blobs.digests())
    push(client, 5, "w2", 2, 6)
    assert client.post("/rollback", json={"expert": "python", "to_version": 6}).status_code == 200


def test_a_worker_that_was_retracted_before_can_be_erased_later(house: House, client: TestClient) -> None:
    wanted = {"expert": "python", "worker": "w1"}
    assert client.post("/retract", json=wanted).json()["version"] == 5
    again = erase(client)
    assert (again["version"], again["removed"]) == (5, 0)
    assert sha256(make_body(2)) not in set(house.blobs.digests())
    assert client.post("/retract", json=wanted | {"worker": "nobody", "erase": True}).status_code == 409


def test_updates_that_come_later_are_kept(house: House, client: TestClient) -> None:
    erase(client)
    later = push(client, 12, "w1", 2, 5)
    assert later in set(house.blobs.digests())
    assert client.post("/rollback", json={"expert": "python", "to_version": 5}).status_code == 200


def settle(house: House) -> None:
    house.service.committer.submit(lambda transaction: None).result(10)


def stopped_at(place: str, house: House) -> None:
    """An erasure that ends at a failpoint, and the service with it."""

    def reached(name: str) -> None:
        if name == place:
            raise RuntimeError("killed by the test")

    request = RetractRequest(expert="python", worker="w1", erase=True)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(failpoints, "reached", reached)
        with pytest.raises(RuntimeError):
            asyncio.run(house.service.withdrawals.withdraw(request))
    house.service.close()
    house.journal.close()


PLACES = ["erase.wanted", "commit.after", "erase.noted", "erase.blobs_gone"]


@pytest.mark.parametrize("place", PLACES)
def test_killed_in_the_middle_the_next_start_does_the_rest(
    place: str, tmp_path: Path, house: House, client: TestClient
) -> None:
    stopped_at(place, house)
    with open_house(tmp_path, REGMEAN) as again, again.client() as client_again:
        settle(again)
        assert set(again.blobs.digests()) & {sha256(make_body(seed)) for seed in (2, 4)} == set()
        assert set(again.blobs.digests()) >= {sha256(make_body(seed)) for seed in (1, 3)}
        assert [one["worker"] for one in client_again.get("/statistics").json()] == ["w2"]
        version = again.service.coordinator.expert("python").version
        assert (version, sorted(again.journal.snapshots("python"))) == (5, [1, 5])
        erase(client_again)  # the same request may come again
    with open_house(tmp_path, REGMEAN) as third:
        settle(third)
        assert third.service.coordinator.expert("python").version == 5
    assert verify_state(tmp_path).findings == []


def test_what_is_not_to_be_erased_any_more_is_not_erased_at_the_next_start(
    tmp_path: Path, house: House, client: TestClient
) -> None:
    erase(client)
    later = push(client, 12, "w1", 2, 5)
    assert client.post("/retract", json={"expert": "python", "worker": "nobody", "erase": True}).status_code == 409
    house.service.close()
    house.journal.close()
    with open_house(tmp_path, REGMEAN) as again:
        settle(again)
        assert later in set(again.blobs.digests())
        assert again.service.coordinator.expert("python").version == 6


@pytest.mark.parametrize("times", [1, 100])
def test_an_update_that_lands_between_retraction_and_erasure_goes_too_or_nothing_does(
    times: int, tmp_path: Path, house: House, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else what the newest version is made of would be gone, and no start could make it."""
    retract, sequences = Undo.retract, iter(range(10, 10 + times))

    async def landing(undo: Undo, request: RetractRequest) -> ChangeResult:
        result = await retract(undo, request)
        sequence = next(sequences, None)
        if sequence is not None:
            await house.service.intake.push(*make_push(make_body(sequence), result.version, sequence, "w1"))
        return result

    monkeypatch.setattr(Undo, "retract", landing)
    answer = client.post("/retract", json={"expert": "python", "worker": "w1", "erase": True})
    if times == 1:
        assert (answer.status_code, answer.json()["version"]) == (200, 7)
        assert sha256(make_body(10)) not in set(house.blobs.digests())
    else:
        assert (answer.status_code, answer.json()["code"]) == (503, "busy")
        assert "revoke the worker's token" in answer.json()["fix"]
        assert sha256(make_body(2)) in set(house.blobs.digests())
    digest = house.service.coordinator.expert("python").digest
    house.service.close()
    house.journal.close()
    with open_house(tmp_path, REGMEAN) as again:
        settle(again)
        assert again.service.coordinator.expert("python").digest == digest
    assert verify_state(tmp_path).findings == []


def test_what_was_rebuilt_before_an_erasure_is_not_taken_after_it(house: House, client: TestClient) -> None:
    """A rollback to what the worker gave, worked out beside it, would be a version that nothing can make again."""
    assert client.post("/retract", json={"expert": "python", "worker": "w1"}).status_code == 200
    expert = house.service.coordinator.expert("python")
    rebuilt = house.service._history.at_version(expert, 4)
    assert house.service._history.caught_up(rebuilt, expert, None) is rebuilt
    assert erase(client)["version"] == expert.version
    assert house.service._history.caught_up(rebuilt, expert, None) is None


def test_without_the_flag_all_bytes_stay(house: House, client: TestClient) -> None:
    before = set(house.blobs.digests())
    client.post("/retract", json={"expert": "python", "worker": "w1"})
    assert before <= set(house.blobs.digests())
    with pytest.raises(RefusedError, match="holds no update"):
        asyncio.run(house.service.undo.retract(RetractRequest(expert="python", worker="w1")))


def test_updates_of_it_that_are_held_go_too(house: House, client: TestClient) -> None:
    """One far above the usual norm waits in quarantine; whoever withdraws leaves nothing there either."""
    body = encode(LAYOUT, make_flat(50) * np.float32(1e6))
    for sequence in range(2, 12):
        push(client, 20 + sequence, "w2", sequence, 4)
    parameters = push_parameters(9, 4, worker="w1")
    answer = client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
    assert answer.status_code == 202, answer.text
    assert sha256(body) in set(house.blobs.digests())
    erase(client)
    house.service.committer.submit(lambda transaction: None).result(10)
    assert sha256(body) not in set(house.blobs.digests())


def test_a_state_with_an_erasure_verifies_and_backs_up(tmp_path: Path, house: House, client: TestClient) -> None:
    erase(client)
    house.service.close()
    house.journal.close()
    found = verify_state(tmp_path)
    assert (found.findings, found.absent) == ([], 4)
    make_backup(tmp_path, tmp_path.with_name("backup"), 0.0, check_start)
    restored = tmp_path.with_name("again")
    restore(tmp_path.with_name("backup"), restored)
    assert verify_state(restored).findings == []
