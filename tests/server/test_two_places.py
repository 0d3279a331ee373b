"""One worker's id in two places: refused, flagged, taken over; and workers that learn nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from live import House, open_house, push_headers, push_parameters
from starlette.testclient import TestClient
from support import LAYOUT, make_body, make_flat

from fedmoe.federation.leases import LEAST_SECONDS
from fedmoe.lora.codec import encode
from fedmoe.server.statistics.contributors import NOT_LEARNING


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(house: House) -> Clock:
    """The clock of the leases, to be moved by the test."""
    found = Clock()
    house.service.leases._clock = found
    return found


def push(
    http: TestClient, seed: int, sequence: int, epoch: str = "e1", base: int = 0, **others: str
) -> tuple[int, dict[str, object]]:
    body = make_body(seed)
    answer = http.post(
        "/push_expert_update",
        params=push_parameters(sequence, base, epoch=epoch, **others),
        content=body,
        headers=push_headers(body),
    )
    return answer.status_code, answer.json()


def flags(http: TestClient) -> list[str]:
    (expert,) = http.get("/list_experts", params={"flags": True}).json()["experts"]
    return [flag for worker in expert["workers"] for flag in worker.get("flags", [])]


def test_a_second_place_is_refused_then_takes_over_and_the_first_is_told_to_stop_50(
    http: TestClient, clock: Clock
) -> None:
    assert push(http, 1, 0)[0] == 200
    status, problem = push(http, 2, 0, "e2")
    assert (status, problem["code"], problem["seconds_left"]) == (409, "lease_held", LEAST_SECONDS)
    assert flags(http) == ["its id is used in two places"]
    assert "two places" in str(push(http, 3, 1)[1]["note"])
    clock.now += LEAST_SECONDS
    assert push(http, 2, 0, "e2")[0] == 200
    status, problem = push(http, 4, 2)
    assert (status, problem["code"]) == (409, "lease_lost")
    assert push(http, 5, 1, "e2")[0] == 200


def test_leases_are_of_one_worker_of_one_expert_50(house: House, http: TestClient, clock: Clock) -> None:
    house.register("sql")
    assert push(http, 1, 0)[0] == 200
    assert push(http, 2, 1, "e2", worker="w2")[0] == 200
    assert push(http, 3, 2, "e2", expert="sql")[0] == 200


def test_a_refused_push_takes_no_lease_50(http: TestClient, clock: Clock) -> None:
    assert push(http, 1, 0, "e2", base=7)[0] == 409
    assert push(http, 1, 0)[0] == 200


def test_a_restart_neither_loses_nor_forges_a_lease_50(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, house.client() as http:
        house.register("python")
        assert push(http, 1, 0)[0] == 200
    with open_house(tmp_path) as house, house.client() as http:
        assert push(http, 2, 0, "e2")[1]["code"] == "lease_held"
        assert push(http, 3, 1)[0] == 200
        clock = house.service.leases._clock = Clock()
        clock.now = 1e9
        assert push(http, 2, 0, "e2")[0] == 200
    with open_house(tmp_path) as house, house.client() as http:
        assert push(http, 4, 2)[1]["code"] == "lease_lost"


def test_a_copied_state_directory_shows_as_two_places_50(http: TestClient, clock: Clock) -> None:
    assert push(http, 1, 0)[0] == 200
    assert push(http, 2, 0)[1]["code"] == "sequence_reused"
    assert flags(http) == ["its id is used in two places"]


@pytest.mark.parametrize("same", [False, True])
def test_a_worker_whose_updates_change_nothing_is_shown_as_not_learning_38(http: TestClient, same: bool) -> None:
    for number in range(NOT_LEARNING + 1):
        body = make_body(1) if same else encode(LAYOUT, 0 * make_flat(1))
        answer = http.post(
            "/push_expert_update", params=push_parameters(number), content=body, headers=push_headers(body)
        )
        assert answer.status_code == 200
        early = number < NOT_LEARNING - (0 if same else 1)
        assert (flags(http) == []) == early
    assert flags(http)[0].startswith(f"not learning: its last {NOT_LEARNING + (0 if same else 1)} updates")
    # Programs from before do not ask for flags, and get none.
    (expert,) = http.get("/list_experts").json()["experts"]
    assert "flags" not in expert["workers"][0]
    assert push(http, 2, 50)[0] == 200
    assert flags(http) == []
