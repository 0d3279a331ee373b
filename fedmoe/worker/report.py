"""What a worker tells: log lines for its operator, records for whoever shows them."""

from __future__ import annotations

from pathlib import Path

import structlog

from fedmoe.qwen_worker import StepRecord
from fedmoe.record import RecordWriter
from fedmoe.wire.client import CoordinatorUnavailableError
from fedmoe.worker.delivery import Answered
from fedmoe.worker.outbox import Pending

_log = structlog.get_logger("fedmoe.worker")


class SyncReport:
    """Writes `metrics.jsonl` in the worker's state directory, and the log."""

    def __init__(self, state_dir: Path, worker: str, expert: str) -> None:
        self._records = RecordWriter(state_dir / "metrics.jsonl")
        self._worker = worker
        self._expert = expert
        self._staleness = 0

    def close(self) -> None:
        self._records.close()

    def step(self, record: StepRecord, version: int | None) -> None:
        """One training step on top of `version`."""
        self._records.write(
            "step",
            worker=self._worker,
            expert=self._expert,
            step=record.step,
            loss=record.loss,
            tokens=record.tokens,
            tokens_per_second=record.tokens / record.seconds if record.seconds > 0 else None,
            learning_rate=record.learning_rate,
            grad_norm=record.grad_norm,
            version=version,
            staleness=self._staleness,
        )

    def answered(self, pending: Pending, answer: Answered) -> None:
        """What became of an update."""
        sequence, loss = pending.header.sequence, pending.header.loss
        result, refused = answer.result, answer.refused
        if result is None:
            _log.warning("refused", sequence=sequence, code=refused and refused.code, reason=str(refused))
            return
        self._staleness = result.staleness
        digest = (answer.newest.digest if answer.newest else result.digest)[:12]
        _log.info(
            "pushed",
            sequence=sequence,
            version=result.version,
            staleness=result.staleness,
            duplicate=result.duplicate,
            digest=digest,
            bytes=len(pending.body),
            loss=None if loss is None else round(loss, 4),
            seconds=round(answer.seconds, 3),
        )
        self._records.write(
            "push",
            worker=self._worker,
            expert=self._expert,
            sequence=sequence,
            version=result.version,
            staleness=result.staleness,
            digest=digest,
            bytes=len(pending.body),
            loss=loss,
            seconds=answer.seconds,
        )

    def away(self, error: CoordinatorUnavailableError) -> None:
        """A try that was not answered; called from the delivery's thread."""
        _log.warning("coordinator_away", reason=str(error), retry_after=error.retry_after)
