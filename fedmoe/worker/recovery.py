"""Failure and restart of a worker: its errors, progress not yet sent, and the checkpoint it is resumed from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self, TypeVar

import structlog

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.packing import BlockSampler
from fedmoe.lora.adapter import FloatVector
from fedmoe.models.data_hashes import SampleHashes, check_data_change
from fedmoe.models.device_faults import device_fault
from fedmoe.models.parallel import ProcessGroup
from fedmoe.models.worker_state import has_state, peek_values
from fedmoe.qwen_worker import CheckpointExtras, QwenWorker

Result = TypeVar("Result")
_log = structlog.get_logger("fedmoe.worker")
_REFERENCE = "reference"


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
    saved = "the next start resumes the newest checkpoint"
    try:
        if save is not None:
            save()
            saved = f"step {step} is saved"
    except (RuntimeError, MemoryError) as lost:
        _log.warning("not_saved", reason=str(lost)[:300])
    _log.error("device_failed", reason=fault, kept=saved, step=step)
    return DeviceFailedError(f"{fault}. Nothing broken was pushed; {saved}")


@dataclass(frozen=True, slots=True)
class Progress:
    """Optimizer steps, the labelled tokens in them, and their summed loss in nats, for an update's header."""

    steps: int = 0
    tokens: int = 0
    nats: float = 0.0

    @property
    def mean_loss(self) -> float | None:
        """Nats per token; None without tokens."""
        return self.nats / self.tokens if self.tokens else None

    def __add__(self, other: Progress) -> Progress:
        return Progress(self.steps + other.steps, self.tokens + other.tokens, self.nats + other.nats)


@dataclass(frozen=True)
class WorkerSyncPoint:
    """Where the sync stands in a checkpoint: what no update has carried is the local weights minus `reference`.

    That holds while the next update's number is `next_sequence`; a later update carried it. `absorbed` is the number
    of a refused update whose content is part of the local weights again. `incarnation` names the history that
    `reference` is of; None in a checkpoint of an older program.
    """

    reference: FloatVector
    next_sequence: int
    progress: Progress
    absorbed: int | None = None
    incarnation: str | None = None

    def extras(self) -> CheckpointExtras:
        """As a checkpoint keeps it."""
        steps, tokens, nats = self.progress.steps, self.progress.tokens, self.progress.nats.hex()
        texts = {"next_sequence": self.next_sequence, "steps": steps, "tokens": tokens, "nats": nats}
        texts |= {"absorbed": self.absorbed, "incarnation": self.incarnation}
        entries = {name: str(value) for name, value in texts.items() if value is not None}
        return CheckpointExtras(entries, {_REFERENCE: self.reference})

    @classmethod
    def of(cls, extras: CheckpointExtras | None) -> Self | None:
        """What a checkpoint kept; None without one, or for a process that does not talk to the coordinator."""
        if extras is None or _REFERENCE not in extras.vectors:
            return None
        texts = extras.texts
        progress = Progress(int(texts["steps"]), int(texts["tokens"]), float.fromhex(texts["nats"]))
        absorbed = int(texts["absorbed"]) if "absorbed" in texts else None
        return cls(
            extras.vectors[_REFERENCE], int(texts["next_sequence"]), progress, absorbed, texts.get("incarnation")
        )


def check_data(
    checkpoints: Path, sampler: BlockSampler, hashes: SampleHashes, allow_changed_data: bool, group: ProcessGroup
) -> None:
    """Refuse changed data before the long work, as `resume_worker` would, by this process's checkpoint."""
    if not has_state(checkpoints):
        return
    values = peek_values(checkpoints, group.rank)
    if sampler.fits({name: int(str(value)) for name, value in values["sampler"].items()}):
        return
    try:
        check_data_change(checkpoints, values.get("data", {}), hashes, allow_changed_data)
    except DataError as error:
        raise _refusal(error, checkpoints) from error


def _refusal(error: DataError, checkpoints: Path) -> WorkerFailedError:
    return WorkerFailedError(
        f"{error}. Or move {checkpoints} away to begin anew under the same identity, or choose another --state-dir"
    )


def resume_worker(worker: QwenWorker, checkpoints: Path, allow_changed_data: bool) -> WorkerSyncPoint | None:
    """Restore the newest checkpoint, if there is one, and warn of other data; all ranks call it."""
    try:
        extras = worker.restore(checkpoints, allow_changed_data)
    except DataError as error:
        raise _refusal(error, checkpoints) from error
    if extras is not None:
        _log.info("restored", step=worker.step)
    if worker.new_order and worker.expert.group.rank == 0:
        change, counts, what = worker.data_change, {}, "they cannot be compared with those of the checkpoint"
        if change is not None:
            counts = {"kept": change.unchanged, "new": change.new, "gone": change.missing}
            what = "samples are gone or changed" if change.missing else "they grew" if change.new else "another order"
        note = "weights, moments and step are kept; a new epoch"
        _log.warning("data_changed", what=what, **counts, step=worker.step, note=note)
    if worker.measured_anew and worker.expert.group.rank == 0:
        _log.warning("held_out_changed", note="first and lowest loss, and the count of early stopping, begin anew")
    return WorkerSyncPoint.of(extras)
