"""Who is waited for: invented names keep nobody out, and nobody is waited for in vain again and again."""

from __future__ import annotations

from pathlib import Path

import pytest
from gated_house import Clock, ask, gate_of, judged, open_set, scores, timed, trained

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.gate.evaluators import Evaluators


def heard(names: list[str], token: str, evaluators: Evaluators, at: float = 0.0) -> None:
    for name in names:
        evaluators.hear((name, "python"), token, at, 30.0)


def test_asking_with_get_changes_nothing_however_many_names_are_invented(tmp_path: Path) -> None:
    with trained(tmp_path) as (_, client):
        before = client.post("/gateway_candidates", json={"evaluator": "first", "expert": "python"}).json()
        told = client.get("/gateway_verdicts").json()
        for number in range(300):
            parameters = {"evaluator": f"z{number}", "expert": "python"}
            assert client.get("/gateway_candidates", params=parameters).status_code == 200
        assert before.keys() == {"open", "status"}
        assert client.get("/gateway_verdicts").json() == told
        offer = open_set(client, "python")
        answer = client.post("/push_gateway_scores", json=scores(offer, "python"))
        assert answer.json() == {"waiting_for": ["first/python"]}


def test_invented_evaluators_of_one_token_take_each_others_places(tmp_path: Path) -> None:
    evaluators = Evaluators()
    heard(["honest"], "other", evaluators)
    heard([f"z{number}" for number in range(1000)], "greedy", evaluators, 1.0)
    active = [name for name, _ in evaluators.active(2.0, 30.0)]
    assert (len(active), "honest" in active, "z999" in active) == (17, True, True)
    with trained(tmp_path) as (_, client):
        for number in range(300):
            ask(client, "python", f"z{number}")
        assert ask(client, "python", "honest")["status"]


def test_when_all_places_are_taken_by_evaluators_that_score_a_new_one_has_to_wait() -> None:
    evaluators = Evaluators()
    for number in range(256):
        evaluators.score((f"e{number}", "python"), f"token-{number}", 0.0, 30.0)
    with pytest.raises(RefusedError, match="256 evaluators are at work") as refused:
        heard(["late"], "late", evaluators, 29.0)
    assert refused.value.code == "busy"
    heard(["late"], "late", evaluators, 30.0)
    assert ("late", "python") in evaluators.awaited(["python"])


def test_names_that_never_score_are_waited_for_a_few_times_and_then_no_name_of_their_token(tmp_path: Path) -> None:
    clock = Clock()
    with timed(tmp_path, clock) as (house, client):
        gate = gate_of(house)
        for turn in range(3):
            ask(client, "sql", f"ghost-{turn}")
            client.post("/push_gateway_scores", json=scores(open_set(client, "python"), "python"))
            clock.now += 30
            gate.step()
            assert judged(client, turn)["undecided"] is True
        ask(client, "sql", "ghost-3")
        client.post("/push_gateway_scores", json=scores(open_set(client, "python"), "python"))
        assert judged(client, 3)["undecided"] is False


def test_an_evaluator_that_scores_again_is_waited_for_again() -> None:
    evaluators, one = Evaluators(), ("e", "python")
    heard(["e"], "t", evaluators)
    for _ in range(3):
        evaluators.miss([one])
    assert evaluators.awaited(["python"]) == {}
    evaluators.score(one, "t", 5.0, 30.0)
    assert evaluators.awaited(["python"]) == {one: 5.0}
    assert evaluators.awaited(["sql"]) == {}
