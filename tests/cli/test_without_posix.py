"""Modules that only POSIX has are not needed: hidden, coordinator and worker start, train and stop all the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from builders import wait_until
from command import run_code
from support import free_port

from fedmoe.server.storage.state_dir import lock_state
from fedmoe.wire.client import CoordinatorClient
from fedmoe.wire.outbox import Outbox

HIDDEN = """
import sys
import psutil  # whose part for Linux needs one of them
sys.modules |= dict.fromkeys(("fcntl", "uvloop", "resource"))  # None: an import raises ModuleNotFoundError
"""
RUN = HIDDEN + "from fedmoe.cli import main; main(sys.argv[1:])"


@contextmanager
def coordinator(state: Path, log: Path) -> Iterator[str]:
    port = free_port()
    options = ["--port", str(port), "--state-dir", str(state)]
    with log.open("ab") as file:
        process = subprocess.Popen([sys.executable, "-c", RUN, "coordinator", *options], stdout=file, stderr=file)
    try:
        with CoordinatorClient(f"http://127.0.0.1:{port}") as client:
            wait_until(lambda: client.healthy() or process.poll() is not None, 120)
        assert process.poll() is None, log.read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
        process.terminate()
        assert process.wait(60) == 0, log.read_text()[-2000:]
    finally:
        process.kill()
        process.wait()


def test_coordinator_and_worker_start_without_modules_of_posix(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    data, log = tmp_path / "data.jsonl", tmp_path / "log"
    data.write_text("".join(json.dumps({"text": f"def number_{i}(): return {i}"}) + "\n" for i in range(60)))
    options = ["--worker-id", "w1", "--specialty", "python", "--dataset", str(data), "--base-model", "tiny"]
    options += ["--max-length", "64", "--lora-r", "2", "--no-send-statistics", "--state-dir", str(tmp_path / "w1")]
    with coordinator(tmp_path / "state", log) as url:
        command = [*options, "--coordinator-url", url, "--max-steps", "2"]
        worker = subprocess.run(
            [sys.executable, "-c", RUN, "worker", *command], capture_output=True, text=True, timeout=240
        )
        assert worker.returncode == 0, worker.stderr[-2000:]
        assert '"pushed"' in worker.stderr
    # What was locked is given back.
    lock_state(tmp_path / "state").close()
    Outbox(tmp_path / "w1", "w1", "python").close()


def test_doctor_runs_without_modules_of_posix() -> None:
    outcome = run_code(
        HIDDEN + "from fedmoe.cli import main; main(['doctor', '--coordinator-url', 'http://127.0.0.1:9'])"
    )
    assert "limits" in outcome.out, outcome.err
    assert "Traceback" not in outcome.err
