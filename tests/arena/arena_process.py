"""Arena runs in processes of their own, to be killed and started again on one folder.

They are forked from one process that has imported torch already, which saves seconds each.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from forks import FORKS, enter
from letters import LettersTask
from tiny_arena import write_config

from fedmoe.arena.config import ArenaConfig


def train(arguments: Sequence[str], log: str) -> None:
    """`fedmoe arena train` on the task of these tests, told into a file."""
    enter((log, log), os.environ | {"OMP_NUM_THREADS": "1"})
    import fedmoe.arena.run.run
    from fedmoe.cli import main

    setattr(fedmoe.arena.run.run, "make_task", lambda name, options: LettersTask())  # noqa: B010
    main(["arena", "train", *arguments])
    sys.stdout.flush()


@dataclass
class ArenaProcess:
    """Starts of one configuration; every start goes on in the same folder."""

    folder: Path
    config: ArenaConfig
    process: ForkServerProcess | None = None

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def start(self, *options: str) -> ForkServerProcess:
        file = write_config(self.folder.with_suffix(".toml"), self.config)
        arguments = [str(file), "--out", str(self.folder), "--resume", "--no-charts", "--no-tensorboard"]
        devices = ["--dtype", "fp32", "--rollout-device", "cpu", "--learner-device", "cpu"]
        self.process = FORKS.Process(target=train, args=([*arguments, *devices, *options], str(self.log)))
        self.process.start()
        return self.process

    def finish(self, seconds: float = 300) -> None:
        """Go on to the end."""
        process = self.start()
        process.join(seconds)
        assert process.exitcode == 0, self.told()

    def wait_for_iteration(self, number: int, told_before: int, seconds: float = 120) -> None:
        """Until this start has done an iteration of at least this number; `told_before` is the log's size before."""
        assert self.process is not None
        deadline = time.monotonic() + seconds
        while max(self.iterations(told_before), default=0) < number:
            assert self.process.is_alive() or self.iterations(told_before), self.told()
            if not self.process.is_alive():
                return
            assert time.monotonic() < deadline, self.told()
            time.sleep(0.005)

    @property
    def training_log(self) -> Path:
        return self.folder / "logs" / "training.log"

    def told_size(self) -> int:
        return self.training_log.stat().st_size if self.training_log.exists() else 0

    def iterations(self, told_before: int = 0) -> list[int]:
        """The iterations that the log tells of after its first `told_before` bytes."""
        if not self.training_log.exists():
            return []
        lines = self.training_log.read_bytes()[told_before:].decode().splitlines()
        words = [line.split() for line in lines if " iteration number=" in line]
        return [int(word.partition("=")[2]) for line in words for word in line if word.startswith("number=")]

    def told(self) -> str:
        """The end of what it said."""
        return self.log.read_text()[-3000:] if self.log.exists() else "nothing"

    def kill(self) -> bool:
        """SIGKILL; whether it met the process alive."""
        assert self.process is not None
        alive = self.process.is_alive()
        self.process.kill()
        self.process.join(60)
        return alive and self.process.exitcode == -9

    def end(self) -> None:
        """Leave nothing behind."""
        if self.process is not None and self.process.is_alive():
            self.kill()
