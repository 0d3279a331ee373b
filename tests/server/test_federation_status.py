"""What a federation's status says: heartbeats, pushes, refusals, rates; bounded, and to each token its own."""

from __future__ import annotations

from pathlib import Path

from expert_requests import settle
from live import ADMIN, House, open_house, push_headers, push_parameters
from starlette.testclient import TestClient
from support import make_body

from fedmoe.server.status.heartbeats import KEPT_LINES, Heartbeats
from fedmoe.wire.contract.status import Heartbeat, StatusInfo, WorkerStatus


def beat(http: TestClient, **changes: object) -> int:
    body = {"expert": "law", "worker": "w1", "state": "training", "interval": 2.0, "step": 7, "steps": 10}
    return http.post("/heartbeat", json=body | changes).status_code


def push(http: TestClient, sequence: int, base: int) -> int:
    body = make_body(sequence)
    parameters = push_parameters(sequence, base, expert="law", loss=1.5)
    return http.post("/push_expert_update", params=parameters, content=body, headers=push_headers(body)).status_code


def status(http: TestClient) -> StatusInfo:
    answer = http.get("/status")
    assert answer.status_code == 200, answer.text
    return StatusInfo.model_validate(answer.json())


def worker(http: TestClient, name: str = "w1") -> WorkerStatus:
    return next(row for row in status(http).workers if row.worker == name)


def test_a_worker_is_loading_training_silent_and_gone(house: House) -> None:
    clock = [1000.0]
    house.service.committer.clock = lambda: clock[0]
    house.register("law")
    with house.client() as http:
        assert status(http).workers == []
        assert beat(http, state="loading", phase="loading the base model") == 204
        assert (worker(http).state, worker(http).phase) == ("loading", "loading the base model")
        assert beat(http, steps_per_second=0.5, tokens_per_second=120.0, loss=2.5, device="cpu") == 204
        row = worker(http)
        assert (row.state, row.step, row.steps, row.seconds_left, row.loss) == ("training", 7, 10, 6.0, 2.5)
        clock[0] += 6.0
        assert worker(http).state == "training"
        clock[0] += 0.1
        assert worker(http).state == "silent"
        assert beat(http, state="left") == 204
        clock[0] += 1000
        assert worker(http).state == "left"


def test_pushes_and_refusals_are_told_of_each_worker_and_the_revision_rises(house: House) -> None:
    house.register("law")
    with house.client() as http:
        before = status(http)
        assert push(http, 0, 0) == 200
        settle(house)
        landed = status(http)
        assert landed.revision > before.revision
        row = worker(http)
        assert (row.state, row.pushes.landed, row.pushes.refused, row.loss) == (None, 1, 0, 1.5)
        assert landed.experts[0].losses[-1].training == 1.5
        assert landed.experts[0].updates_per_minute == 1.0
        assert [(event.kind, event.expert) for event in landed.events] == [("landed", "law"), ("registered", "law")]
        assert push(http, 1, 99) == 409  # a version that there is not
        refused = worker(http)
        assert (refused.pushes.landed, refused.pushes.refused) == (1, 1)
        assert "[unknown_version]" in refused.pushes.refusal
        assert status(http).revision > landed.revision


def test_what_the_journal_holds_is_there_after_a_start(tmp_path: Path) -> None:
    with open_house(tmp_path) as house, house.client() as http:
        house.register("law")
        assert push(http, 0, 0) == 200
        settle(house)
    with open_house(tmp_path) as house, house.client() as http:
        shown = status(http)
        assert [event.kind for event in shown.events] == ["landed", "registered"]
        assert shown.experts[0].losses[0].training == 1.5
        assert worker(http).pushes.landed == 1


def test_a_token_sees_its_own_experts_and_worker(tmp_path: Path) -> None:
    with open_house(tmp_path, tokens=True) as house:
        house.register("law", "sql")
        token = "a-token-of-w1-for-law-alone"
        house.gate.add(token, "worker", worker="w1", experts=("law",))
        with house.client(token) as own, house.client(ADMIN) as admin:
            assert beat(own) == 204
            assert beat(own, worker="w2") == beat(own, expert="sql") == 403
            assert beat(admin, worker="w2") == beat(admin, worker="w3", expert="sql") == 204
            mine, everything = status(own), status(admin)
            assert own.get("/worker_log", params={"worker": "w2"}).status_code == 403
        assert ([row.worker for row in mine.workers], [row.name for row in mine.experts]) == (["w1"], ["law"])
        assert {event.expert for event in mine.events} == {"law"}
        assert mine.disk is None
        assert [row.worker for row in everything.workers] == ["w1", "w2", "w3"]


def test_a_thousand_workers_are_all_there_and_more_than_ten_thousand_are_not_kept(house: House) -> None:
    house.register("law")
    heartbeats = Heartbeats()
    with house.client() as http:
        for number in range(1000):
            assert beat(http, worker=f"w{number}") == 204
        assert len(status(http).workers) == 1000
    for number in range(10_001):
        heartbeats.hear(Heartbeat(expert="law", worker=f"w{number}", state="training", interval=1), 0.0)
    kept = heartbeats.by_expert(now=1e9)["law"]
    assert (len(kept), "w0" in kept, "w10000" in kept) == (10_000, False, True)


def test_heartbeats_of_experts_and_lines_that_are_not_as_agreed_are_refused(house: House) -> None:
    house.register("law")
    with house.client() as http:
        assert beat(http, expert="sql") == 404
        for wrong in (
            {"interval": 0},
            {"lines": ["x" * 501]},
            {"lines": ["\x1b[2J"]},
            {"state": "silent"},
            {"step": -1},
        ):
            assert beat(http, **wrong) == 422
        assert beat(http, lines=["x"] * 51) == 422
        assert status(http).workers == []
        assert http.get("/worker_log", params={"worker": "w1"}).json()["code"] == "unknown_worker"


def test_log_lines_are_kept_once_in_order_and_bounded() -> None:
    heartbeats = Heartbeats()

    def send(first: int, *lines: str) -> None:
        beat = Heartbeat(expert="law", worker="w1", state="training", interval=1, first_line=first, lines=list(lines))
        heartbeats.hear(beat, 0.0)

    send(0, "a", "b")
    send(2, "c")
    send(2, "c", "d")  # the answer to the one before was lost
    assert heartbeats.lines("law", "w1", 0) == (["a", "b", "c", "d"], 4)
    assert heartbeats.lines("law", "w1", 3) == (["d"], 4)
    assert heartbeats.lines("law", "w1", 4) == ([], 4)
    send(0, "started anew")
    send(1, "again")
    assert heartbeats.lines("law", "w1", 4) == (["started anew", "again"], 6)
    for number in range(2, 2 + 2 * KEPT_LINES):
        send(number, str(number))
    lines, following = heartbeats.lines("law", "w1", 0)
    assert (len(lines), lines[-1], following) == (KEPT_LINES, str(1 + 2 * KEPT_LINES), 6 + 2 * KEPT_LINES)
