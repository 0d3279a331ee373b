"""The demonstration's processes: started with a log each, watched, and ended by their own process id."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedmoe.runtime.errors import ExpectedError
from fedmoe.wire.client import CoordinatorClient

_STOP_SECONDS = 90.0


class DemoProcessError(ExpectedError):
    """A process ended that should not have; the message shows the end of its log."""


@dataclass(frozen=True)
class DemoProcess:
    """A started process and where its output goes."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    def check(self) -> bool:
        """Whether it is still running; raises if it ended with an error."""
        status = self.process.poll()
        if status is None:
            return True
        if status != 0:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-12:])
            raise DemoProcessError(f"{self.name} ended with status {status}; the end of {self.log}:\n{tail}")
        return False

    def stop(self) -> None:
        """Ask it to stop, and insist after a while."""
        if self.process.poll() is not None:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def start(name: str, arguments: Sequence[str], log: Path, niceness: int = 0) -> DemoProcess:
    """Start `fedmoe ARGUMENTS` in the background, with one torch thread, appending to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "fedmoe", *arguments]
    if niceness:
        command = ["nice", "-n", str(niceness), *command]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # One thread a process: they all compute at the same time, and the last bits are the same on every machine.
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A group of its own: Ctrl-C reaches the demonstration alone, which then stops all in order. No session of
            # its own: that would give every process an equal share of the cores, and niceness would mean nothing.
            process_group=0,
        )
    return DemoProcess(name, process, log)


def free_port() -> int:
    """A port on loopback that nobody listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_until_healthy(process: DemoProcess, url: str, seconds: float = 600.0) -> None:
    """Return once a server answers; raise if it ends or stays silent, far longer than a busy machine takes."""
    deadline = time.monotonic() + seconds
    with CoordinatorClient(url) as api:
        while not api.healthy():
            if not process.check() or time.monotonic() > deadline:
                raise DemoProcessError(f"the {process.name} did not answer within {seconds:.0f} s; see {process.log}")
            time.sleep(0.2)
