"""Withdrawal of a worker from an expert: retraction, then erasure; finished after a crash.

What was asked for is noted before anything is done and until all of it is, so that the next start finishes what a kill
interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import structlog

from fedmoe.coordinator import CentralCoordinator, Transaction
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.released_bytes import ErasureRequest, finish_erasure, pending_erasures, request_erasure
from fedmoe.server.updates.committer import Committer
from fedmoe.server.upkeep.erasure import Erasure, ErasureReport
from fedmoe.server.upkeep.undo import Undo, change_result
from fedmoe.wire.contract.messages import ChangeResult, RetractRequest

_log = structlog.get_logger("fedmoe.coordinator")

# A worker may push between the retraction and the erasure; then both are done once more.
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Withdrawals:
    """Withdrawals of one coordinator; `clock` gives seconds since 1970."""

    coordinator: CentralCoordinator
    journal: Journal
    committer: Committer
    undo: Undo
    erasure: Erasure
    clock: Callable[[], float]

    async def withdraw(self, request: RetractRequest) -> ChangeResult:
        """Retract a worker, if that is not done yet, and remove its bytes for good; raises RefusedError."""
        gave = await self.committer.decided(lambda transaction: self._noted(transaction, request), alone=True)
        failpoints.reached("erase.wanted")
        for _ in range(_TRIES):
            result = await self._without(request, gave)
            report = await self.committer.decided(lambda transaction: self._erase(transaction, request), alone=True)
            if report is not None:
                await self._done(request)
                notes = (result.note, "" if report.left in result.note else report.left, report.in_words())
                return result.model_copy(update={"note": " ".join(filter(None, notes))})
        await self._done(request)
        raise RefusedError(
            "busy",
            f"updates of {request.worker!r} landed on {request.expert!r} again and again while they were taken out.",
            "Nothing was erased: revoke the worker's token or stop it, then give the command again.",
        )

    async def _done(self, request: RetractRequest) -> None:
        """Note that the withdrawal is over."""
        await self.committer.decided(
            lambda transaction: finish_erasure(self.journal, request.expert, request.worker), alone=True
        )

    def finish(self) -> None:
        """Queue withdrawals that the last stop interrupted; called at the start, before anything else."""
        for due in pending_erasures(self.journal):
            self._finish(RetractRequest(expert=due.expert, worker=due.worker, reason=due.reason, erase=True))

    def _finish(self, request: RetractRequest) -> None:
        retraction = self.committer.submit(lambda transaction: self._retract(transaction, request), alone=True)
        erasure = self.committer.submit(lambda transaction: self._erase(transaction, request), alone=True)

        def end(transaction: Transaction) -> None:
            failed = retraction.exception() or erasure.exception()
            if failed is None:
                finish_erasure(self.journal, request.expert, request.worker)
                return
            named = {"expert": request.expert, "worker": request.worker}
            _log.error("erasure_not_finished", **named, reason=str(failed), again="at the next start")

        self.committer.submit(end, alone=True)

    def _noted(self, transaction: Transaction, request: RetractRequest) -> bool:
        """Note the withdrawal, if the worker contributed anything; whether it did."""
        transaction.expert(request.expert)
        gave = self.erasure.gave(transaction, request.expert, request.worker)
        if gave:
            request_erasure(self.journal, ErasureRequest(request.expert, request.worker, request.reason, self.clock()))
        return gave

    async def _without(self, request: RetractRequest, gave: bool) -> ChangeResult:
        try:
            return await self.undo.retract(request)
        except RefusedError as error:
            if error.code != "nothing_to_retract" or not gave:
                await self._done(request)  # nothing was changed
                raise
            return change_result(self.coordinator.transaction(), request.expert)

    def _retract(self, transaction: Transaction, request: RetractRequest) -> None:
        if self.erasure.holds(transaction, request.expert, request.worker):
            self.undo.retract_now(transaction, request)

    def _erase(self, transaction: Transaction, request: RetractRequest) -> ErasureReport | None:
        if self.erasure.holds(transaction, request.expert, request.worker):
            return None
        return self.erasure.erase(transaction, request, self.clock())
