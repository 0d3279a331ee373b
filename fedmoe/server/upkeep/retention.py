"""Retention: deletes the oldest updates' bytes above a bound, and logs from which version undo works.

Snapshots, rows and digests stay. An expert's updates only go up to a version whose snapshot is there and can be read,
so that recovery never needs them. All of it is worked out beside the pushes; only the removal is a decision in their
order, so that nothing that has just arrived is taken for old.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import structlog

from fedmoe.coordinator import CentralCoordinator, Transaction
from fedmoe.federation.events import Event, UpdateAccepted
from fedmoe.server.history.history import History
from fedmoe.server.history.pruning import first_to_go, prune_plan
from fedmoe.server.storage.blobs import CorruptBlobError, MissingBlobError, StorageFailedError
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.released_bytes import ReleasedBytes, record_release, stored_updates
from fedmoe.server.updates.committer import Committer

_log = structlog.get_logger("fedmoe.disk")

_KEEP_BYTES = "keep_bytes"
# Room for a while, so that the past is not read again for every update.
_DOWN_TO = 0.9
_AT_ONCE = 256


@dataclass(frozen=True, slots=True)
class RetentionBound:
    """The most bytes of updates that are kept, and where the number is from, in words."""

    most: int
    basis: str

    @property
    def gb(self) -> float:
        """In GB of 10^9 bytes."""
        return round(self.most / 1e9, 3)


def retention_bound(keep_gb: float | None, journal: Journal, blobs: FolderBlobStore) -> RetentionBound:
    """The bound asked for, in GB of 10^9 bytes; else half of the disk that was free at the first start without one."""
    if keep_gb is not None:
        return RetentionBound(int(keep_gb * 1e9), "--keep-gb")
    kept = journal.meta(_KEEP_BYTES)
    if kept is None:
        # What is there already stays: a state that was made before there was a bound does not shrink at once.
        kept = str(sum(blobs.sizes().values()) + shutil.disk_usage(blobs.folder).free // 2)
        journal.set_meta(_KEEP_BYTES, kept)
    return RetentionBound(int(kept), "half of the disk that was free at the first start; --keep-gb sets another")


class Retention:
    """Keeps the bytes of updates below a bound, in a thread of its own."""

    def __init__(
        self,
        coordinator: CentralCoordinator,
        journal: Journal,
        blobs: FolderBlobStore,
        history: History,
        committer: Committer,
        most: int,
        clock: Callable[[], float],
    ) -> None:
        self._coordinator = coordinator
        self._journal = journal
        self._blobs = blobs
        self._history = history
        self._committer = committer
        self._most = most
        self._clock = clock
        self._due = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedmoe-retention", daemon=True)
        # Written by the committer, beside the work: what arrived since it began, and whose past changed.
        self._bytes = 0
        self._arrived: set[str] = set()
        self._changed: set[str] = set()
        self._warned_at = 0

    def start(self) -> None:
        """Start; what is too much already goes first."""
        self._due.set()
        self._thread.start()

    def close(self) -> None:
        """Stop soon; safe to call before `start` and more than once."""
        self._closing.set()
        self._due.set()
        if self._thread.is_alive():
            self._thread.join()

    def observe(self, events: Iterable[Event]) -> None:
        """Events that were journalled; for the committer."""
        for event in events:
            if isinstance(event, UpdateAccepted):
                self._arrived.add(event.digest)
                self._bytes += self._blobs.size(event.digest)
            else:
                self._changed.add(getattr(event, "expert", ""))
        if self._bytes > self._most:
            self._due.set()

    def _run(self) -> None:
        while True:
            self._due.wait()
            self._due.clear()
            if self._closing.is_set():
                return
            try:
                self.keep_below()
            except StorageFailedError as error:
                self._committer.fail(str(error))
            except Exception as error:
                # Nothing is lost by it; the disk's reserve still refuses pushes before it is full.
                _log.error("retention_failed", reason=str(error) or repr(error))

    def keep_below(self) -> None:
        """Delete the oldest updates' bytes until the rest are below the bound."""
        sizes = self._measure()
        if self._bytes <= self._most:
            return
        updates = [(one.expert, one.version, one.digest) for one in stored_updates(self._journal)]
        for expert, version in first_to_go(updates, sizes, int(self._most * _DOWN_TO)).items():
            if self._closing.is_set():
                return
            self._release(expert, version, sizes)
        self._measure()
        if self._bytes > self._most and self._bytes > 1.1 * self._warned_at:
            self._warned_at = self._bytes
            _log.warning("keep_gb_not_met", kept=self._bytes, most=self._most, reason="the versions kept need them all")

    def _measure(self) -> dict[str, int]:
        """The sizes of the updates' blobs that are there; from now on what arrives is counted."""
        self._arrived, self._changed, self._bytes = set(), set(), 0
        there = self._blobs.sizes()
        sizes = {one.digest: there[one.digest] for one in stored_updates(self._journal) if one.digest in there}
        self._bytes += sum(sizes[digest] for digest in sizes.keys() - self._arrived)
        return sizes

    def _release(self, expert: str, version: int, sizes: dict[str, int]) -> None:
        """Delete an expert's updates up to the first version from `version` on that has a snapshot."""
        oldest = self._snapshot_from(expert, version)
        events = list(self._journal.events(expert))
        found = prune_plan(events, self._journal.snapshots(expert), self._coordinator.expert(expert).version, oldest)
        gone = found.updates - self._history.quarantined_blobs() - self._journal.named_elsewhere(expert, found.updates)
        digests = sorted(gone & sizes.keys())
        if not digests:
            return
        freed = sum(sizes[digest] for digest in digests)
        _log.warning("undo_ends", expert=expert, version=oldest, updates=len(digests), bytes=freed, most=self._most)
        record_release(self._journal, ReleasedBytes(expert, None, oldest, "keep_gb", self._clock()))
        for start in range(0, len(digests), _AT_ONCE):
            piece = digests[start : start + _AT_ONCE]
            self._committer.submit(partial(self._remove, expert, piece), alone=True).result()

    def _snapshot_from(self, expert: str, version: int) -> int:
        """The first version from this one on whose snapshot can be read; the newest one is made where there is none."""
        for held, digest in sorted(self._journal.snapshots(expert).items()):
            if held >= version and self._readable(digest):
                return held
        return self._committer.submit(
            lambda transaction: self._history.snapshot(transaction.expert(expert)), alone=True
        ).result()

    def _readable(self, digest: str) -> bool:
        try:
            self._blobs.read(digest)
        except (MissingBlobError, CorruptBlobError):
            return False
        return True

    def _remove(self, expert: str, digests: list[str], transaction: Transaction) -> None:
        """For the committer: updates since may have the same bytes, and a rollback may need old ones again."""
        if expert in self._changed:
            return
        for digest in digests:
            if digest not in self._arrived:
                self._blobs.delete(digest)
