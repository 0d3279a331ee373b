"""Restarts: training is resumed from the newest checkpoint, and changed data are refused or logged."""

from __future__ import annotations

from pathlib import Path

import structlog

from fedmoe.datasets.readers.common import DataError
from fedmoe.datasets.tokens.packing import BlockSampler
from fedmoe.datasets.tokens.sample_hashes import SampleHashes
from fedmoe.models.data_hashes import check_data_change
from fedmoe.models.parallel import ProcessGroup
from fedmoe.models.worker_state import has_state, peek_values
from fedmoe.qwen_worker import QwenWorker
from fedmoe.worker.failures import WorkerFailedError
from fedmoe.worker.progress import WorkerSyncPoint

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
