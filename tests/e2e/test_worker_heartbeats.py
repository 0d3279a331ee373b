"""What a coordinator knows of a real worker: what it does, that it was killed, that it left; shown by the commands."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

from forks import run
from support import CoordinatorProcess
from worker_process import WorkerProcess

from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.contract.status import StatusInfo, WorkerStatus

Starter = Callable[..., CoordinatorProcess]


def wait_for(client: CoordinatorClient, reached: Callable[[WorkerStatus], bool], worker: WorkerProcess) -> WorkerStatus:
    """The worker's status once it is as wanted."""
    deadline = time.monotonic() + 60
    while True:
        rows = client.status().workers
        if rows and reached(rows[0]):
            return rows[0]
        assert time.monotonic() < deadline, (rows, worker.log.read_text()[-3000:])
        time.sleep(0.1)


def test_a_worker_is_seen_at_work_silent_once_it_was_killed_and_gone_once_it_left(
    coordinator_process: Starter, tmp_path: Path
) -> None:
    coordinator = coordinator_process(["--min-sync-interval", "0"])
    coordinator.start()
    worker = WorkerProcess(coordinator, tmp_path, steps=1_000_000)
    process = worker.fork()
    with CoordinatorClient(coordinator.url) as client:
        row = wait_for(client, lambda row: row.state == "training" and bool(row.step) and row.pushes.landed > 0, worker)
        assert (row.worker, row.expert, row.steps, row.device) == ("w1", "python", 1_000_000, "cpu")
        assert row.tokens_per_second
        assert row.seconds_left
        assert row.memory
        process.kill()
        process.join(20)
        assert wait_for(client, lambda row: row.state == "silent", worker).step == client.status().workers[0].step

        worker.steps = (row.step or 0) + 500
        process = worker.fork()
        process.join(60)
        assert wait_for(client, lambda row: row.state == "left", worker).phase == ""

    shown = run("-m", "fedmoe", "status", "--coordinator-url", coordinator.url)
    assert shown.returncode == 0, shown.stderr
    assert "left" in shown.stdout
    machine = run("-m", "fedmoe", "status", "--json", "--coordinator-url", coordinator.url)
    assert StatusInfo.model_validate(json.loads(machine.stdout)).workers[0].state == "left"
    log = run("-m", "fedmoe", "logs", "w1", "--follow", "--coordinator-url", coordinator.url)
    assert log.returncode == 0, log.stderr
    synced = [line for line in log.stdout.splitlines() if " pushed " in line]
    told = ("step=", "steps=", "tokens_per_second=", "seconds_left=", "version=")
    assert any(all(name in line for name in told) for line in synced), log.stdout
    everything = worker.log.read_text()
    assert '"dataset"' in everything
    assert worker.dataset.name not in log.stdout
    assert " dataset " not in log.stdout, "what is said of the data stays with the worker"
    nobody = run("-m", "fedmoe", "logs", "w2", "--coordinator-url", coordinator.url)
    assert nobody.returncode == 1
    assert "has sent no heartbeat" in nobody.stderr
