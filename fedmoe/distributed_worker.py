"""`DistributedWorker`: trains in step with a coordinator: pull, train, push the change, rebase onto the newest version.

    training thread                          delivery thread
    ---------------                          ---------------
    pull the expert -> base, local
    train for sync_interval
    cut: delta = local - base, on disk  -->  push (again and again until answered)
    train on                                   |
    answer there?  <---------------------------+
    rebase: local = newest + (local - reference)

One update is under way at a time. While it is, training goes on, at most `max_unsynced` seconds after the cut. The
reference is what the coordinator knows of the local weights: the base, or after a cut the base + the delta as it
travelled. Measuring from there keeps what int8 or bf16 rounded away in the local weights, so the next delta carries it
(error feedback without a buffer).

Weights that are pulled travel in the same precision, and the base is what was decoded. Deltas are taken from that base,
so its rounding is in no update; the next answer to a push, always in float32, takes it out of the local weights too.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import WireDtype, decode, encode
from fedmoe.qwen_finetune import NonFiniteError
from fedmoe.qwen_worker import CheckpointExtras, EvaluationRecord, QwenWorker, StepRecord
from fedmoe.runtime import failpoints
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, ExpectedWeights, PulledExpert
from fedmoe.wire.contract.messages import StartFrom, StatisticRequest, UpdateHeader
from fedmoe.wire.delivery import Delivery, DeliveryOutcome
from fedmoe.wire.outbox import Outbox, PendingUpdate
from fedmoe.worker.recovery import (
    DivergedError,
    Progress,
    WorkerFailedError,
    WorkerSyncPoint,
    device_failure,
    on_rank_zero,
    resume_worker,
)
from fedmoe.worker.report import WorkerReport, warn_of_absence, warn_of_other_history

__all__ = ["DistributedWorker", "SyncSettings", "WorkerFailedError"]

_log = structlog.get_logger("fedmoe.worker")

_CHECKPOINT_SECONDS = 60.0
# Supervisors kill half a minute after they asked to stop (torchrun, Kubernetes).
_LAST_WAIT_SECONDS = 20.0
_TICK_SECONDS = 0.2
_NON_FINITE_LIMIT = 5


@dataclass(frozen=True, slots=True)
class SyncSettings:
    """How a worker syncs: intervals in seconds, wire precision, the start it asks for; trackers that it reports to."""

    worker: str
    expert: str
    sync_interval: float = 10.0
    max_unsynced: float = 600.0
    wire_dtype: WireDtype = "fp32"
    start_from: StartFrom | None = None
    allow_changed_data: bool = False
    report_to: str = ""


class DistributedWorker:
    """Trains one expert on local data and keeps it in step with the coordinator; rank 0 of several talks to it.

    `state_dir` keeps identity, checkpoints and metrics; `outbox` is the one in that folder, None on ranks above 0.
    """

    def __init__(
        self,
        worker: QwenWorker,
        client: CoordinatorClient,
        settings: SyncSettings,
        state_dir: Path,
        outbox: Outbox | None,
        on_step: Callable[[StepRecord], None] = lambda _: None,
        on_registered: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.worker = worker
        self._client, self._settings = client, settings
        self._state_dir, self._checkpoints = state_dir, state_dir / "checkpoint"
        self._group = worker.expert.group
        self._talks = self._group.rank == 0
        self._outbox = outbox
        report = (settings.worker, settings.expert, worker.expert.training.max_steps or None, settings.report_to)
        self._report = WorkerReport(state_dir, *report) if self._talks else None
        self._on_step, self._on_registered, self._clock = on_step, on_registered, clock
        self._stop = threading.Event()
        self._delivery: Delivery | None = None
        self._base: PulledExpert | None = None
        self._reference: FloatVector | None = None
        self._interval = settings.sync_interval
        self._cut_at = self._saved_at = clock()
        self._progress = self._under_way = Progress()
        self._non_finite = 0

    def stop(self) -> None:
        """Ask the loop to push what it has, save and leave; safe to call from a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Train and sync until `stop`, the end of the schedule, or a refusal that cannot be cured.

        All ranks call it, once. Leaves the state directory such that the next start continues.
        """
        try:
            if self._join():
                while not self._group.flag(self._stop.is_set() or self.worker.finished):
                    self._train()
                    self._absorb_answer()
                    on_rank_zero(self._group, self._send_if_due)
                    if self._group.flag(self._clock() - self._saved_at > _CHECKPOINT_SECONDS):
                        self._save()
                self._leave()
        except OSError as error:
            raise WorkerFailedError(f"{error.filename or self._state_dir}: {error.strerror or error}") from error
        finally:
            if self._delivery is not None:
                self._delivery.close()
            if self._report is not None:
                self._report.close()

    def _join(self) -> bool:
        """Register, take up where the last run was, deliver what it left, pull; False if asked to stop meanwhile."""
        on_rank_zero(self._group, self._register)
        saved = resume_worker(self.worker, self._checkpoints, self._settings.allow_changed_data)
        answer = on_rank_zero(self._group, lambda: self._deliver_leftover(saved))
        returned = answer is not None and answer.returned
        if self._group.flag(self._talks and self._box.pending is not None and not returned):
            return False
        newest = on_rank_zero(self._group, self._pull)
        self.worker.load(self._starting_weights(newest, saved, returned) if newest else None)
        self._base, self._reference = newest, newest.weights if newest else None
        if self._group.flag(returned):
            self._restore_refused()
        self._cut_at = self._clock()
        return True

    def _register(self) -> None:
        least = self._client.federation().min_sync_interval
        if least > self._interval:
            _log.warning("sync_interval_raised", asked=self._interval, least=least)
            self._interval = least
        asked = self._settings
        info = self._client.register(asked.expert, asked.worker, self.worker.manifest, start_from=asked.start_from)
        _log.info("registered", expert=info.name, version=info.version, digest=info.digest[:12])
        self._on_registered()

    def _pull(self) -> PulledExpert:
        settings, expected = self._settings, ExpectedWeights(self.worker.manifest)
        pulled = self._client.pull_expert(settings.expert, dtype=settings.wire_dtype, expected=expected)
        assert pulled is not None, "without an ETag there is always an answer"
        _log.info("pulled", expert=pulled.name, version=pulled.version, digest=pulled.digest[:12])
        return pulled

    def _start_delivery(self, pending: PendingUpdate, fact: StatisticRequest | None) -> None:
        manifest, dtype = self.worker.manifest, self._settings.wire_dtype
        self._delivery = Delivery(self._client, pending, warn_of_absence, fact, manifest, dtype, self._base)

    def _deliver_leftover(self, saved: WorkerSyncPoint | None) -> DeliveryOutcome | None:
        """What became of the update an earlier run left; None if it left none, or when asked to stop meanwhile."""
        pending = self._box.pending
        if pending is None:
            return None
        if saved is not None and saved.absorbed == pending.header.sequence:
            # Refused, and taken back into the checkpoint, just before that run was killed.
            self._box.settle()
            return None
        _log.info("delivering", sequence=pending.header.sequence)
        self._start_delivery(pending, None)
        self._await_answer(self._settings.max_unsynced)
        answer = self._reported_answer()
        if answer is None:
            self._report_undelivered()
            return None
        if answer.refused is not None and answer.newest is None:
            if answer.poisoned:
                self._box.settle()
            raise answer.refused
        if not answer.returned:
            self._box.settle()
        self._delivery = None
        return answer

    def _starting_weights(self, newest: PulledExpert, saved: WorkerSyncPoint | None, returned: bool) -> FloatVector:
        """The newest version, plus what the checkpoint holds that no update has carried, plus a refused update."""
        start = newest.weights
        if saved is not None and saved.next_sequence == self._box.next_sequence:
            warn_of_other_history(saved, newest)
            start = start + (self.worker.weights() - saved.reference)
            self._progress = saved.progress
        if returned:
            pending = self._require_pending()
            start = start + decode(pending.body, self.worker.manifest.layout).flat
            tokens = pending.header.tokens or 0
            self._progress += Progress(1, tokens, (pending.header.loss or 0.0) * tokens)
        return start

    def _train(self) -> None:
        """Train until a push is due, an answer has come, or training may not go on without one."""
        delivery, since_cut = self._delivery, self._clock() - self._cut_at
        seconds = self._interval - since_cut
        if delivery is not None:
            seconds = min(self._interval, self._settings.max_unsynced - since_cut)
        if self._group.flag(delivery is not None and since_cut >= self._settings.max_unsynced):
            if delivery is not None:
                delivery.wait(_TICK_SECONDS)
            return

        def interrupted() -> bool:
            return self._stop.is_set() or (delivery is not None and delivery.over)

        # Where one step takes longer than the interval, there is still one step between two pushes.
        one_step = self._group.flag(seconds <= 0)
        try:
            seconds, steps = (math.inf, 1) if one_step else (seconds, None)
            self.worker.train_for(seconds, interrupted, self._step_done, steps, self._evaluated, self._measuring)
        except NonFiniteError as error:
            self._skip_batch(error)
        except (RuntimeError, MemoryError) as failed:
            save = self._save if self._group.world_size == 1 else None
            raise device_failure(failed, self.worker.step, save) from failed

    def _skip_batch(self, error: NonFiniteError) -> None:
        self._non_finite += 1
        _log.warning("not_finite", reason=str(error), in_a_row=self._non_finite)
        if self._non_finite >= _NON_FINITE_LIMIT:
            self._save()
            raise DivergedError(
                f"{self._non_finite} batches in a row gave a loss or gradient that is not finite; nothing of them was "
                "pushed. Lower --learning-rate or use --dtype fp32, and check the data"
            ) from error

    def _step_done(self, record: StepRecord) -> None:
        self._non_finite = 0
        self._progress += Progress(1, record.tokens, record.loss * record.tokens)
        if self._report is not None:
            self._report.step(record, self._require_base().version)
        self._on_step(record)

    def _evaluated(self, record: EvaluationRecord) -> None:
        if self._report is not None:
            self._report.evaluated(record, self._require_base().version, self.worker.stopped_early)

    def _measuring(self, done: int, total: int) -> None:
        if self._report is not None:
            self._report.measuring(done, total)

    def _send_if_due(self) -> None:
        if self._delivery is None and self._progress.steps and self._clock() - self._cut_at >= self._interval:
            self._send()

    def _send(self) -> None:
        """Cut an update of everything learned since the base and start its delivery."""
        base, layout, local = self._require_base(), self.worker.manifest.layout, self.worker.weights()
        delta = local - base.weights
        if not np.isfinite(delta).all():
            raise DivergedError("the local weights are not finite; nothing was pushed. Lower --learning-rate")
        body = encode(layout, delta, self._settings.wire_dtype)
        header = UpdateHeader(
            expert=self._settings.expert,
            worker=self._settings.worker,
            epoch=self._box.epoch,
            sequence=self._box.next_sequence,
            base_version=base.version,
            base_digest=base.digest,
            incarnation=base.incarnation,
            answer="weights",
            loss=self._progress.mean_loss,
            steps=self.worker.step,
            tokens=self._progress.tokens,
        )
        self._start_delivery(self._box.cut(header, body), self._report.fact() if self._report else None)
        # float32 carries everything; an expert trained by one worker then equals its local weights bit for bit.
        exact = self._settings.wire_dtype == "fp32"
        self._reference = local if exact else base.weights + decode(body, layout).flat
        self._under_way, self._progress = self._progress, Progress()
        self._cut_at = self._clock()

    def _absorb_answer(self) -> None:
        """Once the answer is there, rebase onto the newest version; all ranks."""
        answer = on_rank_zero(self._group, self._reported_answer)
        if not self._group.flag(answer is not None):
            return
        if self._group.flag(answer is not None and answer.newest is None):
            self._stop_for_refusal(answer)
        returned = answer is not None and answer.returned
        # A returned update never landed: all that was learned since its base has still to travel. One that is held
        # travels no more: it comes back with a pull once it is released.
        reference = self._base.weights if returned and self._base else self._reference
        newest = answer.newest if answer else None
        self.worker.rebase(newest.weights if newest else None, reference)
        self._base, self._reference = newest, newest.weights if newest else None
        if self._group.flag(returned):
            self._progress += self._under_way
            self._restore_refused()
        elif self._talks:
            self._box.settle()
        self._delivery = None

    def _reported_answer(self) -> DeliveryOutcome | None:
        answer = self._delivery.answer() if self._delivery is not None else None
        if answer is not None and self._report is not None:
            self._report.answered(self._require_pending(), answer)
        return answer

    def _restore_refused(self) -> None:
        """A refused update is local progress again: first on disk, then out of the outbox; all ranks."""
        self._save(absorbed=True)
        if self._talks:
            self._box.settle()

    def _stop_for_refusal(self, answer: DeliveryOutcome | None) -> None:
        """Refused for a reason a person has to see to; the update is kept for the next start; all ranks."""
        if not self._group.flag(answer is not None and answer.poisoned):
            self._save()
        elif self._talks:
            self._box.settle()
        refused = answer.refused if answer else None
        raise refused or WorkerFailedError("process 0 of this group cannot go on; its message says why")

    def _leave(self) -> None:
        """Save, deliver what is under way and what is left, within a bound; what is not answered waits on disk."""
        self._save()
        began, sends = self._clock(), True
        while sends:
            if self._delivery is not None:
                self._await_answer(self._seconds_left(began))
            self._absorb_answer()
            answered = self._delivery is None
            sends = self._group.flag(answered and self._progress.steps > 0 and self._seconds_left(began) > 0)
            if sends:
                on_rank_zero(self._group, self._send)
        self._save()
        on_rank_zero(self._group, self._report_undelivered)

    def _seconds_left(self, began: float) -> float:
        patience = _LAST_WAIT_SECONDS if self._stop.is_set() else self._settings.max_unsynced
        return began + patience - self._clock()

    def _await_answer(self, seconds: float) -> None:
        """Wait for the answer to the update under way, so long, or less when asked to stop."""
        assert self._delivery is not None
        deadline = self._clock() + seconds
        while not self._delivery.wait(_TICK_SECONDS) and self._clock() < deadline:
            if self._stop.is_set():
                deadline = min(deadline, self._clock() + _LAST_WAIT_SECONDS)

    def _report_undelivered(self) -> None:
        """One who was asked to stop may leave an update for the next start; for a schedule's end it is a failure."""
        if self._delivery is None:
            _log.info("left", step=self.worker.step, version=self._require_base().version)
            return
        reason = (
            f"{self._client.url} did not answer; update {self._require_pending().header.sequence} is kept in "
            f"{self._state_dir} and delivered at the next start"
        )
        if not self._stop.is_set():
            raise CoordinatorUnavailableError(reason)
        _log.warning("left_with_update", reason=reason)

    def _save(self, absorbed: bool = False) -> None:
        """Write a checkpoint; `absorbed` says that the pending update's content is in it again; all ranks."""
        extras = CheckpointExtras()
        if self._talks and self._base is not None and self._reference is not None:
            number = self._require_pending().header.sequence if absorbed else None
            position = (self._reference, self._box.next_sequence, self._progress, number, self._base.incarnation)
            extras = WorkerSyncPoint(*position).extras()
        self.worker.save(self._checkpoints, extras)
        failpoints.reached("worker.saved")
        self._saved_at = self._clock()

    def _require_base(self) -> PulledExpert:
        assert self._base is not None, "the loop starts with a pull"
        return self._base

    def _require_pending(self) -> PendingUpdate:
        assert self._box.pending is not None, "there is an update under way"
        return self._box.pending

    @property
    def _box(self) -> Outbox:
        assert self._outbox is not None, "only rank 0 talks to the coordinator, and has an outbox"
        return self._outbox
