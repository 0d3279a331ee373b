"""A worker's reports: log lines, phases before the first step, records, and the held-out losses that it sends."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import structlog

from fedmoe.qwen_worker import EvaluationRecord, StepRecord
from fedmoe.runtime.records import Recorder, RecordWriter
from fedmoe.runtime.sinks import WatchedWriter
from fedmoe.runtime.trackers import open_trackers
from fedmoe.wire.client import CoordinatorUnavailableError, PulledExpert
from fedmoe.wire.contract.messages import HELD_OUT, StatisticRequest, UpdateResult
from fedmoe.wire.delivery import DeliveryOutcome
from fedmoe.wire.outbox import PendingUpdate
from fedmoe.worker.pace import Pace
from fedmoe.worker.recovery import WorkerSyncPoint

_log = structlog.get_logger("fedmoe.worker")
_HELD = "the coordinator keeps it until an administrator decides; training goes on without it and nothing is sent twice"
Phase = Literal["loading the base model", "preparing data", "statistics of the data", "held-out loss", "training"]
_SECONDS_WITHOUT_A_LINE = 5.0
_MOST_SECONDS_WITHOUT_A_LINE = 60.0


class WorkerReport:
    """Writes `metrics.jsonl` in the worker's state directory, and the log.

    `steps` is how many there will be in all, None without an end; `report_to` names trackers that get records too.
    """

    def __init__(
        self, state_dir: Path, worker: str, expert: str, steps: int | None = None, report_to: str = ""
    ) -> None:
        records = RecordWriter(state_dir / "metrics.jsonl")
        trackers = open_trackers(report_to, worker, state_dir)
        self._records: Recorder = WatchedWriter(records, trackers) if trackers else records
        self._worker = worker
        self._expert = expert
        self._pace = Pace(steps)
        self._staleness = 0
        self._newest: EvaluationRecord | None = None
        self._under_way: EvaluationRecord | None = None
        self._statuses: dict[int, str] = {}
        self._notes: set[str] = set()
        self._line_at = time.monotonic()
        self._silence = _SECONDS_WITHOUT_A_LINE

    def close(self) -> None:
        self._records.close()

    def step(self, record: StepRecord, version: int) -> None:
        """One training step on top of `version`.

        The first one is logged, and later ones after 5 s without a line, then 10, 20, 40 and 60.
        """
        first = self._pace.newest is None
        self._pace.add(record)
        if first or time.monotonic() - self._line_at >= self._silence:
            if not first:
                self._silence = min(2 * self._silence, _MOST_SECONDS_WITHOUT_A_LINE)
            self._line_at = time.monotonic()
            loss = round(record.loss, 4) if math.isfinite(record.loss) else None
            _log.info("step", **self._progress(), loss=loss)
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

    def measuring(self, done: int, total: int) -> None:
        """So many held-out blocks of `total` are measured; logged where nothing else was for a while."""
        now = time.monotonic()
        if now - self._line_at >= _SECONDS_WITHOUT_A_LINE:
            self._line_at = now
            log_phase("held-out loss", done, total)

    def evaluated(self, record: EvaluationRecord, version: int, stopped: bool) -> None:
        """The held-out loss of the weights on top of `version`; `stopped` says that it ends the training."""
        self._newest = record
        shown = {"loss": round(record.loss, 4), "first": round(record.first, 4), "best": round(record.best, 4)}
        self._line_at = time.monotonic()
        _log.info("held_out", step=record.step, **shown, tokens=record.tokens, seconds=round(record.seconds, 2))
        if stopped:
            reason = f"held-out loss not lower {record.worse} times in a row"
            _log.info("stopped_early", step=record.step, reason=reason)
        measured = {**asdict(record), "version": version, "stopped": stopped}
        self._records.write("held_out", worker=self._worker, expert=self._expert, **measured)

    def fact(self) -> StatisticRequest | None:
        """The newest held-out loss, for the coordinator to get with an update that lands; None without one."""
        self._under_way = record = self._newest
        if record is None or not math.isfinite(record.loss):
            return None
        values = {"step": record.step, "loss": record.loss, "first": record.first, "best": record.best}
        numbers = {name: float(value) for name, value in values.items() if math.isfinite(value)}
        numbers |= {"tokens": float(record.tokens)}
        return StatisticRequest(expert=self._expert, worker=self._worker, kind=HELD_OUT, values=numbers)

    def answered(self, pending: PendingUpdate, answer: DeliveryOutcome) -> None:
        """What became of an update."""
        sequence, loss = pending.header.sequence, pending.header.loss
        result, refused = answer.result, answer.refused
        if result is None:
            _log.warning("refused", sequence=sequence, code=refused and refused.code, reason=str(refused))
            if refused is not None and refused.code == "other_history" and answer.newest is not None:
                again = f"all that was learned since version {pending.header.base_version} and not acknowledged"
                if pending.header.tokens:
                    again += f", {pending.header.tokens} tokens of update {sequence}"
                _warn_of_other_history(pending.header.incarnation, answer.newest, again)
            return
        self._report_outcomes(result)
        if answer.held:
            _log.warning("quarantined", sequence=sequence, held=result.held, reason=result.note, meaning=_HELD)
            return
        if result.note and result.note not in self._notes:
            self._notes.add(result.note)
            _log.warning("coordinator_warns", sequence=sequence, note=result.note)
        self._staleness = result.staleness
        if self._newest is self._under_way:
            self._newest = None
        pushed: dict[str, int | str] = {
            "sequence": sequence,
            "version": result.version,
            "staleness": result.staleness,
            "digest": (answer.newest.digest if answer.newest else result.digest)[:12],
            "bytes": len(pending.body),
        }
        shown, seconds = None if loss is None else round(loss, 4), round(answer.seconds, 3)
        self._line_at = time.monotonic()
        _log.info("pushed", **self._progress(), **pushed, duplicate=result.duplicate, loss=shown, seconds=seconds)
        measured = {**pushed, "loss": loss, "seconds": answer.seconds}
        self._records.write("push", worker=self._worker, expert=self._expert, **measured)

    def _progress(self) -> dict[str, int]:
        """How far training is, at which pace, and in how many seconds it ends; what is not known is left out."""
        pace, record = self._pace, self._pace.newest
        values = {
            "step": record.step if record else None,
            "steps": pace.steps,
            "tokens_per_second": pace.tokens_per_second,
            "seconds_left": pace.seconds_left,
        }
        return {name: round(value) for name, value in values.items() if value is not None}

    def _report_outcomes(self, result: UpdateResult) -> None:
        """What became of updates that were held, each once."""
        for outcome in result.outcomes:
            if self._statuses.get(outcome.held) != outcome.status:
                self._statuses[outcome.held] = outcome.status
                values = outcome.model_dump(include={"sequence", "held", "version", "reason"}, exclude_none=True)
                if outcome.status != "held":
                    _log.warning(f"held_update_{outcome.status}", **values)


def warn_of_absence(error: CoordinatorUnavailableError) -> None:
    """Log a try that was not answered; called from the delivery's thread."""
    _log.warning("coordinator_away", reason=str(error), retry_after=error.retry_after)


def warn_of_other_history(saved: WorkerSyncPoint, newest: PulledExpert) -> None:
    """Log a warning if a checkpoint was made in another history than the one that its worker continues with."""
    if saved.incarnation is not None and saved.incarnation != newest.incarnation:
        again = f"{saved.progress.steps} steps, {saved.progress.tokens} tokens that no update has carried"
        _warn_of_other_history(saved.incarnation, newest, again)


def _warn_of_other_history(was: str | None, newest: PulledExpert, again: str) -> None:
    histories = {"was": was, "now": newest.incarnation, "goes_on_from": newest.version}
    _log.warning("other_history", expert=newest.name, **histories, sends_again=again)


class PhaseLog:
    """Logs the progress of a phase at each tenth of it, whatever the time."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._logged = -1

    def update(self, done: int, total: int) -> None:
        """Log a line if another tenth of `total` is done."""
        tenth = 10 * done // total if total else 10
        if tenth > self._logged:
            self._logged = tenth
            log_phase(self._phase, done, total)


def log_phase(phase: Phase, done: int | None = None, total: int | None = None) -> None:
    """Log that a phase begins, or how much of it is done."""
    numbers = {"done": done, "total": total}
    _log.info("phase", phase=phase, **{name: number for name, number in numbers.items() if number is not None})
