"""The commands together, in processes of their own: a worker trains, an evaluator scores, the coordinator publishes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from forks import Fork
from support import CoordinatorProcess
from worker_process import WorkerProcess, write_dataset

from fedmoe.cli import main
from fedmoe.wire.client import CoordinatorClient

EVALUATOR = ("--evaluator-id", "E1", "--expert", "python", "--base-model", "tiny", "--dtype", "fp32", "--device", "cpu")


def start_evaluator(url: str, folder: Path) -> Fork:
    """An evaluator on rows that the worker does not train on."""
    held_out = write_dataset(folder / "held_out.jsonl", rows=60)
    sizes = ("--held-out", str(held_out), "--max-length", "32", "--held-out-blocks", "8", "--poll-interval", "0.1")
    command = ["-m", "fedmoe", "evaluator", "--coordinator-url", url, *EVALUATOR, *sizes]
    return Fork(command, folder / "evaluator.log", environment=os.environ | {"OMP_NUM_THREADS": "1"})


def all_is_judged(client: CoordinatorClient) -> bool:
    """Whether a gateway is out and no newer state waits for a verdict."""
    gateway = client.list_experts().gateway
    return gateway is not None and gateway.gate is not None and gateway.gate.status.startswith("nothing has changed")


def test_what_a_worker_trains_goes_out_once_an_evaluator_has_scored_it(
    coordinator_process: Callable[..., CoordinatorProcess], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    coordinator = coordinator_process(["--evaluation-gate", "--min-sync-interval", "0"])
    coordinator.start()
    evaluator = start_evaluator(coordinator.url, tmp_path)
    worker = WorkerProcess(coordinator, tmp_path, steps=40, options=("--learning-rate", "1e-2"))
    try:
        worker.fork().join(120)
        with CoordinatorClient(coordinator.url) as client:
            deadline = time.monotonic() + 60
            while not all_is_judged(client):
                assert time.monotonic() < deadline, (tmp_path / "evaluator.log").read_text()[-3000:]
                time.sleep(0.1)
            served, verdicts = client.gateway_info(), client.gateway_verdicts()
            # An expert that got worse on the held-out rows stays inside, so the newest need not be what is served.
            assert served.version in {found.version for found in verdicts if found.published == "scaled x1"}
            assert served.sources["python"] > 0
        main(["gateway", "info", "--coordinator-url", coordinator.url])
        told = capsys.readouterr().out
        assert f"gate: {verdicts[0].reason}" in told
        assert "evaluators: E1/python" in told
        evaluator.send_signal(signal.SIGTERM)
        assert evaluator.wait(30) == 0
        assert b"Traceback" not in (tmp_path / "evaluator.log").read_bytes()
    finally:
        worker.end()
        if evaluator.poll() is None:
            evaluator.kill()
            evaluator.wait(20)
