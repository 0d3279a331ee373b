"""Run-time options: output folder, devices, observers, stop flag."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from fedmoe.arena.run.batched_records import BatchedRecords
from fedmoe.runtime.errors import ExpectedError
from fedmoe.runtime.records import Recorder


class RunError(ExpectedError, RuntimeError):
    """A run that cannot begin where and as it was asked to."""


#: Given the writer of records, the run's folder and its memory limit in bytes: the writer to use instead.
Watch = Callable[[BatchedRecords, Path, Callable[[], int]], AbstractContextManager[Recorder]]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Where and on what a run computes; nothing of it changes what is computed, but for the last bits.

    `memory_limit_gb` None is the default of 32 GiB, or what there is. `resume` goes on from the newest checkpoint.
    `ray_address` None starts a Ray cluster of the run's own, where it has actors.
    """

    folder: Path
    resume: bool = False
    memory_limit_gb: float | None = None
    gpu_memory_limit_gb: float | None = None
    allow_network_fs: bool = False
    rollout_device: str = "auto"
    learner_device: str = "auto"
    dtype: str = "auto"
    token: str | None = None
    ray_address: str | None = None


class Stop:
    """A request to end in order; the reason goes into the report."""

    def __init__(self) -> None:
        self.reason = ""

    def ask(self, reason: str) -> None:
        """End after the iteration being made, with a checkpoint."""
        self.reason = self.reason or reason
