"""Background merge: experts with enough new steps are merged into the gateway and rebased onto it.

A thread of its own plans on what is published, computes and stores the next gateway. Then the committer, in the order
of the journal, makes it the gateway and rebases the merged experts onto it, in one transaction: a crash leaves all or
nothing of it. Updates that landed on an expert meanwhile are kept: they land again on top of the gateway. An expert
that was rolled back meanwhile makes the merge void; the next one is planned at once.
"""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import structlog

from fedmoe.coordinator import Transaction
from fedmoe.federation.events import ExpertRebased, GatewayMerged
from fedmoe.federation.online_gateway import MergePlan, plan_merge
from fedmoe.lora.algebra import TruncatedAdapter
from fedmoe.lora.codec import encode
from fedmoe.lora.update_rules import STALENESS
from fedmoe.runtime import failpoints
from fedmoe.server.history.history import History
from fedmoe.server.storage.blobs import BlobStore, CorruptBlobError, MissingBlobError, StorageFailedError
from fedmoe.server.updates.committer import Committer

_log = structlog.get_logger("fedmoe.background_merge")

#: An expert without updates for so long is idle, and merged with the few steps that it has: more may never come. Far
#: above the recommended sync intervals, so that an expert in training is not merged update by update.
IDLE_SECONDS = 300.0
_LOOK_SECONDS = 30.0
# For a merge under way when the coordinator stops; it is computed anew after the next start.
_LAST_WAIT_SECONDS = 5.0


class MergeFailedError(Exception):
    """The next gateway cannot be made of these experts; nothing was changed."""


class MergeOvertakenError(Exception):
    """An expert was rolled back, or a worker retracted from it, while its merge was computed; nothing was changed."""


class BackgroundMerge:
    """The thread that merges, after `wake` and when experts become idle; not started without `merge_after`."""

    def __init__(self, committer: Committer, history: History, blobs: BlobStore) -> None:
        self._committer = committer
        self._coordinator = committer.coordinator
        self._history = history
        self._blobs = blobs
        self._heard_since = committer.clock()
        self._due = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedmoe-merging", daemon=True)

    def start(self) -> None:
        """Start if experts are rebased onto the gateway; what was ready before a restart is merged now."""
        if self._coordinator.aggregation.merge_after is not None:
            self.wake()
            self._thread.start()

    def wake(self) -> None:
        """Look for experts that are ready; call it after each change."""
        self._due.set()

    def close(self) -> None:
        """Stop; a merge that is not computed soon is dropped. Safe to call before `start` and more than once."""
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
        """Merge all experts that are ready, if any; whether it is worth looking again."""
        plan = self._plan()
        if plan is None:
            return False
        began = time.perf_counter()
        try:
            merged = self._compute(plan)
            if not self._closing.is_set():
                self._publish(plan, merged, time.perf_counter() - began)
        except MergeOvertakenError as error:
            _log.warning("fold_dropped", reason=str(error))
        return True

    def _plan(self) -> MergePlan | None:
        view = self._coordinator.transaction()
        aggregation = view.aggregation
        if view.online_gateway is None or aggregation.merge_after is None:
            return None
        # Experts whose last update is older than this are idle; downtime of the coordinator is excluded.
        now = self._committer.clock()
        return plan_merge(
            view.online_gateway,
            view.experts,
            {name: expert_moments.moments for name, expert_moments in view.moments.items()},
            aggregation.merge_after,
            STALENESS[aggregation.fold_staleness],
            least_updates=aggregation.buffer_size,
            idle_since=now - IDLE_SECONDS if now - self._heard_since >= IDLE_SECONDS else -math.inf,
        )

    def _compute(self, plan: MergePlan) -> TruncatedAdapter:
        points = plan.gateway.branch_points
        try:
            starts = {name: self._history.branch_weights(expert, points[name]) for name, expert in plan.experts.items()}
        except (MissingBlobError, CorruptBlobError) as error:
            raise MergeFailedError(f"where an expert left the gateway cannot be read: {error}") from error
        merged = plan.compute(starts)
        if not np.isfinite(merged.adapter.flat).all():
            raise MergeFailedError(f"the merge of {', '.join(plan.experts)} is not finite; roll the broken one back")
        failpoints.reached("fold.computed")
        return merged

    def _publish(self, plan: MergePlan, merged: TruncatedAdapter, seconds: float) -> None:
        """Store the next gateway, then have the committer publish it."""
        writer = self._blobs.writer()
        try:
            writer.write(encode(merged.adapter.layout, merged.adapter.flat))
            digest = writer.commit()
            failpoints.reached("fold.stored")
            event = self._committer.submit(
                lambda transaction: self._decide(transaction, plan, merged, digest, seconds)
            ).result()
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

    def _decide(
        self, transaction: Transaction, plan: MergePlan, merged: TruncatedAdapter, digest: str, seconds: float
    ) -> GatewayMerged:
        """Apply the merge and rebase its experts, in the journal's order; raises if one did more than train."""
        event = GatewayMerged(
            plan.gateway.number + 1,
            transaction.gateway_version + 1,
            digest,
            {name: expert.version for name, expert in plan.experts.items()},
            dict(plan.staleness),
            dict(plan.weights),
            merged.truncation_error,
            round(seconds, 3),
            plan.notes,
            self._committer.clock(),
        )
        assert transaction.online_gateway is not None, "only an online gateway is merged into"
        branch_points = transaction.online_gateway.branch_points
        transaction.apply(event, gateway=merged.adapter)
        for name, version in event.sources.items():
            expert = transaction.expert(name)
            if expert.retired:
                raise MergeOvertakenError(f"{name} was retired meanwhile.")
            rest = branch_points[name].unseen(plan.gateway.branch_points[name], transaction.aggregation.buffer_size)
            if rest is None:
                raise MergeOvertakenError(
                    f"{name} changed from version {version} to {expert.version} by more than updates."
                )
            updates = [counted.update for counted in rest]
            state = self._history.rebased_state(merged.adapter.flat, updates, expert.manifest)
            rebased = ExpertRebased(name, event.number, event.digest, len(rest), expert.version + 1, event.at)
            transaction.apply(rebased, rebuilt=state, since=rest)
        return event
