"""What becomes of a worker whose device fails: it saves what the device still gives, says so, and ends."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from fedmoe.models.device_faults import device_fault
from fedmoe.worker.pull import DeviceFailedError

_log = structlog.get_logger("fedmoe.worker")


def device_failure(error: RuntimeError | MemoryError, step: int, save: Callable[[], None] | None) -> Exception:
    """The error to end with: `error` itself if it is not the device's, else one that tells what was saved.

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
