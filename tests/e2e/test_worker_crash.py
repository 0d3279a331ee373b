"""A worker process is killed at any moment and started again: nothing is lost, repeated or forgotten."""

from __future__ import annotations

import json
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import CoordinatorProcess
from worker_process import WorkerProcess, assert_exactly_once

from fedmoe.runtime.records import read_records

Starter = Callable[..., CoordinatorProcess]
# The checkpoint is written at the end of so short a run, so its kill comes last.
KILLS = ("worker.body_written=1", "worker.cut=2", "worker.settled=2", "worker.saved=1")


@pytest.fixture
def coordinator(coordinator_process: Starter) -> CoordinatorProcess:
    running = coordinator_process(["--min-sync-interval", "0"])
    running.start()
    return running


@pytest.fixture
def worker(coordinator: CoordinatorProcess, tmp_path: Path) -> Iterator[WorkerProcess]:
    one = WorkerProcess(coordinator, tmp_path, steps=60)
    yield one
    one.end()


def finish(worker: WorkerProcess) -> None:
    last = worker.fork()
    last.join(60)
    assert last.exitcode == 0, worker.log.read_text()[-3000:]


def kill_after(worker: WorkerProcess, seconds: float) -> bool:
    """Whether the kill met it alive."""
    process = worker.fork()
    process.join(seconds)
    alive = process.exitcode is None
    process.kill()
    process.join(20)
    return alive


def kill_at_random_moments(worker: WorkerProcess, kills: int, seed: int) -> None:
    moments = random.Random(seed)
    finish_quickly = worker.fork()  # warms the process that others are forked from, and makes the identity
    worker.wait_for(lambda: len(worker.lines("pushed")) > 0)
    finish_quickly.kill()
    finish_quickly.join(20)
    met = 0
    while met < kills:
        met += kill_after(worker, moments.uniform(0.02, 0.7))
        if met < kills and worker.lines("left"):
            worker.steps += 40
    finish(worker)


def test_five_kills_at_random_moments(worker: WorkerProcess, coordinator: CoordinatorProcess) -> None:
    kill_at_random_moments(worker, 5, seed=1)
    coordinator.stop()
    assert_exactly_once([worker], coordinator.state_dir)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_fifty_kills_at_random_moments(worker: WorkerProcess, coordinator: CoordinatorProcess, seed: int) -> None:
    worker.steps = 200
    kill_at_random_moments(worker, 10, seed=100 + seed)
    coordinator.stop()
    assert_exactly_once([worker], coordinator.state_dir)


def test_a_kill_at_every_failpoint(worker: WorkerProcess, coordinator: CoordinatorProcess) -> None:
    """Fault 6."""
    for kill in KILLS:
        process = worker.fork(kill)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL, worker.log.read_text()[-3000:]
    finish(worker)
    coordinator.stop()
    assert_exactly_once([worker], coordinator.state_dir)


@pytest.mark.slow
def test_both_ends_are_killed_again_and_again(coordinator: CoordinatorProcess, tmp_path: Path) -> None:
    worker = WorkerProcess(coordinator, tmp_path, steps=250)
    moments = random.Random(3)
    for _ in range(10):
        process = worker.fork()
        process.join(moments.uniform(0.3, 1.0))
        coordinator.kill()
        process.join(moments.uniform(0.05, 0.3))
        process.kill()
        process.join(20)
        coordinator.start()
    finish(worker)
    coordinator.stop()
    assert_exactly_once([worker], coordinator.state_dir)


def optimizer(worker: WorkerProcess) -> dict[str, np.ndarray]:
    file = max((worker.state_dir / "checkpoint").glob("checkpoint-*-rank-0-*.safetensors"))
    return load_file(file)


def test_sigterm_saves_pushes_and_leaves_and_the_next_start_goes_on(
    worker: WorkerProcess, coordinator: CoordinatorProcess
) -> None:
    worker.steps = 100_000
    process = worker.start()
    worker.wait_for(lambda: len(worker.lines("pushed")) >= 2)
    _assert_a_second_start_is_refused(worker)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 0
    (left,) = worker.lines("left")
    stopped_at = int(str(left["step"]))
    saved = optimizer(worker)
    assert saved["optimizer.step"].tolist() == [stopped_at]
    assert np.abs(saved["optimizer.exp_avg"]).max() > 0
    worker.steps = stopped_at + 30
    finish(worker)
    assert [line["step"] for line in worker.lines("restored")] == [stopped_at]
    steps = [record["step"] for record in read_records(worker.state_dir / "metrics.jsonl") if record["kind"] == "step"]
    assert steps == list(range(1, stopped_at + 31)), "no step was done twice and none was lost"
    coordinator.stop()
    updates = assert_exactly_once([worker], coordinator.state_dir)
    assert stopped_at in [update.info["steps"] for update in updates], "what was learned before the stop was pushed"


def _assert_a_second_start_is_refused(worker: WorkerProcess) -> None:
    log, worker.log = worker.log, worker.folder / "second.log"
    second = worker.fork()
    second.join(40)
    told, worker.log = worker.log.read_text(), log
    assert second.exitcode == 1
    plan, _, problem = told.partition("error: ")
    assert plan.startswith("plan: ")
    assert problem.startswith(f"{worker.state_dir} is in use by the worker with process id ")
    assert problem.count("\n") == 1


def test_a_coordinator_that_is_away_for_a_while_only_delays(
    worker: WorkerProcess, coordinator: CoordinatorProcess
) -> None:
    worker.steps = 150
    process = worker.fork()
    worker.wait_for(lambda: len(worker.lines("pushed")) >= 2)
    coordinator.kill()
    worker.wait_for(lambda: len(worker.lines("coordinator_away")) >= 1)
    identity = json.loads((worker.state_dir / "identity.json").read_bytes())
    time.sleep(0.3)
    assert process.exitcode is None
    coordinator.start()
    process.join(60)
    assert process.exitcode == 0
    assert json.loads((worker.state_dir / "identity.json").read_bytes())["epoch"] == identity["epoch"]
    coordinator.stop()
    assert_exactly_once([worker], coordinator.state_dir)
