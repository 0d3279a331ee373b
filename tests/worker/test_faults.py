"""What goes wrong between a worker and its coordinator, and what must come of it."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from workers import Federation, Road, Setup, StepClock, federation, local, set_patience, wait_for_answer

from fedmoe.distributed_worker import DistributedWorker, WorkerFailedError
from fedmoe.lora.adapter import FloatVector
from fedmoe.qwen_worker import StepRecord
from fedmoe.runtime.errors import RefusedError
from fedmoe.wire.client import CoordinatorUnavailableError


def numbers(house: Federation) -> list[int]:
    return [update.sequence for update in house.updates()]


@pytest.mark.parametrize("fault", ["lost", "answer_lost", "damaged", "busy"])
def test_an_update_is_sent_until_it_is_answered_and_lands_once(
    fault: str, house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery._FIRST_PAUSE", 0.01)
    monkeypatch.setattr("fedmoe.wire.delivery._LONGEST_ASKED", 0.01)
    road = Road("", fault, fault)
    worker = Setup(house.url, tmp_path / "w1", steps=6, every=2, road=road, after_step=wait_for_answer).run()
    assert road.sequences() == [0, 1, 1, 1, 2]
    assert numbers(house) == [0, 1, 2]
    np.testing.assert_array_equal(house.weights, local(worker))


def test_a_busy_coordinator_is_given_the_time_it_asked_for(
    house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[float | None] = []
    monkeypatch.setattr("fedmoe.distributed_worker.warn_of_absence", lambda error: told.append(error.retry_after))
    setup = Setup(house.url, tmp_path / "w1", steps=1, every=1, road=Road("busy"), after_step=wait_for_answer)
    started = time.monotonic()
    worker = setup.run()
    assert told == [2.0]
    assert time.monotonic() - started >= 2.0
    assert numbers(house) == [0]
    assert worker._under_way.steps == 1


def test_while_the_coordinator_is_away_it_trains_on_up_to_the_bound_and_delivers_once(
    house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedmoe.wire.delivery._LONGEST_PAUSE", 0.02)
    road, clock = Road(), StepClock()
    waited_at: list[float] = []

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        if record.step == 2:
            road.closed.set()
        if not road.closed.is_set():
            wait_for_answer(worker, record)

    def come_back() -> None:
        road.closed.wait()
        while clock.now < 7:
            time.sleep(0.01)
        time.sleep(0.3)
        waited_at.append(clock.now)
        road.closed.clear()

    back = threading.Thread(target=come_back)
    back.start()
    setup = Setup(house.url, tmp_path / "w1", steps=12, every=2, max_unsynced=5, road=road, clock=clock)
    setup.after_step = follow
    worker = setup.run()
    back.join()
    # The cut was after step 2: five more steps, then it waited, for far longer than steps take.
    assert waited_at == [7.0]
    assert numbers(house) == list(range(len(numbers(house))))
    assert house.updates()[1].base_version == 1
    np.testing.assert_array_equal(house.weights, local(worker))


def test_a_coordinator_restarted_in_the_middle_of_a_push_takes_it_once(house: Federation, tmp_path: Path) -> None:
    """Fault 66."""
    road = Road("", "answer_lost")

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        if record.step == 5:
            while len(road.pushes) < 2:
                time.sleep(0.001)
            house.stop()
            house.start()
        wait_for_answer(worker, record)

    worker = Setup(house.url, tmp_path / "w1", steps=8, every=2, road=road, after_step=follow).run()
    assert numbers(house) == [0, 1, 2, 3]
    assert road.sequences().count(1) >= 2
    np.testing.assert_array_equal(house.weights, local(worker))


def test_too_stale_means_going_on_from_the_version_in_the_same_answer(tmp_path: Path) -> None:
    with federation(tmp_path / "coordinator", max_staleness=0) as house:
        other = Setup(house.url, tmp_path / "other", "other", steps=2, every=1, after_step=wait_for_answer)
        tokens: list[int] = []
        learned: list[FloatVector] = []

        def follow(worker: DistributedWorker, record: StepRecord) -> None:
            tokens.append(record.tokens)
            if record.step == 3:
                other.run()
            assert worker._base is not None
            learned.append(local(worker) - worker._base.weights)
            wait_for_answer(worker, record)

        worker = Setup(house.url, tmp_path / "w1", steps=4, every=3, after_step=follow).run()
        updates = house.updates()
        landed = [(update.worker, update.sequence, update.base_version) for update in updates]
        assert landed == [("other", 0, 0), ("other", 1, 1), ("w1", 1, 2)]
        # All that was learned since version 0, the refused part included, is in the one update that landed.
        np.testing.assert_allclose(house.delta(updates[-1]), learned[-1], atol=1e-6)
        assert updates[-1].info["tokens"] == sum(tokens)
        np.testing.assert_array_equal(house.weights, local(worker))


def test_the_last_update_of_a_schedule_lands_even_if_it_is_too_stale_at_first(tmp_path: Path) -> None:
    with federation(tmp_path / "coordinator", max_staleness=0) as house:
        other = Setup(house.url, tmp_path / "other", "other", steps=2, every=1, after_step=wait_for_answer)

        def follow(worker: DistributedWorker, record: StepRecord) -> None:
            if record.step == 3:
                other.run()

        worker = Setup(house.url, tmp_path / "w1", steps=3, every=9, after_step=follow).run()
        assert [(update.worker, update.sequence) for update in house.updates()] == [
            ("other", 0),
            ("other", 1),
            ("w1", 1),
        ]
        np.testing.assert_array_equal(house.weights, local(worker))


def test_an_older_coordinator_gets_the_progress_on_top_of_what_it_has(tmp_path: Path) -> None:
    """Its state was replaced by one that never saw the worker's base version."""
    with federation(tmp_path / "first") as house:
        replaced = Federation(tmp_path / "second", port=house.port)

        def follow(worker: DistributedWorker, record: StepRecord) -> None:
            wait_for_answer(worker, record)
            if record.step == 5:
                house.stop()
                replaced.start()
                Setup(house.url, tmp_path / "o", "other", steps=1, every=9).run()

        try:
            worker = Setup(house.url, tmp_path / "w1", steps=8, every=2, after_step=follow).run()
            updates = replaced.updates()
            assert [(update.worker, update.sequence) for update in updates] == [("other", 0), ("w1", 3)]
            assert updates[1].info["tokens"] > updates[0].info["tokens"], "number 2 was refused: unknown version 2"
            np.testing.assert_array_equal(replaced.weights, local(worker))
        finally:
            replaced.stop()


def test_a_worker_of_another_rank_is_refused_and_both_ranks_are_named(house: Federation, tmp_path: Path) -> None:
    Setup(house.url, tmp_path / "w1", steps=1).run()
    with pytest.raises(RefusedError, match="expected 4, got 2") as caught:
        Setup(house.url, tmp_path / "w2", "w2", rank=2, steps=1).run()
    assert caught.value.code == "lora_mismatch"


def test_a_worker_on_another_base_model_is_refused(house: Federation, tmp_path: Path) -> None:
    """Fault 35."""
    Setup(house.url, tmp_path / "w1", steps=1).run()

    def other_base(worker: DistributedWorker) -> None:
        base = worker.worker.expert.base
        object.__setattr__(base.identity, "weights_hash", "f" * 64)

    with pytest.raises(RefusedError, match="all experts share one base model") as caught:
        Setup(house.url, tmp_path / "w2", "w2", steps=1).run(other_base)
    assert caught.value.code == "base_mismatch"


def test_a_refusal_a_person_must_see_to_keeps_the_update_for_the_next_start(house: Federation, tmp_path: Path) -> None:
    """The coordinator lost its state while the worker trained: nobody there knows the expert."""
    empty = Federation(tmp_path / "empty", port=house.port)

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        if record.step == 3:
            house.stop()
            empty.start()

    setup = Setup(house.url, tmp_path / "w1", steps=6, every=4, after_step=follow)
    try:
        with pytest.raises(RefusedError, match="there is no expert 'python'"):
            setup.run()
        setup.after_step = wait_for_answer
        worker = setup.run()
        assert len(empty.updates()) >= 1
        np.testing.assert_array_equal(empty.weights, local(worker))
        assert worker.worker.step == 6
        learned = local(worker) - empty.house.service._history.at_version(empty.expert, 0).state.weights  # type: ignore[union-attr]
        assert np.abs(learned).max() > 0
    finally:
        empty.stop()


def test_a_coordinator_that_is_not_there_is_told_before_anything_is_done(tmp_path: Path) -> None:
    with pytest.raises(CoordinatorUnavailableError, match="does not answer"):
        Setup("http://127.0.0.1:9", tmp_path / "w1", steps=1).run()


def poison(worker: DistributedWorker, bad_steps: set[int]) -> None:
    """Make the model itself give NaN in the n-th forward passes of `bad_steps`, counted from 1."""
    passes = 0

    def spoil(module: torch.nn.Module, inputs: object, output: object) -> object:
        nonlocal passes
        passes += 1
        if passes in bad_steps:
            return torch.full_like(output, float("nan")) if isinstance(output, torch.Tensor) else output
        return output

    worker.worker.expert.base.model.get_input_embeddings().register_forward_hook(spoil)


def test_a_batch_that_gives_nan_is_skipped_and_nothing_of_it_is_pushed(house: Federation, tmp_path: Path) -> None:
    """Fault 77."""
    setup = Setup(house.url, tmp_path / "w1", steps=8, every=2, after_step=wait_for_answer)
    worker = setup.run(lambda worker: poison(worker, {2, 5, 6, 7, 8}))
    assert worker.worker.step == 8
    assert numbers(house) == [0, 1, 2, 3], "a skipped batch brings no push forward"
    assert np.isfinite(house.weights).all()
    np.testing.assert_array_equal(house.weights, local(worker))
    position = worker.worker.sampler.state()
    assert position["epoch"] * len(setup.data) + position["position"] == 2 * (8 + 5)


def test_five_bad_batches_in_a_row_stop_the_worker_with_what_was_good_saved(house: Federation, tmp_path: Path) -> None:
    """Fault 77."""
    setup = Setup(house.url, tmp_path / "w1", steps=20, every=4, after_step=wait_for_answer)
    with pytest.raises(WorkerFailedError, match=r"5 batches in a row .* nothing of them was pushed.*--learning-rate"):
        setup.run(lambda worker: poison(worker, set(range(7, 30))))
    assert numbers(house) == [0]
    assert house.updates()[0].info["steps"] == 4
    worker = setup.run()
    assert worker.worker.step == 20
    assert numbers(house) == [0, 1, 2, 3, 4, 5][: len(numbers(house))]
    # Steps 5 and 6 were good: they were saved, and travelled with the next update.
    assert house.updates()[1].info["tokens"] > house.updates()[0].info["tokens"] * 0.9
    np.testing.assert_array_equal(house.weights, local(worker))


def test_local_weights_that_are_not_finite_never_leave(house: Federation, tmp_path: Path) -> None:
    def spoil(worker: DistributedWorker, record: StepRecord) -> None:
        weights = local(worker)
        weights[3] = np.inf
        worker.worker.load(weights)

    with pytest.raises(WorkerFailedError, match="local weights are not finite; nothing was pushed"):
        Setup(house.url, tmp_path / "w1", steps=2, every=1, after_step=spoil).run()
    assert numbers(house) == []


def test_numbers_the_coordinator_refuses_are_never_sent_again(house: Federation, tmp_path: Path) -> None:
    def explode(worker: DistributedWorker, record: StepRecord) -> None:
        wait_for_answer(worker, record)
        if record.step == 4:
            worker.worker.load(local(worker) * np.float32(1e12))
            set_patience(worker, 0.0)  # or training on from such weights may fail before the refusal is there

    setup = Setup(house.url, tmp_path / "w1", steps=8, every=2, after_step=explode)
    with pytest.raises(RefusedError, match="the update's norm") as caught:
        setup.run()
    assert caught.value.code == "norm_too_large"
    setup.after_step = wait_for_answer
    worker = setup.run()
    assert numbers(house) == [0, 2, 3, 4, 5]
    assert np.abs(house.weights).max() < 10
    np.testing.assert_array_equal(house.weights, local(worker))


def test_a_full_disk_is_told_in_words(house: Federation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    setup = Setup(house.url, tmp_path / "w1", steps=2, every=1)
    with pytest.raises(WorkerFailedError, match="w1: No space left on device"):
        setup.run(lambda _: monkeypatch.setattr("fedmoe.wire.outbox.write_atomic", full))
    assert numbers(house) == []
