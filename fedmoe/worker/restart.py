"""Restarts: progress not yet sent, kept in the checkpoint that training is resumed from; changed data are refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import structlog

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.packing import BlockSampler
from fedmoe.datasets.tokens.sample_hashes import SampleHashes
from fedmoe.lora.adapter import FloatVector
from fedmoe.models.data_hashes import check_data_change
from fedmoe.models.parallel import ProcessGroup
from fedmoe.models.worker_state import has_state, peek_values
from fedmoe.qwen_worker import CheckpointExtras, QwenWorker, StepRecord
from fedmoe.worker.failures import WorkerFailedError

_REFERENCE = "reference"


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

    def after(self, record: StepRecord) -> Progress:
        """With one more step."""
        return self + Progress(1, record.tokens, record.loss * record.tokens)

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

    def companion(self) -> CheckpointExtras:
        """As a checkpoint keeps it."""
        progress = self.progress
        texts = {
            "next_sequence": str(self.next_sequence),
            "steps": str(progress.steps),
            "tokens": str(progress.tokens),
            "nats": progress.nats.hex(),
        }
        if self.absorbed is not None:
            texts["absorbed"] = str(self.absorbed)
        if self.incarnation is not None:
            texts["incarnation"] = self.incarnation
        return CheckpointExtras(texts, {_REFERENCE: self.reference})

    @classmethod
    def of(cls, companion: CheckpointExtras | None) -> Self | None:
        """What a checkpoint kept; None without one, or for a process that does not talk to the coordinator."""
        if companion is None or _REFERENCE not in companion.vectors:
            return None
        texts = companion.texts
        progress = Progress(int(texts["steps"]), int(texts["tokens"]), float.fromhex(texts["nats"]))
        absorbed = int(texts["absorbed"]) if "absorbed" in texts else None
        incarnation = texts.get("incarnation")
        return cls(companion.vectors[_REFERENCE], int(texts["next_sequence"]), progress, absorbed, incarnation)


_log = structlog.get_logger("fedmoe.worker")


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
    """Restore the newest checkpoint, if there is one, and tell of other data; all ranks call it."""
    try:
        companion = worker.restore(checkpoints, allow_changed_data)
    except DataError as error:
        raise _refusal(error, checkpoints) from error
    if companion is not None:
        _log.info("restored", step=worker.step)
    if worker.new_order and worker.expert.group.rank == 0:
        _tell(worker)
    if worker.measured_anew and worker.expert.group.rank == 0:
        _log.warning("held_out_changed", note="first and lowest loss, and the count of early stopping, begin anew")
    return WorkerSyncPoint.of(companion)


def _tell(worker: QwenWorker) -> None:
    change = worker.data_change
    if change is None:
        counts: dict[str, int] = {}
        what = "they cannot be compared with those of the checkpoint"
    else:
        counts = {"kept": change.kept, "new": change.new, "gone": change.gone}
        what = "samples are gone or changed" if change.gone else "they grew" if change.new else "another order"
    _log.warning(
        "data_changed", what=what, **counts, step=worker.step, note="weights, moments and step are kept; a new epoch"
    )
