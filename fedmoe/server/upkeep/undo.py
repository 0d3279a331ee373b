"""Rollback and retraction: rebuilt in a thread beside the pushes, decided by the committer.

A thread of its own rebuilds the expert from journalled events. Updates that land meanwhile are added to the rebuilt
state, until so few are left that the committer adds them with the decision. If anything but updates came between, the
thread starts over; after a few tries the committer rebuilds alone. The bits are the same either way.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import structlog

from fedmoe.coordinator import Transaction
from fedmoe.experts import ExpertModel
from fedmoe.federation.events import ExpertRolledBack, WorkerRetracted
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.base_history import CurrentHistory
from fedmoe.server.history.history import History, RebuiltState
from fedmoe.server.updates.committer import Committer
from fedmoe.server.updates.update_decisions import retract_held
from fedmoe.server.updates.upload import in_thread
from fedmoe.wire.contract.messages import ChangeResult, RetractRequest, RollbackRequest

_log = structlog.get_logger("fedmoe.coordinator")

# Updates that the committer lands with a decision, and how often one is tried before the committer does all of it.
_FEW = 8
_TRIES = 5

Rebuild = Callable[[ExpertModel], RebuiltState]
Decide = Callable[[Transaction, RebuiltState], ChangeResult]


class Undo:
    """Rollbacks and retractions of one coordinator, one rebuilt at a time."""

    def __init__(self, committer: Committer, history: History, current: CurrentHistory) -> None:
        self._committer = committer
        self._coordinator = committer.coordinator
        self._history = history
        self._current = current
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="fedmoe-undo")

    def close(self) -> None:
        """Finish what is being rebuilt and stop."""
        self._thread.shutdown()

    async def roll_back(self, request: RollbackRequest) -> ChangeResult:
        """The expert's next version gets the content of an earlier one."""

        def decide(transaction: Transaction, rebuilt: RebuiltState) -> ChangeResult:
            expert = transaction.expert(request.expert)
            self._current.check_rollback(request, expert, expert.with_state(rebuilt.state).digest)
            version, at = expert.version + 1, self._committer.clock()
            event = ExpertRolledBack(expert.name, request.to_version, version, request.reason, at)
            transaction.apply(event, rebuilt=rebuilt.state, since=rebuilt.since)
            return change_result(transaction, request.expert, rebuilt.removed, rebuilt.note)

        return await self._done(
            "rolled_back",
            request.expert,
            None,
            lambda expert: self._history.at_version(expert, request.to_version),
            decide,
        )

    async def retract(self, request: RetractRequest) -> ChangeResult:
        """The expert's next version is what it would be without one worker's updates."""
        return await self._done(
            "retracted",
            request.expert,
            request.worker,
            lambda expert: self._history.without_worker(expert, request.worker),
            partial(self._retracted, request),
        )

    def retract_now(self, transaction: Transaction, request: RetractRequest) -> ChangeResult:
        """`retract` for the committer, in a group of its own: rebuilt and decided at once."""
        rebuilt = self._history.without_worker(transaction.expert(request.expert), request.worker)
        return self._retracted(request, transaction, rebuilt)

    def _retracted(self, request: RetractRequest, transaction: Transaction, rebuilt: RebuiltState) -> ChangeResult:
        expert, at = transaction.expert(request.expert), self._committer.clock()
        version = expert.version + 1
        event = WorkerRetracted(expert.name, request.worker, rebuilt.removed, version, request.reason, at)
        transaction.apply(event, rebuilt=rebuilt.state, since=rebuilt.since)
        rejected = retract_held(transaction, request.expert, request.worker, request.reason, at)
        return change_result(transaction, request.expert, rebuilt.removed, f"{rebuilt.note} {rejected}".strip())

    async def _done(self, what: str, name: str, worker: str | None, rebuild: Rebuild, decide: Decide) -> ChangeResult:
        result, rebuilt = None, None
        for _ in range(_TRIES):
            rebuilt = await self._beside(name, worker, rebuild, rebuilt)
            result = await self._decided(name, worker, rebuilt, decide) if rebuilt is not None else None
            if result is not None:
                break
        else:
            result = await self._committer.decided(
                lambda transaction: decide(transaction, rebuild(transaction.expert(name))), alone=True
            )
        _log.warning(what, expert=result.expert, version=result.version, removed=result.removed)
        return result

    async def _beside(
        self, name: str, worker: str | None, rebuild: Rebuild, earlier: RebuiltState | None
    ) -> RebuiltState | None:
        """The newest expert, rebuilt (or `earlier` brought up to it); None if it changed by more than updates."""
        expert = self._coordinator.expert(name)

        def work() -> RebuiltState | None:
            failpoints.reached("undo.rebuild")
            return rebuild(expert) if earlier is None else self._history.caught_up(earlier, expert, worker)

        try:
            return await in_thread(self._thread, work)
        except RefusedError:
            if self._coordinator.expert(name).version == expert.version:
                raise
            return None  # what it needed was let go meanwhile, or came meanwhile

    async def _decided(
        self, name: str, worker: str | None, rebuilt: RebuiltState, decide: Decide
    ) -> ChangeResult | None:
        """The result; None if too much landed meanwhile, so that the rebuilt state must be brought up to date first."""

        def attempt(transaction: Transaction) -> ChangeResult | None:
            expert = transaction.expert(name)
            if expert.version - rebuilt.version > _FEW:
                return None
            newest = self._history.caught_up(rebuilt, expert, worker)
            return None if newest is None else decide(transaction, newest)

        return await self._committer.decided(attempt, alone=True)


def change_result(transaction: Transaction, name: str, removed: int = 0, note: str = "") -> ChangeResult:
    """The answer for an expert as it is in a transaction."""
    expert = transaction.expert(name)
    return ChangeResult(
        expert=name,
        version=expert.version,
        gateway_version=transaction.gateway_version,
        removed=removed,
        digest=expert.digest,
        note=note,
    )
