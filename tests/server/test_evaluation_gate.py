"""The gate over HTTP: candidates offered, scores taken, a gateway published or kept, and all of it after a restart."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType

import pytest
from gated_house import GATED, Clock, ask, eventually, gate_of, judged, open_set, push, scores, timed, trained
from live import JOIN, House, open_house, push_headers, push_parameters
from reported_data import body_of, send
from starlette.testclient import TestClient
from support import make_body

from fedmoe.coordinator import Aggregation
from fedmoe.server.gate import gate as evaluation_gate
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.wire.contract.messages import SAFETENSORS


def judge_all(client: TestClient, before: int = 0, **facts: float | str) -> dict[str, object]:
    """Both evaluators score the open set alike; the verdict."""
    for expert in ("python", "sql"):
        ask(client, expert)
    for expert in ("python", "sql"):
        body = scores(open_set(client, expert), expert, **facts)  # type: ignore[arg-type]
        assert client.post("/push_gateway_scores", json=body).status_code == 200
    return judged(client, before)


def gateway_bytes(client: TestClient) -> bytes:
    answer = client.get("/get_gateway_weights", headers={"Accept": SAFETENSORS})
    assert answer.status_code == 200, answer.text
    return answer.content


@pytest.fixture
def two(tmp_path: Path) -> Iterator[TestClient]:
    with trained(tmp_path) as (_, client):
        yield client


# Before anything is out.


def test_without_evaluators_nothing_is_out_and_the_answer_says_so(two: TestClient) -> None:
    for path in ("/get_gateway_weights", "/get_gateway_info"):
        answer = two.get(path)
        assert (answer.status_code, answer.json()["code"]) == (404, "gateway_not_published")
        assert "no evaluator has asked" in answer.json()["detail"]
        assert "fedmoe evaluator" in answer.json()["fix"]
    assert two.get("/list_experts").json()["gateway"] is None


def test_a_coordinator_without_a_gate_says_so(tmp_path: Path) -> None:
    with trained(tmp_path, Aggregation()) as (_, client):
        assert client.get("/get_gateway_info").json()["gate"] is None
        for answer in (
            client.get("/gateway_candidates", params={"evaluator": "e", "expert": "python"}),
            client.get("/gateway_verdicts"),
        ):
            assert (answer.status_code, answer.json()["code"]) == (404, "gate_disabled")


# A set, scored.


def test_a_set_names_what_is_to_be_scored_and_every_adapter_can_be_had(two: TestClient) -> None:
    offer = open_set(two, "python")
    assert offer["sources"] == {"python": 1, "sql": 1}
    assert [c["name"] for c in offer["candidates"]] == ["scaled x0.5", "scaled x0.6", "scaled x0.9", "scaled x1"]
    digests = {str(offer["own"])} | {str(c["digest"]) for c in offer["candidates"]}
    assert len(digests) == 2
    for digest in digests:
        answer = two.get("/gateway_candidate_weights", params={"set": offer["id"], "digest": digest})
        assert (answer.status_code, answer.json()["digest"]) == (200, digest)
    refused = two.get("/gateway_candidate_weights", params={"set": offer["id"], "digest": "0" * 64})
    assert (refused.status_code, refused.json()["code"]) == (404, "unknown_candidate")


def test_the_best_worst_domain_goes_out_with_its_scale_and_the_reason_is_shown(two: TestClient) -> None:
    verdict = judge_all(two, best="scaled x0.6")
    assert (verdict["published"], verdict["version"]) == ("scaled x0.6", 4)
    info = two.get("/get_gateway_info").json()
    assert (info["strategy"], info["scale"], info["version"], info["sources"]) == (
        "scaled",
        0.6,
        4,
        {"python": 1, "sql": 1},
    )
    assert "scaled x0.6 keeps 60.0 %" in info["gate"]["reason"]
    assert info["gate"]["evaluators"] == ["e-python/python", "e-sql/sql"]
    assert {found["expert"]: found["tokens"] for found in verdict["scores"]} == {"python": 1000, "sql": 1000}  # type: ignore[attr-defined]


def test_a_gateway_that_is_worse_stays_inside_and_the_old_bytes_are_served(two: TestClient) -> None:
    judge_all(two)
    before = gateway_bytes(two)
    push(two, "sql", 1, 5)
    assert gateway_bytes(two) == before
    verdict = judge_all(two, 1, kept=0.4, published=0.5)
    assert verdict["published"] is None
    assert "more than 1.0 % lower" in str(verdict["reason"])
    assert gateway_bytes(two) == before
    told = two.get("/get_gateway_info").json()["gate"]
    assert (told["reason"], told["status"]) == (verdict["reason"], "nothing has changed since the last verdict")
    push(two, "sql", 2, 6)
    assert judge_all(two, 2, kept=0.6, published=0.5)["published"] == "scaled x0.5"
    assert gateway_bytes(two) != before


def test_updates_land_while_a_set_is_open_and_the_next_set_has_them(two: TestClient) -> None:
    offer = open_set(two, "python")
    for sequence in range(1, 4):
        push(two, "python", sequence, sequence)
        assert open_set(two, "python")["id"] == offer["id"]
    judge_all(two)
    assert two.get("/get_gateway_info").json()["sources"]["python"] == 1
    assert open_set(two, "python")["sources"] == {"python": 4, "sql": 1}


def test_nothing_new_means_nothing_to_score(two: TestClient) -> None:
    judge_all(two)
    assert ask(two, "python") == {"open": None, "status": "nothing has changed since the last verdict"}


def test_who_has_scored_is_not_asked_again_and_may_correct_the_scores(two: TestClient) -> None:
    ask(two, "sql")
    offer = open_set(two, "python")
    body = scores(offer, "python", kept=0.3)
    assert two.post("/push_gateway_scores", json=body).json() == {"waiting_for": ["e-sql/sql"]}
    waiting = ask(two, "python")
    assert waiting["open"] is None
    assert "for scores from e-sql/sql" in str(waiting["status"])
    two.post("/push_gateway_scores", json=scores(offer, "python", kept=0.9))
    two.post("/push_gateway_scores", json=scores(offer, "sql", kept=0.9))
    kept = judged(two)["kept"]
    assert kept["scaled x0.5"] == pytest.approx({"python": 0.9, "sql": 0.9})  # type: ignore[index]


def test_an_expert_that_came_later_waits_for_the_next_set_and_holds_nobody_up(tmp_path: Path) -> None:
    with trained(tmp_path) as (house, client):
        offer = open_set(client, "python")
        house.register("docs")
        assert ask(client, "docs")["open"] is None
        assert client.post("/push_gateway_scores", json=scores(offer, "python")).json() == {"waiting_for": []}
        assert "without an evaluator's scores: sql" in str(judged(client)["reason"])
        assert "docs" in open_set(client, "docs")["sources"]


# What is refused.


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"set": "f" * 16}, 409, "candidates_closed"),
        ({"set": "../x"}, 422, "invalid_request"),
        ({"tokens": 0}, 422, "invalid_request"),
        ({"tokens": 1 << 41}, 422, "invalid_request"),
        ({"base": -0.1}, 422, "invalid_request"),
        ({"own": "NaN"}, 422, "invalid_request"),
        ({"own": 1e9}, 422, "invalid_request"),
        ({"candidates": {"scaled x0.5": 1.0}}, 422, "scores_mismatch"),
        ({"candidates": {"mine": 1.0}}, 422, "scores_mismatch"),
        ({"published": 1.0}, 422, "scores_mismatch"),
        ({"expert": "docs"}, 422, "scores_mismatch"),
        ({"extra": 1.0}, 422, "invalid_request"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused_and_change_nothing(
    two: TestClient, change: dict[str, object], status: int, code: str
) -> None:
    offer = open_set(two, "python")
    answer = two.post("/push_gateway_scores", json={**scores(offer, "python"), **change})
    assert (answer.status_code, answer.json()["code"]) == (status, code)
    assert two.get("/gateway_verdicts").json() == {"verdicts": []}
    assert open_set(two, "python")["id"] == offer["id"]


def test_scores_that_come_after_the_verdict_are_refused(two: TestClient) -> None:
    late = scores(open_set(two, "python"), "python")
    judge_all(two)
    answer = two.post("/push_gateway_scores", json=late)
    assert (answer.status_code, answer.json()["code"]) == (409, "candidates_closed")


def test_a_token_of_one_expert_scores_no_other(tmp_path: Path) -> None:
    with open_house(tmp_path, GATED, tokens=True) as house:
        house.register("python", "sql")
        house.gate.add("token-of-w1-32-characters-000000", "worker", "e-python", ["python"])
        with house.client(JOIN) as client:
            offer = open_set(client, "python")
            other = open_set(client, "sql")
        with house.client("token-of-w1-32-characters-000000") as client:
            for parameters in ({"evaluator": "e-python", "expert": "sql"}, {"evaluator": "e2", "expert": "python"}):
                assert client.get("/gateway_candidates", params=parameters).status_code == 403
            assert client.post("/push_gateway_scores", json=scores(offer, "sql")).status_code == 403
            weights = {"set": other["id"], "digest": other["own"]}
            assert client.get("/gateway_candidate_weights", params=weights).status_code == 403
            assert client.post("/push_gateway_scores", json=scores(offer, "python")).status_code == 200
        with house.client() as client:
            assert client.get("/gateway_verdicts").status_code == 401


# Time.


def test_a_set_that_time_ends_is_undecided_and_what_is_out_stays(tmp_path: Path) -> None:
    clock = Clock()
    with timed(tmp_path, clock) as (house, client):
        gate = gate_of(house)
        judge_all(client)
        before = gateway_bytes(client)
        push(client, "python", 1, 7)
        ask(client, "sql")
        offer = open_set(client, "python")
        client.post("/push_gateway_scores", json=scores(offer, "python", kept=0.9))
        clock.now += 29
        gate.step()
        assert len(client.get("/gateway_verdicts").json()["verdicts"]) == 1
        clock.now += 1
        gate.step()
        verdict = judged(client, 1)
        assert (verdict["published"], verdict["undecided"]) == (None, True)
        assert "undecided: --gate-seconds (30) were over before e-sql/sql had scored" in str(verdict["reason"])
        assert [found["expert"] for found in verdict["scores"]] == ["python"]  # type: ignore[attr-defined]
        assert gateway_bytes(client) == before
        told = client.get("/get_gateway_info").json()["gate"]
        assert (told["reason"], told["undecided"]) == (verdict["reason"], True)


def test_an_undecided_state_is_offered_again_and_judged_once_all_have_scored_also_after_a_restart(
    tmp_path: Path,
) -> None:
    clock = Clock()
    with timed(tmp_path, clock) as (house, client):
        ask(client, "sql")
        offer = open_set(client, "python")
        clock.now += 30
        gate_of(house).step()
        assert judged(client)["undecided"] is True
        again = open_set(client, "python")
        assert (again["id"] != offer["id"], again["sources"]) == (True, offer["sources"])
    with open_house(tmp_path, GATED) as house, house.client() as client:
        assert gate_of(house).info().undecided
        verdict = judge_all(client, 1)
        assert (verdict["published"], verdict["undecided"]) == ("scaled x0.5", False)
        assert not gate_of(house).info().undecided


def test_a_verdict_of_before_undecided_ones_were_kept_can_be_read(two: TestClient, tmp_path: Path) -> None:
    judge_all(two)
    with sqlite3.connect(next(tmp_path.rglob("*.sqlite*"))) as journal:
        journal.execute("UPDATE gateway_verdicts SET payload = json_remove(payload, '$.undecided')")
    assert judged(two)["undecided"] is False


def test_an_evaluator_that_went_away_holds_up_one_set_and_not_the_next(tmp_path: Path) -> None:
    clock = Clock()
    with timed(tmp_path, clock) as (house, client):
        ask(client, "sql")
        client.post("/push_gateway_scores", json=scores(open_set(client, "python"), "python"))
        clock.now += 30
        gate_of(house).step()
        assert judged(client)["undecided"] is True
        clock.now += 1
        client.post("/push_gateway_scores", json=scores(open_set(client, "python"), "python"))
        verdict = judged(client, 1)
        assert verdict["published"] == "scaled x0.5"
        assert "without an evaluator's scores: sql" in str(verdict["reason"])


def test_an_evaluator_that_is_still_at_work_is_waited_for_in_the_next_set_too(tmp_path: Path) -> None:
    clock = Clock()
    with timed(tmp_path, clock) as (house, client):
        ask(client, "sql")
        open_set(client, "python")
        clock.now += 29
        ask(client, "sql")  # as evaluators do between two adapters
        clock.now += 1
        gate_of(house).step()
        answer = client.post("/push_gateway_scores", json=scores(open_set(client, "python"), "python"))
        assert answer.json() == {"waiting_for": ["e-sql/sql"]}


def test_a_set_that_nobody_scores_makes_room_for_a_newer_one_and_the_reason_says_why(tmp_path: Path) -> None:
    clock = Clock()
    with timed(tmp_path, clock) as (house, client):
        gate = gate_of(house)
        first = open_set(client, "python")
        push(client, "python", 1, 7)
        clock.now += 30
        gate.step()
        assert "(30) were over before e-python/python had scored" in gate.info().reason
        second = open_set(client, "python")
        assert (second["id"] != first["id"], second["sources"]) == (True, {"python": 2, "sql": 1})


def test_while_candidates_are_merged_and_judged_everybody_else_is_answered(
    two: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge_all(two)
    push(two, "sql", 1, 3)
    for place in ("make_candidates", "decide"):
        real, go_on, there = getattr(evaluation_gate, place), threading.Event(), threading.Event()

        def slow(*given: object, real: Callable[..., object] = real, **named: object) -> object:
            there.set()  # noqa: B023  # each place is left before the next begins
            assert go_on.wait(20)  # noqa: B023
            return real(*given, **named)

        monkeypatch.setattr(evaluation_gate, place, slow)
        ask(two, "python")
        if place == "decide":
            two.post("/push_gateway_scores", json=scores(open_set(two, "python"), "python"))
            two.post("/push_gateway_scores", json=scores(open_set(two, "sql"), "sql"))
        assert there.wait(20)
        assert ask(two, "python") == {"open": None, "status": "candidates are being made or judged"}
        push(two, "sql", 2 if place == "make_candidates" else 3, 4)
        assert gateway_bytes(two)
        assert two.get("/get_gateway_info").is_success
        go_on.set()


# What is taken back.


def test_a_set_made_before_a_rollback_never_goes_out(two: TestClient) -> None:
    offer = open_set(two, "python")
    two.post("/rollback", json={"expert": "python", "to_version": 0})
    two.post("/push_gateway_scores", json=scores(offer, "python"))
    eventually(lambda: ask(two, "python")["open"], "a new set")
    assert open_set(two, "python")["id"] != offer["id"]
    assert two.get("/gateway_verdicts").json() == {"verdicts": []}


def test_after_a_retraction_the_published_gateway_does_not_hold_its_place(two: TestClient) -> None:
    judge_all(two)
    assert two.post("/retract", json={"expert": "python", "worker": "w-python"}).status_code == 200
    verdict = judge_all(two, 1, kept=0.1, published=0.9)
    assert verdict["published"] == "scaled x1"
    assert "taken back from python" in str(verdict["reason"])
    assert two.get("/get_gateway_info").json()["sources"] == {"sql": 1}


# After a restart.


def test_the_very_same_bytes_and_reason_are_served_after_a_restart(tmp_path: Path) -> None:
    with trained(tmp_path) as (_, client):
        judge_all(client, best="scaled x0.8")
        before, told = gateway_bytes(client), client.get("/get_gateway_info").json()
        push(client, "python", 1, 9)
    with open_house(tmp_path, GATED) as house, house.client() as client:
        assert gateway_bytes(client) == before
        again = client.get("/get_gateway_info").json()
        assert again["gate"]["reason"] == told["gate"]["reason"]
        assert {key: again[key] for key in again if key != "gate"} == {key: told[key] for key in told if key != "gate"}
        assert open_set(client, "python")["published"] == told["digest"]


def test_only_the_published_gateways_blob_is_kept(tmp_path: Path) -> None:
    with trained(tmp_path) as (house, client):
        blobs = set(house.blobs.digests())
        judge_all(client)
        first = set(house.blobs.digests()) - blobs
        push(client, "sql", 1, 5)
        blobs = set(house.blobs.digests()) - first
        judge_all(client, 1, kept=0.9)
        eventually(lambda: not first & set(house.blobs.digests()), "the old blob's end")
        assert len(set(house.blobs.digests()) - blobs) == 1
    with open_house(tmp_path) as house:  # without the gate it is kept all the same
        assert len(set(house.blobs.digests()) - blobs) == 1


def test_a_published_gateway_whose_bytes_are_lost_is_told_and_the_next_verdict_mends_it(tmp_path: Path) -> None:
    with trained(tmp_path) as (house, client):
        blobs = set(house.blobs.digests())
        judge_all(client)
        (lost,) = set(house.blobs.digests()) - blobs
        push(client, "sql", 1, 5)
    (tmp_path / "blobs" / lost).write_bytes(b"damaged")
    with open_house(tmp_path, GATED) as house, house.client() as client:
        assert client.get("/get_gateway_info").json()["code"] == "gateway_not_published"
        assert judge_all(client, 1)["published"] == "scaled x0.5"


def test_a_full_disk_leaves_the_old_gateway_and_the_next_change_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trained(tmp_path) as (house, client):
        judge_all(client)
        before = gateway_bytes(client)
        push(client, "sql", 1, 5)
        for expert in ("python", "sql"):
            ask(client, expert)
        bodies = [scores(open_set(client, expert), expert, kept=0.9) for expert in ("python", "sql")]
        with monkeypatch.context() as patch:
            patch.setattr(house.blobs, "_reserve", 1 << 62)
            for body in bodies:
                client.post("/push_gateway_scores", json=body)
            eventually(lambda: "no space left" in str(ask(client, "python")["status"]), "the reason")
        assert gateway_bytes(client) == before
        push(client, "sql", 2, 6)
        assert judge_all(client, 1, kept=0.9)["published"] == "scaled x0.5"


def test_a_journal_that_fails_ends_the_coordinator_and_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(verdict: object) -> None:
        raise StorageFailedError("the journal failed")

    with trained(tmp_path) as (house, client):
        monkeypatch.setattr(house.journal, "add_verdict", broken)
        for expert in ("python", "sql"):
            ask(client, expert)
        for expert in ("python", "sql"):
            client.post("/push_gateway_scores", json=scores(open_set(client, expert), expert))
        eventually(lambda: house.service.committer.failed, "the failure")
        assert client.get("/get_gateway_info").json()["code"] == "gateway_not_published"
        assert client.get("/healthz").status_code == 503


def test_a_verdict_is_plain_json_with_what_it_was_made_of(tmp_path: Path) -> None:
    with trained(tmp_path) as (house, client):
        judge_all(client)
        (verdict,) = house.journal.verdicts(5)
    published = json.loads(json.dumps(verdict.payload))["published"]
    assert (published["sources"], published["scale"]) == ({"python": 1, "sql": 1}, 0.5)


def test_the_gate_tries_regmean_once_every_expert_has_told_of_its_inputs(tmp_path: Path) -> None:
    with trained(tmp_path) as (_, client):
        for expert in ("python", "sql"):
            assert send(client, "moments", body_of("moments", 1), expert=expert)[0] == 200
        names = [candidate["name"] for candidate in open_set(client, "python")["candidates"]]
        assert names[-3:] == ["regmean x1.1", "regmean x1.3", "regmean x1.5"]
        judge_all(client, best="regmean x1.3")
        info = client.get("/get_gateway_info").json()
        assert (info["strategy"], info["scale"], sorted(info["statistics"])) == ("regmean", 1.3, ["python", "sql"])
    with open_house(tmp_path, replace(GATED, strategy="sum")) as house:
        assert house.service.gateway().statistics == MappingProxyType(info["statistics"])


def push_steps(client: TestClient, expert: str, sequence: int, steps: int) -> None:
    body = make_body(sequence)
    parameters = push_parameters(sequence, expert=expert, worker=f"w-{expert}", steps=steps)
    answer = client.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body))
    assert answer.is_success, answer.text


def gateway_merges(client: TestClient, house: House) -> int:
    found = house.service.coordinator.transaction().online_gateway
    return found.number if found is not None else 0


def test_of_a_gateway_that_lives_a_copy_goes_out_and_experts_go_on_all_the_same(tmp_path: Path) -> None:
    with trained(tmp_path, Aggregation(evaluation_gate=True, merge_after=3)) as (house, client):
        push_steps(client, "python", 1, 3)
        eventually(lambda: gateway_merges(client, house) == 1, "the first fold")
        assert [c["name"] for c in open_set(client, "python")["candidates"]] == ["living"]
        assert judge_all(client)["published"] == "living"
        out, info = gateway_bytes(client), client.get("/get_gateway_info").json()
        assert (info["strategy"], info["sources"]) == ("living", {"python": 2})
        push_steps(client, "sql", 1, 3)
        eventually(lambda: gateway_merges(client, house) == 2, "the second fold")
        newer = house.service.coordinator.gateway()
        assert house.service.coordinator.experts["sql"].digest == newer.digest
        assert judge_all(client, 1, kept=0.3, published=0.5)["published"] is None
        assert gateway_bytes(client) == out
    with open_house(tmp_path, Aggregation(evaluation_gate=True, merge_after=3)) as house, house.client() as client:
        assert gateway_bytes(client) == out
        assert house.service.coordinator.gateway().digest == newer.digest


def test_without_a_merge_a_gateway_that_lives_is_not_scored_again(tmp_path: Path) -> None:
    with trained(tmp_path, Aggregation(evaluation_gate=True, merge_after=3)) as (house, client):
        push_steps(client, "python", 1, 3)
        eventually(lambda: gateway_merges(client, house) == 1, "the first fold")
        judge_all(client)
        push_steps(client, "python", 2, 4)
        ask(client, "python")
        told = eventually(lambda: "nothing has changed" in str(ask(client, "python")["status"]), "the status")
        assert told
        assert ask(client, "python")["open"] is None
