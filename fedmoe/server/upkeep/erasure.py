"""Withdrawal of a worker from an expert: retraction, then erasure of bytes; rows and digests stay.

The expert is taken back to what it is without the worker first. Then a snapshot of that stands, so that no later start
needs anything older, and only then bytes go. What was asked for is noted before anything is done and until all of it
is, so that the next start finishes what a kill interrupted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import structlog

from fedmoe.coordinator import Transaction
from fedmoe.federation.lineage import Lineage
from fedmoe.federation.transitions import lineages
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.history import History
from fedmoe.server.history.pruning import made_of
from fedmoe.server.statistics.contributors import Contributors
from fedmoe.server.statistics.data_statistics import DataStatisticsStore
from fedmoe.server.statistics.reported_statistics import ReportedStatistics
from fedmoe.server.storage.blobs import BlobStore
from fedmoe.server.storage.released_bytes import (
    ErasureRequest,
    ReleasedBytes,
    finish_erasure,
    pending_erasures,
    record_release,
    request_erasure,
    stored_updates,
)
from fedmoe.server.updates.committer import Committer
from fedmoe.server.updates.update_decisions import retract_held
from fedmoe.server.upkeep.undo import Undo, change_result
from fedmoe.wire.contract.messages import ChangeResult, RetractRequest

_log = structlog.get_logger("fedmoe.coordinator")

# A worker may push between the retraction and the erasure; then both are done once more.
_TRIES = 5


@dataclass(frozen=True, slots=True)
class ErasureReport:
    """How many updates, snapshots and statistics were erased.

    `left` says in words what stays in the gateway, if anything.
    """

    updates: int
    snapshots: int
    statistics: int
    left: str = ""

    def in_words(self) -> str:
        return (
            f"Erased for good: {self.updates} updates, {self.snapshots} snapshots made of them, {self.statistics} "
            "statistics. Digests and rows stay in the journal. Backups of this state, gateways made before, and what "
            "others have downloaded are not reached: delete them yourself."
        )


class Withdrawals:
    """Withdraws workers from experts; the committer decides each step in a group of its own."""

    def __init__(
        self,
        committer: Committer,
        undo: Undo,
        history: History,
        blobs: BlobStore,
        statistics: DataStatisticsStore,
        reported: ReportedStatistics,
        roster: Contributors,
    ) -> None:
        self._committer = committer
        self._journal = committer.journal
        self._undo = undo
        self._history = history
        self._blobs = blobs
        self._statistics = statistics
        self._reported = reported
        self._roster = roster

    async def withdraw(self, request: RetractRequest) -> ChangeResult:
        """Retract a worker, if that is not done yet, and remove its bytes for good; raises RefusedError."""
        gave = await self._committer.decided(lambda transaction: self._noted(transaction, request), alone=True)
        failpoints.reached("erase.wanted")
        for _ in range(_TRIES):
            result = await self._without(request, gave)
            report = await self._committer.decided(lambda transaction: self._erase(transaction, request), alone=True)
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
        await self._committer.decided(
            lambda transaction: finish_erasure(self._journal, request.expert, request.worker), alone=True
        )

    def finish(self) -> None:
        """Queue withdrawals that the last stop interrupted; called at the start, before anything else."""
        for due in pending_erasures(self._journal):
            self._finish(RetractRequest(expert=due.expert, worker=due.worker, reason=due.reason, erase=True))

    def _finish(self, request: RetractRequest) -> None:
        retraction = self._committer.submit(lambda transaction: self._retract(transaction, request), alone=True)
        erasure = self._committer.submit(lambda transaction: self._erase(transaction, request), alone=True)

        def end(transaction: Transaction) -> None:
            failed = retraction.exception() or erasure.exception()
            if failed is None:
                finish_erasure(self._journal, request.expert, request.worker)
                return
            named = {"expert": request.expert, "worker": request.worker}
            _log.error("erasure_not_finished", **named, reason=str(failed), again="at the next start")

        self._committer.submit(end, alone=True)

    def _noted(self, transaction: Transaction, request: RetractRequest) -> bool:
        """Note the withdrawal, if an update of the worker ever landed or waits in quarantine; whether one did."""
        transaction.expert(request.expert)
        gave = bool(
            stored_updates(self._journal, request.expert, request.worker)
            or transaction.quarantine.of_worker(request.expert, request.worker)
        )
        if gave:
            at = self._committer.clock()
            request_erasure(self._journal, ErasureRequest(request.expert, request.worker, request.reason, at))
        return gave

    async def _without(self, request: RetractRequest, gave: bool) -> ChangeResult:
        try:
            return await self._undo.retract(request)
        except RefusedError as error:
            if error.code != "nothing_to_retract" or not gave:
                await self._done(request)  # nothing was changed
                raise
            return change_result(self._committer.coordinator.transaction(), request.expert)

    def _retract(self, transaction: Transaction, request: RetractRequest) -> None:
        if self._holds(transaction, request):
            self._undo.retract_now(transaction, request)

    def _holds(self, transaction: Transaction, request: RetractRequest) -> bool:
        """Whether the newest version of the expert contains an update of the worker."""
        chain = lineages(self._journal.events(request.expert))[transaction.expert(request.expert).version]
        return any(update.worker == request.worker for update in Lineage.updates(chain))

    def _erase(self, transaction: Transaction, request: RetractRequest) -> ErasureReport | None:
        """Erase the worker's contributions, unless the newest version contains any of them again."""
        if self._holds(transaction, request):
            return None
        name, worker, at = request.expert, request.worker, self._committer.clock()
        retract_held(transaction, name, worker, request.reason, at)
        expert, updates = transaction.expert(name), stored_updates(self._journal, name)
        mine = {update.digest for update in updates if update.worker == worker}
        # Equal bytes are one blob, whoever sent them.
        mine -= {update.digest for update in updates if update.worker != worker}
        mine -= self._journal.named_elsewhere(name, mine) | transaction.quarantine.digests()
        self._history.snapshot(expert)
        snapshots = self._journal.snapshots(name)
        holding = made_of(self._journal.events(name), snapshots, worker)
        record_release(self._journal, ReleasedBytes(name, worker, expert.version, "erase", at))
        failpoints.reached("erase.noted")
        self._history.erasures += 1
        needed = {digest for version, digest in snapshots.items() if version not in holding}
        # The rows last: whoever does it again after a kill finds by them which snapshots' bytes have to go.
        self._blobs.delete(*((mine | {snapshots[version] for version in holding}) - needed))
        failpoints.reached("erase.blobs_gone")
        for version in holding:
            self._journal.drop_snapshot(name, version)
        statistics = self._reported.erase(name, worker) + self._statistics.erase(transaction, name, worker, at)
        self._journal.forget_log()
        self._roster.forget(name, worker)
        erased = ErasureReport(len(mine), len(holding), statistics, self._history.left_in_the_gateway(name, worker))
        _log.warning("erased", expert=name, worker=worker, reason=request.reason, **asdict(erased))
        return erased
