"""Erasure of a worker's contributions to an expert: bytes are deleted, rows and digests stay.

The expert is taken back to what it is without the worker first. Then a snapshot of that stands, so that no later start
needs anything older, and only then bytes go; `withdrawal` does the one after the other.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

import structlog

from fedmoe.coordinator import Transaction
from fedmoe.federation.lineage import Lineage
from fedmoe.federation.transitions import lineages
from fedmoe.runtime import failpoints
from fedmoe.server.history.history import History
from fedmoe.server.history.pruning import made_of
from fedmoe.server.statistics.contributors import Contributors
from fedmoe.server.statistics.data_statistics import DataStatisticsStore
from fedmoe.server.statistics.reported_statistics import ReportedStatistics
from fedmoe.server.storage.blobs import BlobStore
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.released_bytes import (
    ReleasedBytes,
    record_release,
    stored_updates,
)
from fedmoe.server.updates.landing import retract_held
from fedmoe.wire.contract.messages import RetractRequest

_log = structlog.get_logger("fedmoe.coordinator")


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


@dataclass(frozen=True, slots=True)
class Erasure:
    """Erases workers from experts; for the committer, in a group of its own."""

    journal: Journal
    blobs: BlobStore
    history: History
    statistics: DataStatisticsStore
    reported: ReportedStatistics
    roster: Contributors

    def gave(self, transaction: Transaction, expert: str, worker: str) -> bool:
        """Whether an update of the worker ever landed on the expert, or waits in quarantine."""
        return bool(stored_updates(self.journal, expert, worker) or transaction.quarantine.of_worker(expert, worker))

    def holds(self, transaction: Transaction, expert: str, worker: str) -> bool:
        """Whether the newest version of an expert contains an update of a worker."""
        chains = lineages(self.journal.events(expert))
        return any(update.worker == worker for update in Lineage.updates(chains[transaction.expert(expert).version]))

    def erase(self, transaction: Transaction, request: RetractRequest, at: float) -> ErasureReport:
        """Erase a worker's contributions to an expert whose newest version contains none of them any more."""
        name, worker = request.expert, request.worker
        retract_held(transaction, name, worker, request.reason, at)
        expert, updates = transaction.expert(name), stored_updates(self.journal, name)
        mine = {update.digest for update in updates if update.worker == worker}
        # Equal bytes are one blob, whoever sent them.
        mine -= {update.digest for update in updates if update.worker != worker}
        mine -= self.journal.named_elsewhere(name, mine) | transaction.quarantine.digests()
        self.history.snapshot(expert)
        snapshots = self.journal.snapshots(name)
        holding = made_of(self.journal.events(name), snapshots, worker)
        record_release(self.journal, ReleasedBytes(name, worker, expert.version, "erase", at))
        failpoints.reached("erase.noted")
        self.history.erasures += 1
        kept = {digest for version, digest in snapshots.items() if version not in holding}
        # The rows last: whoever does it again after a kill finds by them which snapshots' bytes have to go.
        for digest in (mine | {snapshots[version] for version in holding}) - kept:
            self.blobs.delete(digest)
        failpoints.reached("erase.blobs_gone")
        for version in holding:
            self.journal.drop_snapshot(name, version)
        statistics = self.reported.erase(name, worker) + self.statistics.erase(transaction, name, worker, at)
        self.journal.forget_log()
        self.roster.forget(name, worker)
        erased = ErasureReport(len(mine), len(holding), statistics, self.history.left_in_the_gateway(name, worker))
        _log.warning("erased", expert=name, worker=worker, reason=request.reason, **asdict(erased))
        return erased
