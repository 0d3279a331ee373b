"""What one process of a group does for all of them, so that its failure is everybody's and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from fedmoe.models.parallel import ProcessGroup

Result = TypeVar("Result")


class WorkerFailedError(Exception):
    """The worker cannot go on; what it learned is saved, and the message says what to do."""


class DeviceFailedError(WorkerFailedError):
    """The device has no memory left or is broken."""


class DivergedError(WorkerFailedError):
    """Training gave numbers that are none, again and again."""


def on_rank_zero(group: ProcessGroup, act: Callable[[], Result]) -> Result | None:
    """What `act` gives on rank 0, None elsewhere; all ranks call it, and all raise if `act` fails on rank 0."""
    result, failure = None, None
    if group.rank == 0:
        try:
            result = act()
        except Exception as error:
            failure = error
    if group.flag(failure is not None):
        raise failure or WorkerFailedError("process 0 of this group cannot go on; its message says why")
    return result
