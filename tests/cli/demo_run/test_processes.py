"""The demonstration's processes are watched and ended by their own process id."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fedmoe.cli.demo_run.processes import DemoProcess, DemoProcessError, free_port, start, wait_until_healthy


def python(code: str, log: Path) -> DemoProcess:
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=output, stderr=output)
    return DemoProcess("worker", process, log)


def test_a_failed_process_is_reported_with_the_end_of_its_log(tmp_path: Path) -> None:
    running = python("print('the reason'); raise SystemExit(3)", tmp_path / "log")
    running.process.wait(30)
    with pytest.raises(DemoProcessError, match=r"status 3(.|\n)*the reason"):
        running.check()


def test_a_process_runs_until_it_ends_by_itself_or_is_stopped(tmp_path: Path) -> None:
    done = python("", tmp_path / "done")
    done.process.wait(30)
    assert not done.check()
    busy = python("import time; time.sleep(60)", tmp_path / "busy")
    assert busy.check()
    busy.stop()
    busy.stop()
    assert busy.process.returncode is not None


def test_a_started_process_is_the_fedmoe_command_with_its_output_in_the_log(tmp_path: Path) -> None:
    running = start("version", ["--version"], tmp_path / "logs" / "version.log", niceness=1)
    assert running.process.wait(60) == 0
    assert running.log.read_text().strip()


def test_waiting_for_a_coordinator_that_ended_says_so_at_once(tmp_path: Path) -> None:
    running = python("", tmp_path / "log")
    running.process.wait(30)
    with pytest.raises(DemoProcessError, match="did not answer"):
        wait_until_healthy(running, f"http://127.0.0.1:{free_port()}")
