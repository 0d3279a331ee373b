"""Nothing is lost and nothing counts twice when a worker stops, crashes and starts again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from structlog.testing import capture_logs
from workers import (
    Federation,
    Road,
    Setup,
    StepClock,
    answered_after_a_step,
    blocks,
    federation,
    local,
    set_patience,
    wait_for_answer,
)

from fedmoe.distributed_worker import DistributedWorker, WorkerFailedError
from fedmoe.lora.adapter import FloatVector
from fedmoe.qwen_worker import StepRecord
from fedmoe.runtime import failpoints
from fedmoe.wire.client import CoordinatorUnavailableError

FAILPOINTS = ("worker.body_written", "worker.cut", "worker.saved", "worker.settled")


class Killed(BaseException):
    """Stands for SIGKILL where the process must live on to tell."""


@contextmanager
def killed_at(name: str, hit: int) -> Iterator[None]:
    """Inside, the worker dies when it reaches the failpoint for the `hit`-th time; whether it does is not asked."""
    hits: Counter[str] = Counter()

    def reached(here: str) -> None:
        hits[here] += 1
        if here == name and hits[here] == hit:
            raise Killed(name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(failpoints, "reached", reached)
        yield


def run_to_the_end(setup: Setup) -> DistributedWorker:
    setup.clock = StepClock() if setup.clock else None
    return setup.run()


def sequences(house: Federation, worker: str = "w1") -> list[int]:
    return [update.sequence for update in house.updates() if update.worker == worker]


def first_weights(house: Federation) -> FloatVector:
    assert house.house is not None
    return house.house.service._history.at_version(house.expert, 0).state.weights


@pytest.mark.parametrize("hit", [1, 3])
@pytest.mark.parametrize("name", FAILPOINTS)
def test_a_kill_at_any_failpoint_loses_no_number_and_repeats_none(
    name: str, hit: int, house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.distributed_worker._CHECKPOINT_SECONDS", 3.0)
    setup = Setup(house.url, tmp_path / "w1", steps=10, every=2, after_step=wait_for_answer)
    with killed_at(name, hit), pytest.raises(Killed):
        setup.run()
    worker = run_to_the_end(setup)
    assert worker.worker.step == 10
    assert sequences(house) == list(range(len(sequences(house))))
    np.testing.assert_array_equal(house.weights, local(worker))


def test_what_a_later_update_carried_is_not_taken_from_an_older_checkpoint_again(
    house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint is of step 3, which number 1 carried, cut after step 4; the kill comes in step 5."""
    monkeypatch.setattr("fedmoe.distributed_worker._CHECKPOINT_SECONDS", 0.5)

    setup = Setup(house.url, tmp_path / "w1", steps=9, every=2)
    after_step = answered_after_a_step(setup)

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        after_step(worker, record)
        if record.step == 4:
            monkeypatch.setattr("fedmoe.distributed_worker._CHECKPOINT_SECONDS", 1e9)
        if record.step == 5:
            setup.road.open_for_pushes.set()
            raise Killed

    setup.after_step = follow
    with pytest.raises(Killed):
        setup.run()
    learned = house.weights
    worker = setup.build()
    assert worker._join()
    setup.close()
    assert worker.worker.step == 3
    np.testing.assert_array_equal(local(worker), learned)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> FloatVector:
    """The weights after 8 steps in one go, without anything in between."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with federation(folder / "coordinator") as house:
        return local(Setup(house.url, folder / "w1", steps=8, every=3, after_step=wait_for_answer).run())


@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_stop_and_a_restart_train_what_one_run_would_have(
    stop_at: int, house: Federation, tmp_path: Path, uninterrupted: FloatVector
) -> None:
    """Step counter, AdamW's moments and the place in the data go on: the weights come out the same."""

    def stop(worker: DistributedWorker, record: StepRecord) -> None:
        wait_for_answer(worker, record)
        if record.step == stop_at:
            worker.stop()

    setup = Setup(house.url, tmp_path / "w1", steps=8, every=3, after_step=stop)
    first = setup.run()
    assert first.worker.step == stop_at
    np.testing.assert_array_equal(house.weights, local(first))
    setup.after_step = wait_for_answer
    worker = run_to_the_end(setup)
    assert worker.worker.step == 8
    assert len({update.epoch for update in house.updates()}) == 1
    assert sequences(house) == list(range(len(sequences(house))))
    np.testing.assert_allclose(local(worker), uninterrupted, atol=1e-6)


@pytest.mark.parametrize("away_from", [1, 3])
def test_progress_that_could_not_be_delivered_is_delivered_once_after_a_restart(
    away_from: int, house: Federation, tmp_path: Path, uninterrupted: FloatVector
) -> None:
    road = Road()

    def leave(worker: DistributedWorker, record: StepRecord) -> None:
        if record.step == away_from:
            road.closed.set()
        if not road.closed.is_set():
            wait_for_answer(worker, record)
        if record.step == 8:
            set_patience(worker, 0.2)

    setup = Setup(house.url, tmp_path / "w1", steps=8, every=0.001, road=road, clock=None)
    setup.after_step = leave
    with pytest.raises(
        CoordinatorUnavailableError, match=r"update \d+ is kept in .*w1 and delivered at the next start"
    ):
        setup.run()
    assert len(sequences(house)) < 8
    road.closed.clear()
    worker = run_to_the_end(setup)
    assert worker.worker.step == 8
    assert sequences(house) == list(range(len(sequences(house))))
    np.testing.assert_array_equal(house.weights, local(worker))
    np.testing.assert_allclose(local(worker), uninterrupted, atol=1e-6)


def test_told_to_stop_while_the_coordinator_is_away_it_saves_and_leaves_the_update_for_later(
    house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.distributed_worker._LAST_WAIT_SECONDS", 0.3)
    road = Road()

    def leave(worker: DistributedWorker, record: StepRecord) -> None:
        road.closed.set()
        if record.step == 4:
            worker.stop()

    setup = Setup(house.url, tmp_path / "w1", steps=20, every=0.001, road=road, clock=None, after_step=leave)
    worker = setup.run()
    assert worker.worker.step == 4
    assert sequences(house) == []
    road.closed.clear()
    setup.steps, setup.after_step = 4, wait_for_answer
    again = setup.run()
    assert again.worker.step == 4, "there was nothing left to train"
    np.testing.assert_allclose(house.weights - first_weights(house), local(worker) - first_weights(house), atol=1e-6)


@pytest.mark.parametrize("killed", [False, True])
def test_an_update_refused_after_a_restart_is_taken_back_and_lands_on_the_newest_version(
    killed: bool, tmp_path: Path
) -> None:
    """While the worker was down, its expert moved on too far; `killed`, it also dies right after taking it back."""
    with federation(tmp_path / "coordinator", max_staleness=0) as house:
        road = Road()

        def away(worker: DistributedWorker, record: StepRecord) -> None:
            if record.step == 2:
                road.closed.set()
            if record.step == 5:
                set_patience(worker, 0.2)

        setup = Setup(house.url, tmp_path / "w1", steps=5, every=0.001, road=road, clock=None)
        setup.after_step = away
        with pytest.raises(CoordinatorUnavailableError):
            setup.run()
        at_its_end = setup.last
        assert at_its_end._base is not None
        learned = local(at_its_end) - at_its_end._base.weights
        road.closed.clear()
        Setup(house.url, tmp_path / "o", "other", steps=3, every=1, data=blocks(5), after_step=wait_for_answer).run()
        before = house.weights
        if killed:
            with killed_at("worker.saved", 1), pytest.raises(Killed):
                setup.run()
        worker = setup.run()
        np.testing.assert_allclose(house.weights - before, learned, atol=1e-6)
        np.testing.assert_array_equal(house.weights, local(worker))


def test_a_start_after_the_end_of_the_schedule_changes_nothing(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=5, every=2, wire="int8", after_step=wait_for_answer)
    setup.run()
    digest, version = house.expert.digest, house.expert.version
    for _ in range(2):
        worker = run_to_the_end(setup)
        assert worker.worker.step == 5
    assert (house.expert.digest, house.expert.version) == (digest, version)


def test_more_steps_may_be_asked_for_after_the_end(
    house: Federation, tmp_path: Path, uninterrupted: FloatVector
) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=4, every=2, after_step=wait_for_answer)
    setup.run()
    setup.steps = 8
    worker = run_to_the_end(setup)
    assert worker.worker.step == 8
    np.testing.assert_allclose(local(worker), uninterrupted, atol=1e-6)


def test_told_to_stop_while_it_delivers_what_was_left_it_leaves_soon(
    house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=5, every=2, after_step=wait_for_answer)
    with killed_at("worker.cut", 1), pytest.raises(Killed):
        setup.run()
    monkeypatch.setattr("fedmoe.distributed_worker._LAST_WAIT_SECONDS", 0.2)
    setup.clock, setup.road = None, Road(*["lost"] * 50)
    worker = setup.run(lambda worker: worker.stop())
    assert worker.worker.step == 0
    assert sequences(house) == []
    setup.road = Road()
    run_to_the_end(setup)
    assert sequences(house) == [0, 1]


def test_other_data_under_an_old_state_is_refused_with_the_ways_out(house: Federation, tmp_path: Path) -> None:
    """Fault 63."""
    setup = Setup(house.url, tmp_path / "w1", steps=4, every=2, after_step=wait_for_answer)
    setup.run()
    setup.data, setup.steps = blocks(9), 8
    with pytest.raises(
        WorkerFailedError, match=r"24 of 24 samples .*--allow-changed-data .*move .*checkpoint away .*--state-dir"
    ):
        setup.run()
    (tmp_path / "w1" / "checkpoint").rename(tmp_path / "old")
    worker = run_to_the_end(setup)
    assert worker.worker.step == 8
    assert sequences(house) == list(range(len(sequences(house))))
    assert len({update.epoch for update in house.updates()}) == 1


def test_changed_data_go_on_with_the_flag_that_the_message_names(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=4, every=2, after_step=wait_for_answer)
    setup.run()
    setup.data, setup.steps, setup.allow_changed_data = blocks(9), 8, True
    with capture_logs() as logs:
        worker = run_to_the_end(setup)
    assert worker.worker.step == 8
    (told,) = (line for line in logs if line["event"] == "data_changed")
    assert (told["log_level"], told["kept"], told["gone"], told["new"]) == ("warning", 0, 24, 24)


def test_data_that_grew_go_on_and_say_so(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=4, every=2, after_step=wait_for_answer)
    setup.data = blocks(count=20)
    setup.run()
    setup.data, setup.steps = blocks(count=24), 8
    with capture_logs() as logs:
        worker = run_to_the_end(setup)
    assert worker.worker.step == 8
    told = {line["event"]: line for line in logs}
    assert told["restored"]["step"] == 4
    assert (told["data_changed"]["kept"], told["data_changed"]["gone"], told["data_changed"]["new"]) == (20, 0, 4)
    np.testing.assert_array_equal(house.weights, local(worker))


def test_a_state_directory_is_used_by_one_worker_at_a_time(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=1)
    setup.build()
    with pytest.raises(Exception, match=r"in use by the worker with process id \d+; stop it first"):
        Setup(house.url, tmp_path / "w1", steps=1).build()
    setup.close()
    setup.run()
