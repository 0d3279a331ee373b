"""Updates far above an expert's usual norm wait for an administrator instead of landing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from live import ADMIN, JOIN, House, open_house, push_headers, push_parameters
from starlette.testclient import TestClient
from support import LAYOUT, make_flat, sha256

from fedmoe.coordinator import Aggregation
from fedmoe.federation.quarantine import MOST_OF_A_WORKER
from fedmoe.lora.codec import encode
from fedmoe.lora.update_rules import USUAL_LEAST

HUGE = encode(LAYOUT, 1e6 * make_flat(99))


def push(http: TestClient, body: bytes, sequence: int, base: int = 0, **others: str) -> tuple[int, dict[str, object]]:
    answer = http.post(
        "/push_expert_update",
        params=push_parameters(sequence, base, **others),
        content=body,
        headers=push_headers(body),
    )
    return answer.status_code, answer.json()


def usual(http: TestClient, count: int = USUAL_LEAST) -> None:
    """Updates of the usual size, numbered from 0."""
    for number in range(count):
        assert push(http, encode(LAYOUT, make_flat(number)), number, number)[0] == 200


def held(http: TestClient) -> list[dict[str, object]]:
    return list(http.get("/quarantine").json()["held"])


def test_an_update_far_above_the_usual_norm_is_held_and_changes_nothing_37(house: House, http: TestClient) -> None:
    usual(http)
    expert, gateway = house.service.coordinator.expert("python"), house.service.coordinator.gateway()
    status, told = push(http, HUGE, 5, 5)
    assert (status, told["status"], told["version"], told["coefficient"]) == (202, "quarantined", 5, 0.0)
    assert "times the usual one of python; held above 50 times" in str(told["note"])
    assert house.service.coordinator.expert("python") is expert
    assert house.service.coordinator.gateway() is gateway
    waiting = held(http)
    assert [(u["number"], u["worker"], u["sequence"], u["digest"]) for u in waiting] == [(1, "w1", 5, sha256(HUGE))]
    # Whoever came after is judged as if it had never arrived.
    assert push(http, encode(LAYOUT, make_flat(6)), 6, 5)[1]["version"] == 6
    assert house.service.coordinator.expert("python").norms[-1] < 1


def test_the_same_held_update_again_gets_the_same_answer_and_other_bytes_are_refused_37_43_44(http: TestClient) -> None:
    usual(http)
    first = push(http, HUGE, 5, 5)
    assert push(http, encode(LAYOUT, make_flat(6)), 6, 5)[0] == 200
    again = push(http, HUGE, 5, 5)
    assert again[0] == 202
    drop = ("duplicate", "gateway_version", "outcomes")
    assert {k: v for k, v in again[1].items() if k not in drop} == {k: v for k, v in first[1].items() if k not in drop}
    assert (first[1]["duplicate"], again[1]["duplicate"]) == (False, True)
    status, problem = push(http, encode(LAYOUT, make_flat(7)), 5, 5)
    assert (status, problem["code"]) == (409, "sequence_reused")
    assert len(held(http)) == 1


def test_a_released_update_lands_as_if_it_had_arrived_now_37(house: House, http: TestClient) -> None:
    usual(http)
    push(http, HUGE, 5, 5)
    for number in (6, 7, 8):
        push(http, encode(LAYOUT, make_flat(number)), number, 5)
    before = house.service.coordinator.expert("python").state.weights
    told = http.post("/quarantine/release", json={"number": 1}).json()
    assert (told["version"], told["staleness"], told["coefficient"]) == (9, 3, pytest.approx(0.5))
    landed = house.service.coordinator.expert("python")
    np.testing.assert_array_equal(landed.state.weights, before + np.float32(0.5) * (1e6 * make_flat(99)))
    # From now on the same update is one that landed.
    status, again = push(http, HUGE, 5, 5)
    assert (status, again["version"], again["duplicate"], held(http)) == (200, 9, True, [])
    twice = http.post("/quarantine/release", json={"number": 1})
    assert (twice.status_code, twice.json()["code"]) == (409, "not_held")


def test_a_rejected_update_never_lands_and_its_bytes_go_37(house: House, http: TestClient) -> None:
    usual(http)
    push(http, HUGE, 5, 5)
    answer = http.post("/quarantine/reject", json={"number": 1, "reason": "learning rate 100"})
    assert answer.status_code == 204
    house.service.committer.submit(lambda transaction: None).result(10)
    assert sha256(HUGE) not in set(house.blobs.digests())
    status, problem = push(http, HUGE, 5, 5)
    assert (status, problem["code"]) == (409, "update_rejected")
    assert "learning rate 100" in str(problem["detail"])
    status, problem = push(http, encode(LAYOUT, make_flat(7)), 5, 5)
    assert (status, problem["code"]) == (409, "sequence_reused")
    # The sender hears it with its next update.
    told = push(http, encode(LAYOUT, make_flat(6)), 6, 5)[1]
    assert told["outcomes"] == [
        {"held": 1, "sequence": 5, "status": "rejected", "version": None, "reason": "learning rate 100"}
    ]


def test_after_a_restart_everything_is_held_released_and_rejected_as_before_37(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, house.client() as http:
        house.register("python")
        usual(http)
        for number in (5, 6, 7):
            assert push(http, encode(LAYOUT, 1e6 * make_flat(number)), number, 5)[0] == 202
        http.post("/quarantine/release", json={"number": 2})
        http.post("/quarantine/reject", json={"number": 3, "reason": "no"})
        before, digest = house.service.coordinator.quarantine, house.service.coordinator.expert("python").digest
        version = house.service.coordinator.gateway_version
    with open_house(tmp_path) as house, house.client() as http:
        coordinator = house.service.coordinator
        assert coordinator.quarantine == before
        assert (coordinator.expert("python").digest, coordinator.gateway_version) == (digest, version)
        assert [u["number"] for u in held(http)] == [1]
        told = http.post("/quarantine/release", json={"number": 1}).json()
        assert told["version"] == 7


def test_until_enough_norms_are_known_updates_land_whatever_their_norm_37(http: TestClient) -> None:
    usual(http, USUAL_LEAST - 1)
    assert push(http, HUGE, 4, 4)[0] == 200


def test_updates_of_nothing_and_tiny_ones_do_not_make_the_others_unusual_37_38(http: TestClient) -> None:
    """Zeros would make the usual norm 0, and 20 tiny updates a tiny one: then every honest update would be held."""
    usual(http)
    for number in range(USUAL_LEAST, USUAL_LEAST + 40):
        size = 0.0 if number % 2 else 1e-6
        assert push(http, encode(LAYOUT, np.float32(size) * make_flat(number)), number, number)[0] == 200
    assert push(http, encode(LAYOUT, make_flat(45)), 45, 45)[0] == 200


def test_one_worker_cannot_fill_the_disk_with_held_updates_37(http: TestClient) -> None:
    usual(http)
    for number in range(5, 5 + MOST_OF_A_WORKER):
        assert push(http, encode(LAYOUT, 1e6 * make_flat(number)), number, 5)[0] == 202
    status, problem = push(http, HUGE, 50, 5)
    assert (status, problem["code"]) == (429, "quarantine_full")
    assert push(http, encode(LAYOUT, make_flat(51)), 51, 5)[0] == 200
    assert push(http, HUGE, 50, 5, worker="w2")[0] == 202
    http.post("/quarantine/reject", json={"number": 1})
    assert push(http, HUGE, 50, 5)[0] == 202


@pytest.mark.parametrize(("clip", "hold", "status"), [(3.0, 50.0, 200), (1000.0, 50.0, 202), (None, 0.0, 200)])
def test_what_would_land_is_judged_so_what_is_clipped_is_not_held_37(
    tmp_path: Path, clip: float | None, hold: float, status: int
) -> None:
    with open_house(tmp_path, Aggregation(clip_norm=clip, hold_norm=hold)) as house, house.client() as http:
        house.register("python")
        usual(http)
        assert push(http, HUGE, 5, 5)[0] == status


def test_a_retraction_rejects_what_is_held_of_the_worker_37(house: House, http: TestClient) -> None:
    usual(http)
    push(http, HUGE, 5, 5)
    told = http.post("/retract", json={"expert": "python", "worker": "w1"}).json()
    assert told["note"] == "1 held update of 'w1' was rejected with it."
    assert held(http) == []
    assert push(http, HUGE, 5, 5)[1]["code"] == "update_rejected"


def test_only_an_administrator_sees_and_decides_37(locked_house: House) -> None:
    locked_house.register("python")
    with locked_house.client(JOIN) as worker, locked_house.client(ADMIN) as admin:
        usual(worker)
        assert push(worker, HUGE, 5, 5)[0] == 202
        assert worker.get("/quarantine").status_code == 403
        for word in ("release", "reject"):
            assert worker.post(f"/quarantine/{word}", json={"number": 1}).status_code == 403
        assert [u["worker"] for u in held(admin)] == ["w1"]
