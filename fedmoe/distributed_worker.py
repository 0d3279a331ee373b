"""`DistributedWorker`: the sync loop around a QwenWorker.

    training thread                          delivery thread
    ---------------                          ---------------
    pull the expert -> base, local
    train for sync_interval
    cut: delta = local - base, on disk  -->  push (again and again until answered)
    train on                                   |
    answer there?  <---------------------------+
    rebase: local = newest + (local - what the coordinator now knows of it)

One update is under way at a time. While it is, training goes on, at most `max_unsynced` seconds after the last answer.
What the coordinator knows after an update is base + the delta as it travelled; measuring from there keeps what int8 or
bf16 rounded away in the local weights, so the next delta carries it (error feedback without a buffer).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import structlog

from fedmoe.errors import RefusedError
from fedmoe.lora.adapter import FloatVector
from fedmoe.lora.codec import WireDtype, decode, encode
from fedmoe.lora.update_rules import add_scaled
from fedmoe.qwen_finetune import NonFiniteError
from fedmoe.qwen_worker import Companion, IntervalResult, QwenWorker, StepRecord
from fedmoe.record import RecordWriter, Value
from fedmoe.wire.client import CoordinatorClient, CoordinatorUnavailableError, PulledExpert, TooStaleError
from fedmoe.wire.messages import UpdateHeader
from fedmoe.worker.delivery import Answered, Delivery
from fedmoe.worker.outbox import Outbox

_log = structlog.get_logger("fedmoe.worker")

_CHECKPOINT_SECONDS = 60.0
_LAST_WAIT_SECONDS = 60.0
_NON_FINITE_LIMIT = 5
# Refusals that a newer version cures: the local progress is kept and moved onto it.
_CURED_BY_PULLING = frozenset({"too_stale", "unknown_version"})


class WorkerFailedError(Exception):
    """The worker cannot go on; its state is saved, and the message says what to do."""


@dataclass(frozen=True, slots=True)
class SyncSettings:
    """How a worker syncs: seconds between pushes, how long it trains on without an answer, and the wire's precision."""

    worker: str
    expert: str
    sync_interval: float = 10.0
    max_unsynced: float = 600.0
    wire_dtype: WireDtype = "fp32"


class DistributedWorker:
    """Trains one expert on local data and keeps it in step with the coordinator; rank 0 of several talks to it."""

    def __init__(
        self,
        worker: QwenWorker,
        client: CoordinatorClient,
        settings: SyncSettings,
        state_dir: Path,
        on_step: Callable[[StepRecord], None] = lambda _: None,
    ) -> None:
        self.worker = worker
        self._client = client
        self._settings = settings
        self._group = worker.expert.group
        self._talks = self._group.rank == 0
        self._checkpoints = state_dir / "checkpoint"
        self._outbox = Outbox(state_dir, settings.worker, settings.expert) if self._talks else None
        self._records = RecordWriter(state_dir / "metrics.jsonl") if self._talks else None
        self._on_step = on_step
        self._stop = threading.Event()
        self._delivery: Delivery | None = None
        self._base: PulledExpert | None = None
        self._reference: FloatVector | None = None
        self._interval = settings.sync_interval
        self._last_answer = time.monotonic()
        self._last_checkpoint = time.monotonic()
        self._progress = IntervalResult(0, 0, float("nan"), 0.0)
        self._staleness = 0
        self._non_finite = 0

    def stop(self) -> None:
        """Ask the loop to push what it has, save and leave; safe to call from a signal handler."""
        self._stop.set()

    def run(self) -> None:
        """Train and sync until `stop`, the end of the schedule, or a refusal that cannot be cured.

        All ranks call it. Leaves the state directory such that the next start continues.
        """
        self._join()
        while not self._over():
            self._train()
            self._exchange()
            self._checkpoint_if_due()
        self._leave()

    def _join(self) -> None:
        """Register, deliver what an earlier run left, pull, and take up where the last checkpoint was."""
        if self._talks:
            federation = self._client.federation()
            self._interval = max(self._interval, federation.min_sync_interval)
            info = self._client.register(self._settings.expert, self._settings.worker, self.worker.manifest)
            _log.info("registered", expert=info.name, version=info.version, digest=info.digest[:12])
            self._deliver_leftover()
        companion = self.worker.restore(self._checkpoints)
        pulled, start = None, None
        if self._talks:
            pulled = self._pull()
            start = self._starting_weights(pulled, companion)
        self.worker.load(start)
        if pulled is not None:
            self._adopt(pulled)

    def _deliver_leftover(self) -> None:
        outbox = self._box
        if outbox.pending is None:
            return
        _log.info("delivering", sequence=outbox.pending.header.sequence)
        answer = Delivery(self._client, outbox.pending, self._report_trouble).wait(self._settings.max_unsynced)
        if answer is None:
            raise WorkerFailedError("the coordinator did not answer; the update of the earlier run is kept for later")
        if answer.refused is not None and answer.refused.code not in _CURED_BY_PULLING:
            raise answer.refused
        outbox.settle()

    def _starting_weights(self, pulled: PulledExpert, companion: Companion | None) -> FloatVector:
        """The newest version, plus what the checkpoint holds that no update has carried yet."""
        if companion is None or companion.texts.get("next_sequence") != str(self._box.next_sequence):
            return pulled.weights
        unsent = self.worker.weights() - companion.vectors["reference"]
        return add_scaled(pulled.weights, unsent, 1.0)

    def _over(self) -> bool:
        return self._group.flag(self._stop.is_set() or self.worker.expert.finished)

    def _train(self) -> None:
        """One interval of training; while an answer is overdue, wait for it instead."""
        if self._group.flag(self._overdue()):
            if self._delivery is not None:
                self._delivery.wait(1.0)
            return
        try:
            result = self.worker.train_for(self._interval, self._stop.is_set, self._step_done)
        except NonFiniteError as error:
            self._skip_batch(error)
            return
        self._progress = _joined(self._progress, result)

    def _overdue(self) -> bool:
        return self._delivery is not None and time.monotonic() - self._last_answer > self._settings.max_unsynced

    def _skip_batch(self, error: NonFiniteError) -> None:
        self._non_finite += 1
        _log.warning("not_finite", reason=str(error), in_a_row=self._non_finite)
        if self._non_finite >= _NON_FINITE_LIMIT:
            self._save()
            raise WorkerFailedError(
                f"{self._non_finite} batches in a row gave a loss or gradient that is not finite; nothing of them was "
                "pushed. Lower --learning-rate or use --dtype fp32, and check the data"
            ) from error

    def _step_done(self, record: StepRecord) -> None:
        self._non_finite = 0
        if self._records is not None:
            self._records.write(
                "step",
                worker=self._settings.worker,
                expert=self._settings.expert,
                step=record.step,
                loss=record.loss,
                tokens=record.tokens,
                tokens_per_second=record.tokens / record.seconds if record.seconds > 0 else None,
                learning_rate=record.learning_rate,
                grad_norm=record.grad_norm,
                version=self._base.version if self._base else None,
                staleness=self._staleness,
            )
        self._on_step(record)

    def _exchange(self) -> None:
        """Take in an answer if there is one; send what was learned if nothing is under way."""
        answer = self._delivery.answer() if self._delivery is not None else None
        self._take_in(answer)
        if self._talks and self._delivery is None and self._progress.steps > 0:
            self._send()

    def _take_in(self, answer: Answered | None) -> None:
        """Rebase onto the newest version; collective, rank 0 decides whether there is one."""
        if not self._group.flag(answer is not None):
            return
        newest, known = None, None
        if answer is not None:
            newest = self._newest(answer)
            known = self._reference
            self._box.settle()
            self._delivery = None
            self._last_answer = time.monotonic()
        self.worker.rebase(newest.weights if newest else None, known)
        if newest is not None:
            self._adopt(newest)

    def _newest(self, answer: Answered) -> PulledExpert:
        if answer.refused is not None:
            return self._after_refusal(answer.refused)
        assert answer.pushed is not None, "an answer is a result or a refusal"
        result = answer.pushed.result
        self._staleness = result.staleness
        newest = answer.pushed.newest or self._pull()
        self._log_push(result.version, result.staleness, newest.digest, answer.seconds)
        return newest

    def _after_refusal(self, refused: RefusedError) -> PulledExpert:
        if refused.code not in _CURED_BY_PULLING:
            self._box.settle()
            self._save()
            raise refused
        _log.warning("rebasing", code=refused.code, reason=refused.detail)
        # The update never landed: all local progress since the old base still has to travel.
        self._reference = self._require_base().weights
        newest = refused.newest if isinstance(refused, TooStaleError) else None
        return newest or self._pull()

    def _send(self) -> None:
        base = self._require_base()
        layout = self.worker.manifest.layout
        body = encode(layout, self.worker.weights() - base.weights, self._settings.wire_dtype)
        self._reference = base.weights + decode(body, layout).flat
        header = UpdateHeader(
            expert=self._settings.expert,
            worker=self._settings.worker,
            epoch=self._box.epoch,
            sequence=self._box.next_sequence,
            base_version=base.version,
            answer="weights",
            loss=self._progress.mean_loss if np.isfinite(self._progress.mean_loss) else None,
            steps=self.worker.step,
            tokens=self._progress.tokens,
        )
        self._progress = IntervalResult(0, 0, float("nan"), 0.0)
        self._delivery = Delivery(self._client, self._box.cut(header, body), self._report_trouble)

    def _log_push(self, version: int, staleness: int, digest: str, seconds: float) -> None:
        assert self._delivery is not None
        assert self._records is not None
        pending = self._delivery.pending
        loss = pending.header.loss
        facts: dict[str, Value] = {
            "sequence": pending.header.sequence,
            "version": version,
            "staleness": staleness,
            "digest": digest[:12],
            "bytes": len(pending.body),
        }
        _log.info("pushed", **facts, loss=round(loss, 4) if loss is not None else None, seconds=round(seconds, 3))
        self._records.write(
            "push", worker=self._settings.worker, expert=self._settings.expert, loss=loss, seconds=seconds, **facts
        )

    def _pull(self) -> PulledExpert:
        pulled = self._client.pull_expert(self._settings.expert)
        assert pulled is not None, "without an ETag there is always an answer"
        _log.info("pulled", expert=pulled.name, version=pulled.version, digest=pulled.digest[:12])
        return pulled

    def _adopt(self, pulled: PulledExpert) -> None:
        self._base = pulled
        self._reference = pulled.weights

    def _require_base(self) -> PulledExpert:
        assert self._base is not None, "the loop starts with a pull"
        return self._base

    @property
    def _box(self) -> Outbox:
        assert self._outbox is not None, "only rank 0 talks to the coordinator"
        return self._outbox

    def _report_trouble(self, error: CoordinatorUnavailableError) -> None:
        waited = round(time.monotonic() - self._last_answer)
        _log.warning("coordinator_away", reason=str(error), seconds_without_answer=waited)

    def _checkpoint_if_due(self) -> None:
        if self._group.flag(time.monotonic() - self._last_checkpoint > _CHECKPOINT_SECONDS):
            self._save()

    def _save(self) -> None:
        companion = Companion()
        if self._talks and self._reference is not None:
            texts = {"next_sequence": str(self._box.next_sequence)}
            companion = Companion(texts, {"reference": self._reference})
        self.worker.save(self._checkpoints, companion)
        self._last_checkpoint = time.monotonic()

    def _leave(self) -> None:
        """Deliver what is under way and what is left, within a bound; what cannot be delivered waits on disk."""
        self._settle_delivery()
        if self._group.flag(self._talks and self._delivery is None and self._progress.steps > 0):
            if self._talks:
                self._send()
            self._settle_delivery()
        self._save()
        if self._talks and self._delivery is not None:
            _log.warning("left_with_update", sequence=self._delivery.pending.header.sequence)

    def _settle_delivery(self) -> None:
        answer = None
        if self._delivery is not None:
            answer = self._delivery.wait(min(_LAST_WAIT_SECONDS, self._settings.max_unsynced))
        self._take_in(answer)


def _joined(first: IntervalResult, second: IntervalResult) -> IntervalResult:
    tokens = first.tokens + second.tokens
    nats = sum(part.mean_loss * part.tokens for part in (first, second) if part.tokens)
    loss = nats / tokens if tokens else float("nan")
    return IntervalResult(first.steps + second.steps, tokens, loss, first.seconds + second.seconds)
