"""Taking weights from the coordinator, which is not trusted blindly: its client checks what it sends."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import structlog

from fedmoe.lora.manifest import Manifest
from fedmoe.models.parallel import ProcessGroup
from fedmoe.wire.client import CoordinatorClient, ExpectedWeights, PulledExpert

_log = structlog.get_logger("fedmoe.worker")


def pull(client: CoordinatorClient, expert: str, manifest: Manifest) -> PulledExpert:
    """The expert's newest version, if it fits this worker's model."""
    pulled = client.pull_expert(expert, expected=ExpectedWeights(manifest))
    assert pulled is not None, "without an ETag there is always an answer"
    _log.info("pulled", expert=pulled.name, version=pulled.version, digest=pulled.digest[:12])
    return pulled


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
