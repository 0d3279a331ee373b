"""A coordinator as a process of its own, on a free port of loopback."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmoe.wire.client import CoordinatorClient
from lib.harness import ROOT

_START_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class RunningCoordinator:
    """Where it is, and the seconds from its start to its first answer."""

    pid: int
    port: int
    start_seconds: float

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def coordinator_process(
    state: str | Path,
    options: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
    source: Path = ROOT,
) -> Iterator[RunningCoordinator]:
    """A healthy coordinator with the package of `source`, ended afterwards; `variables` are of its environment.

    Raises RuntimeError with the end of its log where it does not start.
    """
    port = free_port()
    # -P: the package is that of PYTHONPATH and not that of the folder it is started in.
    command = [sys.executable, "-P", "-m", "fedmoe", "coordinator", "--port", str(port), "--state-dir", str(state)]
    environment = {**os.environ, "PYTHONPATH": str(source), **(variables or {})}
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen([*command, *options], env=environment, stdout=log, stderr=log)
        try:
            with CoordinatorClient(f"http://127.0.0.1:{port}") as client:
                while not client.healthy():
                    if process.poll() is not None or time.monotonic() - began > _START_SECONDS:
                        log.seek(0)
                        end = log.read()[-2000:].decode(errors="replace")
                        raise RuntimeError(f"the coordinator did not start:\n{end}")
                    time.sleep(0.05)
            yield RunningCoordinator(process.pid, port, time.monotonic() - began)
        finally:
            process.terminate()
            process.wait(60)
