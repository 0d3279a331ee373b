"""Lists of many experts: written anew where something changed, paged, and never behind what was answered."""

from __future__ import annotations

from expert_requests import change, listed, push, settle
from live import House
from starlette.testclient import TestClient

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


def test_lists_and_info_after_a_push_merge_nothing_and_say_what_the_gateway_is_made_of(house: House) -> None:
    names = [f"e{number:02}" for number in range(40)]
    house.register(*names)
    with house.client() as http:
        for number, name in enumerate(names):
            push(http, name, number, 0)
        planned = [gateway(http), http.get("/get_gateway_info").json()]
        assert house.service.coordinator.built is None
        assert planned[0] == planned[1]
        assert planned[0]["sources"] == dict.fromkeys(names, 1)
        assert [planned[0][fact] for fact in OF_A_MERGE] == [None] * len(OF_A_MERGE)
        merged = http.get("/get_gateway_info", params={"merged": True}).json()
        assert {**merged, **dict.fromkeys(OF_A_MERGE)} == planned[0]
        assert None not in [merged[fact] for fact in OF_A_MERGE]
        assert gateway(http) == http.get("/get_gateway_info").json() == merged
        push(http, names[0], 99, 1)
        assert (gateway(http)["sources"], gateway(http)["digest"]) == (dict.fromkeys(names, 1) | {names[0]: 2}, None)


#: What a listing leaves open until somebody asks for the weights.
OF_A_MERGE = ("truncation_error", "digest")


def gateway(http: TestClient) -> dict[str, object]:
    return dict(http.get("/list_experts").json()["gateway"])
