from __future__ import annotations

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
from builders import wait_until
from support import free_port

from fedmoe.server.descriptors import few_left, in_use, raise_limit
from fedmoe.wire.client import CoordinatorClient

LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from fedmoe.cli import main
main(sys.argv[1:])
"""


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def events(log: Path) -> list[str]:
    return [json.loads(line)["event"] for line in log.read_text().splitlines() if line.startswith("{")]


def test_out_of_descriptors_it_neither_spins_nor_ends_says_so_and_recovers_15(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "log"
    command = [
        sys.executable,
        "-c",
        LIMITED,
        "coordinator",
        "--port",
        str(port),
        "--state-dir",
        str(tmp_path / "state"),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file)
    try:
        with CoordinatorClient(f"http://127.0.0.1:{port}") as client, ExitStack() as crowd:
            wait_until(client.healthy)
            client.close()
            for _ in range(200):
                with suppress(OSError):
                    crowd.enter_context(socket.create_connection(("127.0.0.1", port), 1))
            wait_until(lambda: "few_file_descriptors" in events(log))
            before, started = cpu_seconds(process.pid), time.monotonic()
            time.sleep(1.0)
            assert cpu_seconds(process.pid) - before < 0.5 * (time.monotonic() - started)
            assert process.poll() is None
        with CoordinatorClient(f"http://127.0.0.1:{port}") as client:
            wait_until(client.healthy)
        process.send_signal(signal.SIGTERM)
        assert process.wait(40) == 0
    finally:
        process.kill()
    assert events(log).count("few_file_descriptors") == 1


def test_the_soft_limit_is_raised_to_the_hard_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(resource, "setrlimit", lambda which, limits: asked.append((which, limits)))
    for limits, expected in (((1024, 4096), 4096), ((1024, 1 << 20), 65_536), ((4096, 4096), 4096)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limits=limits: limits)
        assert raise_limit() == expected
    assert asked == [(resource.RLIMIT_NOFILE, (4096, 4096)), (resource.RLIMIT_NOFILE, (65_536, 1 << 20))]


def test_a_tenth_is_few() -> None:
    assert not few_left(None, 100)
    assert not few_left(89, 100)
    assert few_left(90, 100)
    used = in_use(100)
    assert used is None or used > 2
