"""Lists of many experts: written anew where something changed, paged, and never behind what was answered."""

from __future__ import annotations

import time

from expert_requests import change, listed, push, settle
from live import House
from starlette.testclient import TestClient

from fedmoe.server.service import _MANY
from fedmoe.wire.contract.experts import ExpertListing


def test_what_changed_since_the_last_list_is_in_the_next_one(house: House) -> None:
    house.register("law", "sql")
    with house.client() as http:
        before = listed(http)
        push(http, "law", 0, 0)
        settle(house)
        after = listed(http)
        assert (after["law"]["version"], after["sql"]) == (1, before["sql"])
        assert after["law"]["digest"] == house.service.coordinator.expert("law").digest != before["law"]["digest"]
        worker = after["law"]["workers"][0]
        assert (worker["worker"], worker["updates"]) == ("w1", 1)
        told = {"step": 5, "loss": 1.5, "first": 2.0, "best": 1.5, "tokens": 9}
        assert listed(http, held_out=True)["law"]["workers"][0].get("held_out") is None
        body = {"expert": "law", "worker": "w1", "kind": "held_out", "values": told}
        assert http.post("/push_statistics", json=body).status_code == 204
        assert listed(http, held_out=True)["law"]["workers"][0]["held_out"] == told
        assert "held_out" not in listed(http)["law"]["workers"][0]
        house.register("docs")
        assert list(listed(http)) == ["docs", "law", "sql"]
        change(http, "retire", expert="docs")
        change(http, "rename", expert="sql", name="a-sql")
        assert list(listed(http)) == ["a-sql", "law"]
        assert ExpertListing.model_validate(http.get("/list_experts").json()).experts[1].version == 1


def test_how_long_ago_a_worker_was_heard_of_goes_on_while_nothing_changes(house: House) -> None:
    clock = [1000.0]
    house.service.committer.clock = lambda: clock[0]
    house.register("law")
    with house.client() as http:
        push(http, "law", 0, 0)
        settle(house)

        def ago() -> float:
            return float(listed(http)["law"]["workers"][0]["seconds_ago"])

        assert ago() == 0.0
        clock[0] += 60.5
        assert ago() == 60.5
        clock[0] -= 500
        assert ago() == 0.0


def test_pages_of_a_list_follow_each_other_in_name_order(house: House) -> None:
    names = [f"e{number}" for number in range(7)]
    house.register(*reversed(names))
    with house.client() as http:
        found: list[str] = []
        page: dict[str, object] = {"more": True}
        while page.get("more"):
            page = http.get("/list_experts", params={"limit": 3, "after": found[-1] if found else ""}).json()
            found += [expert["name"] for expert in page["experts"]]  # type: ignore[attr-defined]
        assert found == names
        assert "more" not in page
        assert http.get("/list_experts", params={"limit": 0}).status_code == 422


def test_a_gateway_of_many_experts_is_built_beside_the_lists_and_appears_in_them(house: House) -> None:
    names = [f"e{number:03}" for number in range(_MANY + 2)]
    house.register(*names)
    with house.client() as http:
        for number, name in enumerate(names):
            push(http, name, number, 0)
        first = gateway(http)
        assert len(first["sources"]) == len(names)  # type: ignore[arg-type]
        push(http, names[0], 99, 1)
        newest = http.get("/get_gateway_info").json()
        assert newest["sources"][names[0]] == 2
        push(http, names[0], 100, 2)
        deadline = time.monotonic() + 60
        while gateway(http)["sources"][names[0]] != 3:  # type: ignore[index]
            assert time.monotonic() < deadline, "the newest gateway did not come"
            time.sleep(0.02)
        assert gateway(http) == http.get("/get_gateway_info").json()


def gateway(http: TestClient) -> dict[str, object]:
    return dict(http.get("/list_experts").json()["gateway"])
