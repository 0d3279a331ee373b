"""A worker measures itself on held-out data: recorded, told to the coordinator, and where it says so the end."""

from __future__ import annotations

from pathlib import Path

import httpx2
import pytest
from structlog.testing import capture_logs
from workers import EXPERT, Federation, Road, Setup, blocks, local, wait_for_answer

from fedmoe.cli import main
from fedmoe.models.held_out import HeldOutPlan
from fedmoe.runtime.records import Record, read_records
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.experts import HeldOutInfo
from fedmoe.wire.contract.messages import HELD_OUT


def plan(every: int = 2, patience: int | None = None, threshold: float = 0.0) -> HeldOutPlan:
    return HeldOutPlan(blocks(5, 6), "held out", every, patience, threshold)


def records(state_dir: Path) -> list[Record]:
    return [record for record in read_records(state_dir / "metrics.jsonl") if record["kind"] == "held_out"]


def told(house: Federation) -> list[HeldOutInfo | None]:
    with CoordinatorClient(house.url) as client:
        return [worker.held_out for expert in client.list_experts().experts for worker in expert.workers]


def test_the_loss_is_recorded_and_told_and_outlives_the_coordinator(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=6, every=2, after_step=wait_for_answer, held_out=plan())
    worker = setup.run()
    found = records(tmp_path / "w1")
    assert [record["step"] for record in found] == [0, 2, 4, 6]
    loss = worker.worker.expert.evaluate(plan().blocks, 2)
    # The last push moved the weights by a rounding.
    assert found[-1]["loss"] == pytest.approx(loss.loss, abs=1e-4)
    assert (found[-1]["tokens"], found[-1]["stopped"]) == (loss.tokens, False)
    expected = HeldOutInfo(
        step=6,
        loss=float(str(found[-1]["loss"])),
        first=float(str(found[0]["loss"])),
        best=min(float(str(record["loss"])) for record in found),
        tokens=loss.tokens,
    )
    assert told(house) == [expected]
    house.stop()
    house.start()
    assert told(house) == [expected]


def test_the_listing_shows_it_to_people_and_programs(
    house: Federation, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Setup(house.url, tmp_path / "w1", steps=2, every=2, after_step=wait_for_answer, held_out=plan()).run()
    monkeypatch.setenv("COLUMNS", "160")
    main(["experts", "list", "--coordinator-url", house.url])
    shown = capsys.readouterr().out
    assert "held-out loss" in shown
    assert "(step 2)" in shown
    main(["experts", "list", "--coordinator-url", house.url, "--json"])
    assert '"held_out": {' in capsys.readouterr().out


def test_programs_that_do_not_ask_for_it_get_no_key_that_they_do_not_know(house: Federation, tmp_path: Path) -> None:
    Setup(house.url, tmp_path / "w1", steps=2, every=2, after_step=wait_for_answer, held_out=plan()).run()
    (worker,) = httpx2.get(f"{house.url}/list_experts").json()["experts"][0]["workers"]
    assert "held_out" not in worker
    (worker,) = httpx2.get(f"{house.url}/list_experts", params={"held_out": True}).json()["experts"][0]["workers"]
    assert worker["held_out"]["step"] == 2


class Silent(Road):
    """A coordinator that takes no statistics."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/push_statistics":
            return httpx2.Response(404, headers={"Content-Type": "text/plain"}, stream=httpx2.ByteStream(b"no"))
        return super().handle_request(request)


def test_a_coordinator_that_does_not_take_it_gets_the_updates_as_ever(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=4, every=2, after_step=wait_for_answer, held_out=plan())
    setup.road = Silent()
    with capture_logs() as logs:
        worker = setup.run()
    assert worker.worker.step == 4
    assert {line["kind"] for line in logs if line["event"] == "not_told"} == {HELD_OUT}
    assert told(house) == [None]
    assert house.expert.name == EXPERT


def test_training_that_no_longer_helps_ends_with_everything_delivered(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=50, every=2, after_step=wait_for_answer)
    setup.held_out = plan(every=2, patience=2, threshold=100.0)
    with capture_logs() as logs:
        worker = setup.run()
    assert worker.worker.step == 4
    (line,) = (line for line in logs if line["event"] == "stopped_early")
    assert (line["step"], line["reason"]) == (4, "held-out loss not lower 2 times in a row")
    assert [record["stopped"] for record in records(tmp_path / "w1")] == [False, False, True]
    assert (house.weights == local(worker)).all()
    assert setup.run().worker.step == 4, "and it stays ended at the next start"
