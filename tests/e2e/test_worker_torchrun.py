"""Two processes of one worker, started by torchrun as several GPUs of a machine would be, here over gloo."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import CoordinatorProcess, free_port
from worker_process import WorkerProcess, assert_exactly_once, write_dataset

from fedmoe.lora.adapter import FloatVector
from fedmoe.wire.client import CoordinatorClient


def torchrun() -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port()), "-m", "fedmoe"]


@pytest.fixture
def worker(coordinator_process: Callable[..., CoordinatorProcess], tmp_path: Path) -> Iterator[WorkerProcess]:
    coordinator = coordinator_process(["--min-sync-interval", "0"])
    coordinator.start()
    one = WorkerProcess(coordinator, tmp_path, steps=100_000)
    yield one
    one.end()


def weights_of(worker: WorkerProcess, rank: int) -> FloatVector:
    file = max((worker.state_dir / "checkpoint").glob(f"checkpoint-*-rank-{rank}-*.safetensors"))
    weights: FloatVector = load_file(file)["weights"]
    return weights


def two_ranks(worker: WorkerProcess) -> list[BaseProcess]:
    """As torchrun would, without torchrun, which ends all once one has ended."""
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared["GLOO_SOCKET_IFNAME"] = "lo"
    return [worker.fork(environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]


def assert_stopped_in_order(worker: WorkerProcess) -> int:
    """The step at which both processes stopped, with the same weights."""
    (left,) = worker.lines("left")
    assert "error: " not in worker.log.read_text()
    np.testing.assert_array_equal(weights_of(worker, 0), weights_of(worker, 1))
    return int(str(left["step"]))


def test_two_processes_are_one_worker(worker: WorkerProcess) -> None:
    """The first run is stopped by SIGTERM to both, as torchrun would; the second goes on and ends with its schedule."""
    ranks = two_ranks(worker)
    worker.wait_for(lambda: len(worker.lines("pushed")) >= 2)
    for rank in ranks:
        rank.terminate()
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    stopped_at = assert_stopped_in_order(worker)

    worker.log.rename(worker.folder / "first.log")
    worker.steps = stopped_at + 20
    launcher = worker.start(torchrun())
    assert launcher.wait(60) == 0, worker.log.read_text()[-3000:]
    assert [line["step"] for line in worker.lines("restored")] == [stopped_at] * 2
    assert len(worker.lines("registered")) == 1, "rank 0 talks, and nobody else"
    np.testing.assert_array_equal(weights_of(worker, 0), weights_of(worker, 1))
    with CoordinatorClient(worker.coordinator.url) as client:
        pulled = client.pull_expert("python")
    assert pulled is not None
    np.testing.assert_array_equal(pulled.weights, weights_of(worker, 0))
    worker.coordinator.stop()
    assert_exactly_once([worker], worker.coordinator.state_dir)


def test_two_processes_go_on_with_data_that_grew_and_measure_themselves_together(worker: WorkerProcess) -> None:
    worker.options = ["--eval-split", "0.3", "--eval-steps", "3"]
    worker.steps = 4
    for rank in two_ranks(worker):
        rank.join(60)
    write_dataset(worker.dataset, rows=60)
    worker.steps = 8
    ranks = two_ranks(worker)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0], worker.log.read_text()[-3000:]
    (told,) = worker.lines("data_changed")
    assert (told["step"], told["gone"]) == (4, 0)
    assert [line["step"] for line in worker.lines("held_out")] == [0, 3, 4, 4, 6, 8]
    np.testing.assert_array_equal(weights_of(worker, 0), weights_of(worker, 1))


def test_changed_data_end_both_processes_with_the_flag_named(worker: WorkerProcess) -> None:
    worker.steps = 2
    for rank in two_ranks(worker):
        rank.join(60)
    write_dataset(worker.dataset, rows=30)
    worker.steps = 4
    ranks = two_ranks(worker)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [1, 1]
    assert "10 of 40 samples are gone or changed, 0 are new" in worker.log.read_text()
    worker.options = ["--allow-changed-data"]
    ranks = two_ranks(worker)
    for rank in ranks:
        rank.join(60)
    assert [rank.exitcode for rank in ranks] == [0, 0]
    assert [line["step"] for line in worker.lines("left")] == [2, 4]


@pytest.mark.slow
def test_sigterm_to_torchrun_ends_both_processes_in_order(worker: WorkerProcess) -> None:
    launcher = worker.start(torchrun())
    worker.wait_for(lambda: len(worker.lines("pushed")) >= 2)
    launcher.send_signal(signal.SIGTERM)
    launcher.wait(30)
    assert assert_stopped_in_order(worker) > 0


def assert_both_end(ranks: list[BaseProcess], worker: WorkerProcess, because: str, alone: bool = True) -> None:
    """Rank 0 hears of it, `alone` or as the other does; the other must not wait for it."""
    for rank in ranks:
        rank.join(30)
    assert [rank.exitcode for rank in ranks] == [1, 1], worker.log.read_text()[-3000:]
    told = worker.log.read_text()
    assert because in told
    assert ("error: process 0 of this group cannot go on; its message says why" in told) == alone
    assert told.count("error: ") == 2
    assert "Traceback" not in told


def test_a_refusal_at_the_start_ends_both_processes(worker: WorkerProcess) -> None:
    first = WorkerProcess(worker.coordinator, worker.folder, steps=2, name="w0")
    done = first.fork()
    done.join(60)
    assert done.exitcode == 0
    worker.options = ["--lora-r", "2"]
    refusal = "all experts share one LoRA configuration; rank: expected 4, got 2"
    assert_both_end(two_ranks(worker), worker, refusal, alone=False)


def test_a_refusal_in_the_middle_ends_both_processes_with_their_state_saved(worker: WorkerProcess) -> None:
    ranks = two_ranks(worker)
    worker.wait_for(lambda: len(worker.lines("pushed")) >= 1)
    worker.coordinator.kill()
    worker.coordinator.state_dir.rename(worker.folder / "lost")
    worker.coordinator.start()
    assert_both_end(ranks, worker, "there is no expert 'python'")
    np.testing.assert_array_equal(weights_of(worker, 0), weights_of(worker, 1))
