"""How a worker fails: its errors, failures that all processes of a group share, and devices that break."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import structlog

from fedmoe.models.device_faults import device_fault
from fedmoe.models.parallel import ProcessGroup

Result = TypeVar("Result")
_log = structlog.get_logger("fedmoe.worker")


class WorkerFailedError(Exception):
    """The worker cannot go on; what it learned is saved, and the message says what to do."""


class DeviceFailedError(WorkerFailedError):
    """The device has no memory left or is broken."""


class DivergedError(WorkerFailedError):
    """Loss, gradient or weights are not finite, again and again."""


def on_rank_zero(group: ProcessGroup, act: Callable[[], Result]) -> Result | None:
    """The result of `act` on rank 0, None elsewhere; all ranks call it, and all raise if `act` fails on rank 0."""
    result, failure = None, None
    if group.rank == 0:
        try:
            result = act()
        except Exception as error:
            failure = error
    if group.flag(failure is not None):
        raise failure or WorkerFailedError("process 0 of this group cannot go on; its message says why")
    return result


def device_failure(error: RuntimeError | MemoryError, step: int, save: Callable[[], None] | None) -> Exception:
    """The error to end with: `error` itself if it is not the device's, else one that says what was saved.

    `save` is None where other processes of a group may not have failed, and would not save with this one.
    """
    fault = device_fault(error)
    if fault is None:
        return error
    kept = "the next start goes on from the newest checkpoint"
    try:
        if save is not None:
            save()
            kept = f"step {step} is saved"
    except (RuntimeError, MemoryError) as lost:
        _log.warning("not_saved", reason=str(lost)[:300])
    _log.error("device_failed", reason=fault, kept=kept, step=step)
    return DeviceFailedError(f"{fault}. Nothing broken was pushed; {kept}")
