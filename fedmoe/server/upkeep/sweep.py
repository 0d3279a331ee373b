"""Daily sweep of a running coordinator: moves unnamed blobs to the trash, removes old trash.

In a folder a blob goes to the trash when two sweeps, a day apart by a clock that nobody sets, find it with no name in
the journal, which is read in pages, so that no push waits for all of it. A shared store sweeps itself, by the age of
what it holds, and only here: at a start a journal may be an older one.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from fedmoe.runtime.errors import RefusedError
from fedmoe.server.history.history import History
from fedmoe.server.storage.blobs import UNNAMED_SECONDS, BlobStore, StorageFailedError, SweepReport
from fedmoe.server.storage.folder_blobs import FolderBlobStore, Trash
from fedmoe.server.storage.journal import Journal
from fedmoe.server.storage.released_bytes import newest_updates

_log = structlog.get_logger("fedmoe.disk")

#: Which file it is: inode and time of change in nanoseconds. The same bytes stored once more are another file.
Identity = tuple[int, int]


class DailySweep:
    """Sweeps when it is due; `clock` gives seconds since 1970, `monotonic` seconds that only grow."""

    def __init__(
        self,
        journal: Journal,
        blobs: BlobStore,
        history: History,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._journal = journal
        self._blobs = blobs
        self._history = history
        self._clock = clock
        self._monotonic = monotonic
        self._next = monotonic() + UNNAMED_SECONDS
        self._seen: dict[str, Identity] = {}

    def due(self) -> bool:
        """Whether a day has passed since the start, or the last sweep."""
        return self._monotonic() >= self._next

    def sweep(self) -> SweepReport:
        """Move blobs that have been unnamed for a day to the trash, and delete old trash."""
        self._next = self._monotonic() + UNNAMED_SECONDS
        try:
            now, newest = self._clock(), max((update.at for update in newest_updates(self._journal, 1)), default=0.0)
            if isinstance(self._blobs, FolderBlobStore):
                report = self._sweep_folder(self._blobs, now, newest)
            elif self._journal.former_incarnations():
                # What the history before has stored is in no row of this one, and may be all that is left of it.
                _log.info("not_swept", reason="another history has stored blobs here before")
                report = SweepReport()
            else:
                report = self._blobs.sweep(self._history.references(), now, newest)
        except (OSError, RefusedError, StorageFailedError) as error:
            _log.error("sweep_failed", reason=str(error), again="in a day, and at the next start")
            return SweepReport()
        if report != SweepReport():
            _log.warning("swept", removed=report.removed, to_trash=report.to_trash)
        return report

    def _sweep_folder(self, blobs: FolderBlobStore, now: float, newest: float) -> SweepReport:
        """Move blobs that were unnamed at the last sweep too."""
        trash, unnamed = Trash(blobs.folder / "trash"), self._unnamed(blobs)
        old = [name for name, identity in unnamed.items() if self._seen.get(name) == identity]
        moved = sum(_moved(blobs, name, unnamed[name], trash, now) for name in old)
        self._seen = unnamed
        return SweepReport(trash.empty(min(now, newest)), moved)

    def _unnamed(self, blobs: FolderBlobStore) -> dict[str, Identity]:
        """Blobs that no row names. They are listed before the rows are read, so that new ones are not missed."""
        unnamed = {name: identity for name in blobs.digests() if (identity := _identity(blobs, name))}
        for digest in self._journal.named_blobs():
            unnamed.pop(digest, None)
        for digest in self._history.quarantined_blobs():
            unnamed.pop(digest, None)
        return unnamed


def _identity(blobs: FolderBlobStore, name: str) -> Identity | None:
    try:
        status = blobs.path(name).lstat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


def _moved(blobs: FolderBlobStore, name: str, identity: Identity, trash: Trash, now: float) -> bool:
    """Move a blob, unless somebody has just stored the same bytes."""
    with blobs.pins.unpinned(name) as free:
        if not free or _identity(blobs, name) != identity:
            return False
        trash.add(blobs.path(name), now)
    return True
