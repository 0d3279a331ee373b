"""Disk use of updates: the oldest bytes above a bound are deleted; a report at start says how long the disk lasts.

Snapshots, rows and digests stay. An expert's updates only go up to a version whose snapshot is there and can be read,
so that recovery never needs them. All of it is worked out beside the pushes; only the removal is a decision in their
order, so that nothing that has just arrived is taken for old.
"""

from __future__ import annotations

import statistics
import threading
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import structlog

from fedmoe.coordinator import Transaction
from fedmoe.experts import ExpertModel
from fedmoe.federation.events import Event, UpdateAccepted
from fedmoe.server.history.history import History
from fedmoe.server.history.pruning import first_to_go, prune_plan
from fedmoe.server.storage.blobs import BlobStore, CorruptBlobError, MissingBlobError, StorageFailedError
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.released_bytes import ReleasedBytes, newest_updates, record_release, stored_updates
from fedmoe.server.updates.committer import Committer

_log = structlog.get_logger("fedmoe.disk")

_KEEP_BYTES = "keep_bytes"
# Room for a while, so that the past is not read again for every update.
_DOWN_TO = 0.9
_AT_ONCE = 256

#: What a worker is assumed to do until updates have arrived: its default interval, in float32.
ASSUMED_SECONDS = 10.0
_BYTES = 4
_HOUR = 3600.0
_LOOKED_AT = 64


@dataclass(frozen=True, slots=True)
class RetentionBound:
    """The most bytes of updates that are kept, None for all, and where the number is from, in words."""

    most: int | None
    basis: str

    @property
    def gb(self) -> float | None:
        """In GB of 10^9 bytes."""
        return None if self.most is None else round(self.most / 1e9, 3)


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes of updates that are stored, and bytes that are free there; None where there is no bound."""

    stored: int
    free: int | None


def retention_bound(keep_gb: float | None, journal: Journal, blobs: BlobStore) -> RetentionBound:
    """The bound asked for, in GB of 10^9 bytes; else half of the disk that was free at the first start without one."""
    if keep_gb is not None:
        return RetentionBound(int(keep_gb * 1e9), "--keep-gb")
    free = blobs.free()
    if free is None:
        return RetentionBound(None, "an object store has no end; --keep-gb sets one")
    most = journal.meta(_KEEP_BYTES)
    if most is None:
        # What is there already stays: a state that was made before there was a bound does not shrink at once.
        most = str(sum(blobs.sizes().values()) + free // 2)
        journal.set_meta(_KEEP_BYTES, most)
    return RetentionBound(int(most), "half of the disk that was free at the first start; --keep-gb sets another")


class Retention:
    """Keeps the bytes of updates below `most`, in a thread of its own."""

    def __init__(self, committer: Committer, history: History, blobs: BlobStore, most: int) -> None:
        self._committer = committer
        self._journal = committer.journal
        self._history = history
        self._blobs = blobs
        self._most = most
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

    def usage(self) -> DiskUsage:
        """What updates take now; about, while old ones are being deleted."""
        return DiskUsage(self._bytes, self._blobs.free())

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
        updates = [(update.expert, update.version, update.digest) for update in stored_updates(self._journal)]
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
        stored = {update.digest for update in stored_updates(self._journal)}
        sizes = {digest: there[digest] for digest in stored & there.keys()}
        self._bytes += sum(sizes[digest] for digest in sizes.keys() - self._arrived)
        return sizes

    def _release(self, expert: str, version: int, sizes: dict[str, int]) -> None:
        """Delete an expert's updates up to the first version from `version` on that has a snapshot."""
        oldest = self._snapshot_from(expert, version)
        events, newest = list(self._journal.events(expert)), self._committer.coordinator.expert(expert).version
        updates = prune_plan(events, self._journal.snapshots(expert), newest, oldest).updates
        unneeded = updates - self._history.quarantined_blobs() - self._journal.named_elsewhere(expert, updates)
        digests = sorted(unneeded & sizes.keys())
        if not digests:
            return
        freed = sum(sizes[digest] for digest in digests)
        _log.warning("undo_ends", expert=expert, version=oldest, updates=len(digests), bytes=freed, most=self._most)
        record_release(self._journal, ReleasedBytes(expert, None, oldest, "keep_gb", self._committer.clock()))
        for start in range(0, len(digests), _AT_ONCE):
            piece = digests[start : start + _AT_ONCE]
            self._committer.submit(partial(self._remove, expert, piece), alone=True).result()

    def _snapshot_from(self, expert: str, version: int) -> int:
        """The first version from this one on whose snapshot can be read; the newest one is made where there is none."""
        for held, digest in sorted(self._journal.snapshots(expert).items()):
            if held >= version:
                with suppress(MissingBlobError, CorruptBlobError):
                    self._blobs.read(digest)
                    return held
        return self._committer.submit(
            lambda transaction: self._history.snapshot(transaction.expert(expert)), alone=True
        ).result()

    def _remove(self, expert: str, digests: list[str], transaction: Transaction) -> None:
        """For the committer: updates since may have the same bytes, and a rollback may need old ones again."""
        if expert in self._changed:
            return
        self._blobs.delete(*(digest for digest in digests if digest not in self._arrived))


@dataclass(frozen=True, slots=True)
class Growth:
    """Bytes of an update, seconds between two of one worker, how many workers there are, and what that rests on."""

    update: float
    seconds: float
    workers: int
    basis: str

    @property
    def an_hour(self) -> float:
        """Bytes an hour and worker."""
        return self.update * _HOUR / self.seconds


def growth(
    parameters: int, min_sync_interval: float, newest: Iterable[UpdateAccepted], sizes: Mapping[str, int]
) -> Growth:
    """What to expect of the `newest` updates, oldest first, whose blobs have these `sizes`; else what is assumed.

    `parameters` are those of the largest expert.
    """
    seen = [update for update in newest if update.digest in sizes]
    gaps = _gaps(seen)
    if gaps:
        workers = {(update.expert, update.worker) for update in seen}
        size = statistics.fmean(sizes[update.digest] for update in seen)
        return Growth(size, statistics.median(gaps), len(workers), f"as the last {len(seen)} updates")
    seconds = max(ASSUMED_SECONDS, min_sync_interval)
    return Growth(parameters * _BYTES, seconds, 1, f"assumed: float32 and an update every {seconds:g} s")


def _gaps(updates: list[UpdateAccepted]) -> list[float]:
    """Seconds between two updates that followed each other, of every worker of every expert."""
    times: dict[tuple[str, str], list[float]] = {}
    for update in updates:
        times.setdefault((update.expert, update.worker), []).append(update.at)
    return [later - earlier for moments in times.values() for earlier, later in pairwise(moments) if later > earlier]


def report_disk(
    journal: Journal,
    blobs: BlobStore,
    min_sync_interval: float,
    bound: RetentionBound,
    experts: Iterable[ExpertModel],
) -> None:
    """Say in the log how long the disk lasts, with the experts there are."""
    newest = newest_updates(journal, _LOOKED_AT)
    sizes = {update.digest: blobs.size(update.digest) for update in newest}
    largest = max(expert.manifest.layout.size for expert in experts)
    estimate = growth(largest, min_sync_interval, newest, {digest: size for digest, size in sizes.items() if size})
    line = disk_line(estimate, blobs.free(), bound.most)
    _log.info("disk", says=line, kept_gb=bound.gb, kept_by=bound.basis)


def disk_line(estimate: Growth, free: int | None, most: int | None) -> str:
    """The line: bytes an update, an hour and worker, and the hours until the disk, or the bytes to keep, are full.

    `free` and `most` are None where there is no bound.
    """
    workers = "one worker" if estimate.workers == 1 else f"{estimate.workers} workers"

    def lasts(room: int) -> str:
        return f"{_long(room / (estimate.an_hour * estimate.workers))} of {workers}"

    rate = f"{_size(estimate.update)} an update, {_size(estimate.an_hour)} an hour and worker"
    rate += f" ({estimate.basis})" if free is None else f", {_size(free)} free = {lasts(free)} ({estimate.basis})"
    if most is None:
        return f"{rate}; all updates are kept"
    return f"{rate}; the newest {_size(most)} of updates are kept, {lasts(most)}"


def _size(count: float) -> str:
    power = next((power for power in range(4) if count / 1000**power < 999.5), 4)
    return f"{count / 1000**power:.3g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _long(hours: float) -> str:
    if hours < 1:
        return f"{hours * 60:.2g} min"
    return f"{hours:.2g} h" if hours < 72 else f"{hours / 24:.3g} days"
