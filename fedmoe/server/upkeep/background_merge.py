"""Background merge: experts with enough new steps are merged into the gateway and rebased onto it.

A thread of its own plans on what is published, computes and stores the next gateway. Then the committer, in the order
of the journal, makes it the gateway and moves the folded experts onto it, in one transaction: a crash leaves all of it
or nothing. What landed on an expert meanwhile lands on the gateway once more. An expert that was rolled back meanwhile
makes the fold void; the next one is planned at once.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog

from fedmoe.coordinator import CentralCoordinator, Transaction
from fedmoe.federation.events import ExpertRebased, GatewayMerged
from fedmoe.federation.online_gateway import MergePlan, plan_merge
from fedmoe.lora.algebra import TruncatedAdapter
from fedmoe.lora.codec import encode
from fedmoe.lora.update_rules import STALENESS
from fedmoe.runtime import failpoints
from fedmoe.server.history.history import History
from fedmoe.server.storage.blobs import BlobStore, CorruptBlobError, MissingBlobError, StorageFailedError
from fedmoe.server.updates.committer import Committer

_log = structlog.get_logger("fedmoe.folding")

#: An expert that nobody has trained for so long is folded with the few steps that it has: more may never come. Far
#: above the sync intervals that are recommended, so that an expert under way is not folded update by update; one whose
#: workers push even less often is.
REST_SECONDS = 300.0
_LOOK_SECONDS = 30.0
# Of a fold under way when the coordinator is told to stop; it is computed anew after the next start.
_LAST_WAIT_SECONDS = 5.0


class MergeFailedError(Exception):
    """The next gateway cannot be made of these experts; nothing was changed."""


class MergeOvertakenError(Exception):
    """An expert was rolled back, or a worker retracted from it, while its fold was computed; nothing was changed."""


class BackgroundMerge:
    """The thread that folds, after `wake` and for whoever came to rest; idle where nobody goes on from the gateway."""

    def __init__(
        self,
        coordinator: CentralCoordinator,
        history: History,
        blobs: BlobStore,
        committer: Committer,
        clock: Callable[[], float],
    ) -> None:
        self._coordinator = coordinator
        self._history = history
        self._blobs = blobs
        self._committer = committer
        self._clock = clock
        self._heard_since = clock()
        self._due = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedmoe-folding", daemon=True)

    def start(self) -> None:
        """Start where experts go on from the gateway; what was ready before a restart is folded now."""
        if self._coordinator.aggregation.merge_after is not None:
            self.wake()
            self._thread.start()

    def wake(self) -> None:
        """Something changed: look who is ready."""
        self._due.set()

    def close(self) -> None:
        """Stop; a fold that is not computed soon is dropped. Safe to call before `start` and more than once."""
        self._closing.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join(_LAST_WAIT_SECONDS)

    def _run(self) -> None:
        while True:
            self._due.wait(_LOOK_SECONDS)
            self._due.clear()
            if self._closing.is_set():
                return
            try:
                while self.merge_ready() and not self._closing.is_set():
                    pass
            except StorageFailedError as error:
                self._committer.fail(str(error))
            except Exception as error:
                # The gateway stays as it is and the experts train on; the next update asks for another try.
                _log.error("fold_failed", reason=str(error) or repr(error))

    def merge_ready(self) -> bool:
        """Fold all experts that are ready, if there are any; whether it is worth to look again."""
        plan = self._plan()
        if plan is None:
            return False
        began = time.perf_counter()
        try:
            folded = self._compute(plan)
            if not self._closing.is_set():
                self._publish(plan, folded, time.perf_counter() - began)
        except MergeOvertakenError as error:
            _log.warning("fold_dropped", reason=str(error))
        return True

    def _plan(self) -> MergePlan | None:
        view = self._coordinator.transaction()
        aggregation = view.aggregation
        if view.online_gateway is None or aggregation.merge_after is None:
            return None
        moments = {name: found.moments for name, found in view.moments.items()}
        weight = STALENESS[aggregation.fold_staleness]
        return plan_merge(
            view.online_gateway,
            view.experts,
            moments,
            aggregation.merge_after,
            weight,
            least_updates=aggregation.buffer_size,
            idle_since=self._idle_since(),
        )

    def _idle_since(self) -> float:
        """Who last sent something then or before is at rest. While the coordinator was away nobody could send."""
        now = self._clock()
        return now - REST_SECONDS if now - self._heard_since >= REST_SECONDS else -math.inf

    def _compute(self, plan: MergePlan) -> TruncatedAdapter:
        left = plan.gateway.branch_points
        try:
            starts = {name: self._history.branch_weights(expert, left[name]) for name, expert in plan.experts.items()}
        except (MissingBlobError, CorruptBlobError) as error:
            raise MergeFailedError(f"where an expert left the gateway cannot be read: {error}") from error
        folded = plan.compute(starts)
        if not np.isfinite(folded.adapter.flat).all():
            raise MergeFailedError(f"the fold of {', '.join(plan.experts)} is not finite; roll the broken one back")
        failpoints.reached("fold.computed")
        return folded

    def _publish(self, plan: MergePlan, folded: TruncatedAdapter, seconds: float) -> None:
        """Store the next gateway, then let the committer make it the gateway."""
        writer = self._blobs.writer()
        try:
            writer.write(encode(folded.adapter.layout, folded.adapter.flat))
            digest = writer.commit()
            failpoints.reached("fold.stored")
            seen = _MergeResult(plan, folded, digest, seconds)
            event = self._committer.submit(lambda transaction: self._decide(transaction, seen)).result()
        finally:
            writer.abort()
        failpoints.reached("fold.published")
        _log.info(
            "folded",
            number=event.number,
            version=event.version,
            digest=event.digest[:12],
            experts=event.sources,
            staleness=event.staleness,
            seconds=event.seconds,
            truncation_error=round(event.truncation_error, 6),
            notes=list(event.notes),
        )

    def _decide(self, transaction: Transaction, computed: _MergeResult) -> GatewayMerged:
        """The fold and where its experts go on, in the journal's order; refused if one did not only train meanwhile."""
        event = computed.event(transaction.gateway_version + 1, self._clock())
        assert transaction.online_gateway is not None, "only a gateway that lives is folded into"
        branch_points = transaction.online_gateway.branch_points
        transaction.apply(event, gateway=computed.folded.adapter)
        for name, version in event.sources.items():
            expert = transaction.expert(name)
            if expert.retired:
                raise MergeOvertakenError(f"{name} was retired meanwhile.")
            rest = branch_points[name].unseen(
                computed.plan.gateway.branch_points[name], transaction.aggregation.buffer_size
            )
            if rest is None:
                raise MergeOvertakenError(
                    f"{name} changed from version {version} to {expert.version} by more than updates.",
                )
            updates = [one.update for one in rest]
            state = self._history.rebased_state(computed.folded.adapter.flat, updates, expert.manifest)
            went_on = ExpertRebased(name, event.number, event.digest, len(rest), expert.version + 1, event.at)
            transaction.apply(went_on, rebuilt=state, since=rest)
        return event


@dataclass(frozen=True)
class _MergeResult:
    """A fold that was computed, in so many seconds, and stored as the blob `digest`."""

    plan: MergePlan
    folded: TruncatedAdapter
    digest: str
    seconds: float

    def event(self, version: int, at: float) -> GatewayMerged:
        plan = self.plan
        sources = {name: expert.version for name, expert in plan.experts.items()}
        return GatewayMerged(
            plan.gateway.number + 1,
            version,
            self.digest,
            sources,
            dict(plan.staleness),
            dict(plan.weights),
            self.folded.truncation_error,
            round(self.seconds, 3),
            plan.notes,
            at,
        )
