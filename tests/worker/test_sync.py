"""What a worker and a coordinator make of each other's weights, on the tiny model over a real socket."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from workers import (
    EXPERT,
    Federation,
    Road,
    Setup,
    StepClock,
    answered_after_a_step,
    blocks,
    federation,
    local,
    replayed,
    set_patience,
    wait_for_answer,
)

from fedmoe.distributed_worker import DistributedWorker
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import WIRE_DTYPES, WireDtype
from fedmoe.qwen_worker import StepRecord
from fedmoe.runtime.records import read_records


def start_of(house: Federation) -> FloatVector:
    """The expert's weights at version 0."""
    assert house.house is not None
    return house.house.service._history.at_version(house.expert, 0).state.weights


def test_an_expert_trained_by_one_worker_is_that_worker_bit_for_bit(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=14, every=3, after_step=wait_for_answer)
    worker = setup.run()
    np.testing.assert_array_equal(house.weights, local(worker))
    updates = house.updates()
    assert [update.sequence for update in updates] == list(range(len(updates)))
    assert {update.staleness for update in updates} == {0}
    assert len(updates) == 5
    assert updates[-1].info["steps"] == 14


def test_every_step_and_push_is_recorded_with_the_version_it_used(house: Federation, tmp_path: Path) -> None:
    setup = Setup(house.url, tmp_path / "w1", steps=6, every=2)
    setup.after_step = answered_after_a_step(setup)
    setup.run()
    records = list(read_records(tmp_path / "w1" / "metrics.jsonl"))
    steps = [record for record in records if record["kind"] == "step"]
    pushes = [record for record in records if record["kind"] == "push"]
    assert [record["step"] for record in steps] == [1, 2, 3, 4, 5, 6]
    # Trained on while an update was under way: its version is known one step later.
    assert [record["version"] for record in steps] == [0, 0, 0, 1, 1, 2]
    assert [record["version"] for record in pushes] == [1, 2, 3]
    assert pushes[-1]["digest"] == house.expert.digest[:12]


def test_the_update_tells_its_mean_loss_and_tokens(house: Federation, tmp_path: Path) -> None:
    seen: list[StepRecord] = []
    Setup(house.url, tmp_path / "w1", steps=4, every=4, after_step=lambda _, record: seen.append(record)).run()
    (update,) = house.updates()
    tokens = sum(record.tokens for record in seen)
    assert update.info["tokens"] == tokens
    assert update.info["loss"] == pytest.approx(sum(record.loss * record.tokens for record in seen) / tokens)


def test_two_workers_on_one_expert_both_land_and_see_each_other(house: Federation, tmp_path: Path) -> None:
    setups = [
        Setup(house.url, tmp_path / name, name, steps=16, every=2, data=blocks(seed)) for seed, name in enumerate("ab")
    ]
    threads = [threading.Thread(target=setup.run) for setup in setups]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    updates = house.updates()
    assert {update.worker for update in updates} == {"a", "b"}
    assert sum(update.info["tokens"] for update in updates) > 0
    for update in updates:
        assert update.coefficient == pytest.approx((1 + update.staleness) ** -0.5)
    np.testing.assert_allclose(house.weights, replayed(house, start_of(house)), atol=1e-6)


def test_an_update_made_from_an_old_version_is_stale_by_the_versions_in_between(
    house: Federation, tmp_path: Path
) -> None:
    """The first worker trains its second interval while the second worker pushes twice."""
    other = Setup(house.url, tmp_path / "other", "other", steps=4, every=2, data=blocks(7))

    def meanwhile(worker: DistributedWorker, record: StepRecord) -> None:
        wait_for_answer(worker, record)
        if record.step == 5:
            other.run()

    Setup(house.url, tmp_path / "w1", "w1", steps=6, every=3, after_step=meanwhile).run()
    staleness = [(update.worker, update.staleness) for update in house.updates()]
    assert staleness == [("w1", 0), ("other", 0), ("other", 0), ("w1", 2)]
    np.testing.assert_allclose(house.weights, replayed(house, start_of(house)), atol=1e-6)


def test_training_goes_on_while_an_update_travels_and_is_kept_by_the_rebase(house: Federation, tmp_path: Path) -> None:
    road, at_step = Road(), {}

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        at_step[record.step] = (local(worker), worker._base and worker._base.version)
        if record.step == 3:
            road.open_for_pushes.clear()
        if record.step == 8:
            road.open_for_pushes.set()
            wait_for_answer(worker, record)

    worker = Setup(house.url, tmp_path / "w1", steps=8, every=3, road=road, after_step=follow).run()
    first, rest = house.updates()
    cut, met = at_step[3][0], at_step[8][0]
    assert at_step[8][1] == 0, "no answer until step 8"
    np.testing.assert_allclose(house.delta(first), cut - start_of(house), atol=1e-7)
    # What was learned in steps 4 to 8 is in the second update, on top of version 1.
    assert rest.base_version == 1
    np.testing.assert_array_equal(house.weights, local(worker))
    assert np.linalg.norm(met - cut) > 0


def test_an_answer_is_taken_in_at_once_and_not_at_the_end_of_the_interval(house: Federation, tmp_path: Path) -> None:
    versions: dict[int, int] = {}

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        versions[record.step] = worker._base.version if worker._base else -1
        wait_for_answer(worker, record)

    Setup(house.url, tmp_path / "w1", steps=20, every=10, after_step=follow).run()
    assert versions[10] == 0
    assert versions[12] == 1


def test_one_step_is_done_between_two_pushes_however_long_it_takes(house: Federation, tmp_path: Path) -> None:
    Setup(house.url, tmp_path / "w1", steps=4, every=0.1, after_step=wait_for_answer).run()
    steps = [update.info["steps"] for update in house.updates()]
    assert steps == sorted(set(steps))
    assert steps[-1] == 4


def test_one_that_may_not_train_while_an_update_travels_still_trains_between_pushes(
    house: Federation, tmp_path: Path
) -> None:
    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        if record.step == 3:
            set_patience(worker, 20.0)  # with the last update, which nothing is trained after

    Setup(house.url, tmp_path / "w1", steps=3, every=0.001, max_unsynced=1e-9, clock=None, after_step=follow).run()
    assert [update.info["steps"] for update in house.updates()] == [1, 2, 3]


def test_the_coordinators_minimum_interval_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # This worker counts steps for seconds; the coordinator, which does not, must not wait for it.
    monkeypatch.setattr("fedmoe.server.access.uploads.seconds_early", lambda *_: 0.0)
    with federation(tmp_path / "coordinator", min_sync_interval=5.0) as house:
        Setup(house.url, tmp_path / "w1", steps=10, every=1, after_step=wait_for_answer).run()
        assert [update.info["steps"] for update in house.updates()] == [5, 10]


def expert_loss(house: Federation, setup: Setup, worker: DistributedWorker) -> float:
    """The loss of the coordinator's expert, as anybody would pull it."""
    worker.worker.load(house.weights)
    return worker.worker.expert.evaluate(setup.data, 8).loss


def test_narrow_wires_reach_the_loss_of_float32_within_one_per_cent(tmp_path: Path) -> None:
    losses, sizes, wires = {}, {}, WIRE_DTYPES
    for wire in wires:
        with federation(tmp_path / f"coordinator-{wire}") as house:
            setup = Setup(house.url, tmp_path / wire, steps=60, every=3, wire=wire, after_step=wait_for_answer)
            losses[wire] = expert_loss(house, setup, setup.run())
            records = list(read_records(tmp_path / wire / "metrics.jsonl"))
            sizes[wire] = [int(str(record["bytes"])) for record in records if record["kind"] == "push"]
            first = next(float(str(record["loss"])) for record in records if record["kind"] == "step")
    assert losses["fp32"] < 0.5 * first, "it clearly learned something"
    for wire, share in (("bf16", 0.6), ("int8", 0.5)):
        assert losses[wire] == pytest.approx(losses["fp32"], rel=0.01)
        assert len(sizes[wire]) == 20
        assert sizes[wire][0] < share * sizes["fp32"][0]


def test_how_fast_the_machine_is_changes_what_one_worker_makes_by_rounding_only(tmp_path: Path) -> None:
    """A busy machine does fewer steps between two pushes: once after every step, once after all of them."""
    learned = []
    for every in (1, 30):
        with federation(tmp_path / f"coordinator-{every}") as house:
            Setup(
                house.url, tmp_path / f"w-{every}", steps=20, every=every, wire="bf16", after_step=wait_for_answer
            ).run()
            assert len(house.updates()) == (20 if every == 1 else 1)
            learned.append(house.weights - start_of(house))
    assert np.linalg.norm(learned[0] - learned[1]) < 0.005 * np.linalg.norm(learned[1])


def test_what_int8_rounded_away_travels_with_the_next_update(house: Federation, tmp_path: Path) -> None:
    """Without it the difference would grow with every update; with it, it is one rounding of the last update."""
    worker = Setup(house.url, tmp_path / "w1", steps=60, every=2, wire="int8", after_step=wait_for_answer).run()
    updates = house.updates()
    assert len(updates) == 30
    difference = np.abs(local(worker) - house.weights).max()
    one_rounding = np.abs(house.delta(updates[-1])).max() / 127 / 2
    assert 0 < difference <= one_rounding * 1.05


@pytest.mark.parametrize("wire", ["bf16", "int8"])
def test_what_a_pull_rounded_is_in_no_update_also_not_after_a_restart(
    house: Federation, tmp_path: Path, wire: WireDtype
) -> None:
    """A worker that learned nothing has nothing to send, though the base it pulled is not the coordinator's."""
    setup = Setup(house.url, tmp_path / "w1", steps=4, every=2, wire=wire, after_step=wait_for_answer)
    setup.run()
    exact = house.weights
    pulls: list[FloatVector] = []

    def follow(worker: DistributedWorker, record: StepRecord) -> None:
        assert worker._base is not None
        pulls.append(worker._base.weights)
        wait_for_answer(worker, record)

    setup.steps, setup.after_step = 6, follow
    worker = setup.run()
    rounded = np.abs(pulls[0] - exact).max()
    assert rounded > 0, "the pull was in the wire's precision"
    (*_, last) = house.updates()
    np.testing.assert_allclose(house.weights - exact, house.delta(last), atol=1e-7)
    # The answer to the push was exact: what is left is the rounding of that update, not that of the pull.
    one_rounding = np.abs(house.delta(last)).max() * (2**-8 if wire == "bf16" else 1 / 127 / 2)
    assert np.abs(local(worker) - house.weights).max() <= one_rounding * 1.05
    assert one_rounding < rounded


def test_two_workers_over_int8_taking_turns_equal_two_over_float32(tmp_path: Path) -> None:
    """Each is stopped and started again between its turns, so the rounding also lives in the checkpoint."""
    losses = {}
    for wire in ("fp32", "int8"):
        with federation(tmp_path / f"coordinator-{wire}") as house:
            for turn in range(1, 5):
                for seed, name in enumerate("ab"):
                    setup = Setup(house.url, tmp_path / f"{wire}-{name}", name, data=blocks(seed))
                    setup.steps, setup.every, setup.wire = turn * 8, 4, wire
                    setup.after_step, setup.clock = wait_for_answer, StepClock()
                    worker = setup.run()
            losses[wire] = expert_loss(house, Setup("", tmp_path, data=blocks(0) + blocks(1)), worker)
            assert len(house.updates()) == 16
    assert losses["int8"] == pytest.approx(losses["fp32"], rel=0.01)


def test_identity_and_metrics_are_for_the_user_only(house: Federation, tmp_path: Path) -> None:
    Setup(house.url, tmp_path / "w1", steps=2, every=2).run()
    assert (tmp_path / "w1").stat().st_mode & 0o077 == 0
    identity = json.loads((tmp_path / "w1" / "identity.json").read_bytes())
    assert (identity["worker"], identity["expert"], identity["next_sequence"]) == ("w1", EXPERT, 1)
    assert not list((tmp_path / "w1").glob("update-*"))
