"""A worker whose update is held: what it learned is neither lost nor sent twice, whatever the administrator says."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs
from workers import PUSH, Federation, Road, Setup, local, wait_for_answer

from fedmoe.distributed_worker import DistributedWorker
from fedmoe.lora.adapter import FloatVector
from fedmoe.qwen_worker import StepRecord
from fedmoe.wire.client import CoordinatorClient

USUAL = 12  # steps, with a push after every second: more than the usual norm rests on
LEAP = 1.0


class Leap:
    """At one step the local weights leap by far more than training moves them."""

    def __init__(self, at: int = USUAL + 1) -> None:
        self.at = at
        self.by: FloatVector | None = None

    def __call__(self, worker: DistributedWorker, record: StepRecord) -> None:
        wait_for_answer(worker, record)
        if record.step == self.at:
            before = local(worker)
            self.by = np.full_like(before, LEAP)
            worker.worker.rebase(before + self.by, before)


def numbers(house: Federation) -> list[int]:
    return [update.sequence for update in house.updates()]


def delta_of_what_landed(house: Federation, start: FloatVector) -> FloatVector:
    total = start.copy()
    for update in house.updates():
        total = total + np.float32(update.coefficient) * house.delta(update)
    return total


def beginning(house: Federation) -> FloatVector:
    assert house.house is not None
    return house.house.service._history.at_version(house.expert, 0).state.weights


def test_training_goes_on_without_a_held_update_and_it_comes_back_once_when_released_37(
    house: Federation, tmp_path: Path
) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=USUAL + 6, every=2, after_step=Leap())
    with capture_logs() as logs:
        worker = setup.run()
    told = next(line for line in logs if line["event"] == "quarantined")
    assert (told["sequence"], told["held"]) == (6, 1)
    assert "times the usual one of python" in told["reason"]
    assert numbers(house) == [0, 1, 2, 3, 4, 5, 7, 8]
    # What was learned after the cut landed; the leap is nowhere but in quarantine.
    np.testing.assert_allclose(local(worker), house.weights, atol=1e-6)
    assert np.abs(house.weights - beginning(house)).max() < LEAP / 2
    with CoordinatorClient(house.url) as admin:
        admin.release_held(1)
    assert np.abs(house.weights - beginning(house)).max() > LEAP / 3
    setup.steps, setup.after_step = USUAL + 8, wait_for_answer
    with capture_logs() as logs:
        worker = setup.run()
    assert numbers(house) == [0, 1, 2, 3, 4, 5, 7, 8, 6, 9]
    np.testing.assert_allclose(house.weights, delta_of_what_landed(house, beginning(house)), atol=1e-6)
    np.testing.assert_allclose(local(worker), house.weights, atol=1e-5)
    (line,) = [line for line in logs if line["event"] == "held_update_released"]
    assert (line["sequence"], line["version"]) == (6, 9)


def test_a_worker_is_told_of_a_rejection_in_words_and_goes_on_without_that_update_37(
    house: Federation, tmp_path: Path
) -> None:
    leap = Leap()

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        leap(worker, record)
        if record.step == USUAL + 3:
            with CoordinatorClient(house.url) as admin:
                admin.reject_held(1, "a leap")

    with capture_logs() as logs:
        worker = Setup(house.url, tmp_path / "w1", steps=USUAL + 8, every=2, after_step=follow).run()
    (line,) = [line for line in logs if line["event"] == "held_update_rejected"]
    assert (line["sequence"], line["reason"]) == (6, "a leap")
    assert numbers(house) == [0, 1, 2, 3, 4, 5, 7, 8, 9]
    np.testing.assert_allclose(local(worker), house.weights, atol=1e-6)
    assert np.abs(house.weights - beginning(house)).max() < LEAP / 2


def test_one_that_was_rejected_before_its_answer_arrived_is_given_up_and_not_sent_for_ever_37(
    house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery._FIRST_PAUSE", 0.01)

    class RejectedMeanwhile(Road):
        def handle_request(self, request: object) -> object:  # type: ignore[override]
            assert house.house is not None
            waiting = house.house.service.coordinator.quarantine.held
            if waiting and request.url.path == PUSH:  # type: ignore[attr-defined]
                with CoordinatorClient(house.url) as admin:
                    for held in list(waiting.values()):
                        admin.reject_held(held.number, "no")
            return super().handle_request(request)  # type: ignore[arg-type]

    road = RejectedMeanwhile("", "", "", "", "", "", "answer_lost")
    with capture_logs() as logs:
        worker = Setup(house.url, tmp_path / "w1", steps=USUAL + 6, every=2, road=road, after_step=Leap()).run()
    assert road.sequences() == [0, 1, 2, 3, 4, 5, 6, 6, 7, 8]
    assert numbers(house) == [0, 1, 2, 3, 4, 5, 7, 8]
    assert any(line["event"] == "refused" and line["code"] == "update_rejected" for line in logs)
    np.testing.assert_allclose(local(worker), house.weights, atol=1e-6)


class Killed(Exception):
    """The end of a worker's process."""


def test_a_worker_killed_before_the_answer_leaves_the_held_update_with_the_coordinator_37(
    house: Federation, tmp_path: Path
) -> None:
    assert house.house is not None
    quarantine = house.house.service.coordinator
    road, leap = Road(), Leap()

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        if record.step <= leap.at:
            leap(worker, record)
            return
        deadline = time.monotonic() + 20
        while not quarantine.quarantine.held and record.step == leap.at + 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        if record.step == leap.at + 2:
            raise Killed

    road.faults.extend([""] * 6 + ["answer_lost"] * 100)
    setup = Setup(house.url, tmp_path / "w1", steps=USUAL + 6, every=2, road=road, after_step=follow)
    with pytest.raises(Killed):
        setup.run()
    assert [held.sequence for held in quarantine.quarantine.held.values()] == [6]
    setup.road, setup.after_step = Road(), wait_for_answer
    with capture_logs() as logs:
        worker = setup.run()
    assert setup.road.sequences()[0] == 6
    assert any(line["event"] == "quarantined" and line["sequence"] == 6 for line in logs)
    assert numbers(house)[:6] == [0, 1, 2, 3, 4, 5]
    assert 6 not in numbers(house)
    np.testing.assert_allclose(local(worker), house.weights, atol=1e-6)
    assert np.abs(house.weights - beginning(house)).max() < LEAP / 2
