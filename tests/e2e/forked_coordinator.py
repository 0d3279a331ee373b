"""Coordinators forked from a process that has loaded everything, so that a thousand starts can be tried."""

from __future__ import annotations

import json
import os
import select
import struct
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from support import CoordinatorProcess

_NURSERY = Path(__file__).with_name("nursery.py")


class Child:
    """A forked coordinator, with what of `subprocess.Popen` is used of it."""

    def __init__(self, pid: int, nursery: subprocess.Popen[str]) -> None:
        self.pid = pid
        self._nursery = nursery
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._within(0.0)

    def wait(self, timeout: float) -> int:
        status = self._within(timeout)
        if status is None:
            raise subprocess.TimeoutExpired(f"coordinator {self.pid}", timeout)
        return status

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def _within(self, seconds: float) -> int | None:
        output = self._nursery.stdout
        assert output is not None
        if self._status is None and select.select([output], [], [], seconds)[0]:
            self._status = int(output.readline())
        return self._status


@dataclass
class ForkedCoordinator(CoordinatorProcess):
    """A coordinator process like any other, except that its program was loaded before it began."""

    nursery: subprocess.Popen[str] | None = None

    @property
    def clock(self) -> Path:
        return self.state_dir.parent / "clock"

    def set_clock(self, seconds: float) -> None:
        """So many seconds ahead of the right time, from now on and in all later starts."""
        with self.clock.open("r+b" if self.clock.exists() else "wb") as file:  # the same file: it is mapped
            file.write(struct.pack("d", seconds))

    def launch(self, failpoints: str) -> Child:  # type: ignore[override]
        if self.nursery is None:
            self.set_clock(0.0)
            self.nursery = subprocess.Popen(
                [sys.executable, str(_NURSERY), str(self.clock)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                bufsize=1,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        assert self.nursery.stdin is not None
        assert self.nursery.stdout is not None
        request = {"arguments": self.command()[3:], "failpoints": failpoints, "log": str(self.log)}
        print(json.dumps(request), file=self.nursery.stdin, flush=True)
        return Child(int(self.nursery.stdout.readline()), self.nursery)

    def close(self) -> None:
        """End the coordinator and the process it is forked from."""
        if self.process is not None:
            self.kill()
        if self.nursery is not None:
            with self.nursery as nursery:
                assert nursery.stdin is not None
                nursery.stdin.close()
                nursery.wait(20)
