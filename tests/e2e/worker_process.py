"""Workers as processes: started by the command line, killed, and started again.

Most are forked from one process that has imported torch already, which saves three seconds each.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from crash_load import read_journal
from forks import FORKS, Fork, enter
from support import CoordinatorProcess

from fedmoe.federation.events import UpdateAccepted

Line = dict[str, object]


def write_dataset(file: Path, rows: int = 40) -> Path:
    """Rows that a tiny model can learn a little of."""
    lines = [json.dumps({"prompt": f"{n} and one is ", "completion": f"{n + 1}"}) for n in range(rows)]
    file.write_text("\n".join(lines) + "\n")
    return file


@dataclass
class WorkerProcess:
    """One worker of a coordinator; every start continues on the same state directory."""

    coordinator: CoordinatorProcess
    folder: Path
    steps: int
    name: str = "w1"
    options: Sequence[str] = ()
    log: Path = field(init=False)
    process: Fork | None = None

    def __post_init__(self) -> None:
        self.log = self.folder / f"{self.name}.log"
        self.dataset = write_dataset(self.folder / f"{self.name}.jsonl")

    @property
    def state_dir(self) -> Path:
        return self.folder / self.name

    def arguments(self) -> list[str]:
        return [
            *("worker", "--coordinator-url", self.coordinator.url, "--worker-id", self.name, "--specialty", "python"),
            *("--dataset", str(self.dataset), "--state-dir", str(self.state_dir), "--base-model", "tiny"),
            *("--dtype", "fp32", "--device", "cpu", "--max-length", "32", "--lora-r", "4", "--sync-interval", "0.05"),
            *("--max-steps", str(self.steps), *self.options),
        ]

    def start(self, launcher: Sequence[str] = ("-m", "fedmoe")) -> Fork:
        """Start it with another program, or with all that an operator may say."""
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self.process = Fork([*launcher, *self.arguments()], self.log, environment=environment)
        return self.process

    def fork(
        self, failpoints: str = "", environment: Mapping[str, str] | None = None
    ) -> multiprocessing.process.BaseProcess:
        """The same, from the process that is warm already."""
        arguments = (self.arguments(), failpoints, dict(environment or {}), str(self.log))
        process = FORKS.Process(target=run_command, args=arguments)
        process.start()
        return process

    def lines(self, event: str | None = None) -> list[Line]:
        """What it logged, of all its runs."""
        lines = []
        for text in self.log.read_bytes().splitlines() if self.log.exists() else []:
            if text.startswith(b"{") and text.endswith(b"}"):
                line = json.loads(text)
                if event is None or line["event"] == event:
                    lines.append(line)
        return lines

    def wait_for(self, condition: Callable[[], bool], seconds: float = 40.0) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline or (self.process is not None and self.process.poll() is not None):
                raise AssertionError(f"it did not come about; the log ends: {self.log.read_text()[-3000:]}")
            time.sleep(0.02)

    def end(self) -> None:
        """Kill it, if a test left it running."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(20)


def run_command(arguments: list[str], failpoints_text: str, environment: dict[str, str], log: str) -> None:
    """The command line in a forked process, its output appended to a file."""
    enter((log, log), os.environ | environment | {"FEDMOE_FAILPOINTS": failpoints_text})
    from fedmoe.cli import main

    main(arguments)


def assert_exactly_once(workers: Sequence[WorkerProcess], state_dir: Path) -> list[UpdateAccepted]:
    """Every update a worker was told of is in the journal once, no number is missing, and none was used twice."""
    updates = [event for event in read_journal(state_dir) if isinstance(event, UpdateAccepted)]
    for worker in workers:
        mine = [update for update in updates if update.worker == worker.name]
        assert [update.sequence for update in mine] == list(range(len(mine)))
        assert len({update.epoch for update in mine}) == 1
        versions = {update.sequence: update.version for update in mine}
        told = {(line["sequence"], line["version"]) for line in worker.lines("pushed")}
        assert told <= set(versions.items())
        assert not worker.lines("refused")
        assert b"Traceback" not in worker.log.read_bytes()
        assert mine[-1].info["steps"] == worker.steps
    return updates
