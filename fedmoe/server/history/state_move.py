"""A whole federation moved: from SQLite to PostgreSQL or back, from a folder to an object store or back.

The bytes go first, then all rows in one transaction, then everything is read back and compared. Killed before that is
done, the source is as it was, and the target is marked as incomplete: nothing starts on it, the same command goes on.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedmoe.runtime import failpoints
from fedmoe.runtime.files import fsync_folder, write_atomic
from fedmoe.server.history.verification import count_rebuilt
from fedmoe.server.storage.acknowledged import AcknowledgedFile, read_acknowledged
from fedmoe.server.storage.backup import TLS
from fedmoe.server.storage.blob_copies import check_blobs, copy_blobs
from fedmoe.server.storage.blobs import BlobStore, StorageFailedError
from fedmoe.server.storage.bucket import Bucket
from fedmoe.server.storage.chained_journal import ChainedJournal, rows_digest
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.object_store import ObjectBlobStore, open_blobs, url_of
from fedmoe.server.storage.postgres_journal import PostgresJournal
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.server.storage.state_dir import MOVING_MARK, Database, StateDirError, lock_state
from fedmoe.server.storage.tables import ALL_TABLES, BLOB_STORE, META, MOVED_FROM

_JOURNAL, _NEW_JOURNAL, _BLOBS = "journal.sqlite", ".journal.sqlite-moving", "blobs"
# What a coordinator has of its own beside journal and blobs: the audit log, marks of bodies that crashed it, and the
# key that workers pinned.
_LOCAL = ("audit*.jsonl", "in_flight/*", f"{TLS}/*")
# A folder with nothing but these is empty: the lock is ours, a disk of its own has the other.
_NOTHING = {"lock", "lost+found"}


@dataclass(frozen=True, slots=True)
class FederationPlace:
    """Where a federation is: its folder, and the database and the URL of the object store where there are any.

    Of a source the journal says where its blobs are.
    """

    folder: Path
    database: Database | None = None
    blobs: str | None = None


@dataclass(frozen=True, slots=True)
class MoveReport:
    """What was moved and read back: events, blobs and their bytes, experts that were rebuilt."""

    events: int
    blobs: int
    size: int
    experts: int
    incarnation: str


def move_state(source: FederationPlace, target: FederationPlace) -> MoveReport:
    """Move what is in `source` to `target`, which is empty or was left incomplete by the same move.

    Raises StateDirError, StorageFailedError, RefusedError, CorruptBlobError or MissingBlobError.
    """
    if source.folder.resolve() == target.folder.resolve():
        raise StateDirError(f"{source.folder} is both source and target; name a new folder to move into")
    with ExitStack() as opened:
        there, kept = opened.enter_context(_source(source))
        here, blobs = opened.enter_context(_target(target, str(source.folder.resolve()), there))
        copied = copy_blobs(kept, blobs)
        if copied.damaged:
            raise StorageFailedError(
                f"blob {copied.damaged[0]} is damaged, of {len(copied.damaged)}; nothing was moved"
            )
        failpoints.reached("move.blobs_placed")
        here.take_over(there)
        failpoints.reached("move.rows_placed")
        count, size = _compare(there, kept, here, blobs)
        experts = count_rebuilt(here, blobs)
        _copy_local(source.folder, target.folder)
        here.delete(META.delete().where(META.c.key == MOVED_FROM))
        head = here.head
    failpoints.reached("move.compared")
    with closing(AcknowledgedFile(target.folder / "acknowledged")) as acknowledged:
        acknowledged.start_anew(head)
    if target.database is None:
        os.replace(target.folder / _NEW_JOURNAL, target.folder / _JOURNAL)
        fsync_folder(target.folder)
    failpoints.reached("move.journal_placed")
    (target.folder / MOVING_MARK).unlink()
    fsync_folder(target.folder)
    return MoveReport(head.events, count, size, experts, head.incarnation)


@contextmanager
def _source(place: FederationPlace) -> Iterator[tuple[ChainedJournal, BlobStore]]:
    """A federation that nobody uses, of which nothing that was acknowledged is missing."""
    folder = place.folder
    if not folder.is_dir() or (place.database is None and not (folder / _JOURNAL).is_file()):
        raise StateDirError(f"{folder} is no state directory: there is no {_JOURNAL} in it, and no database was named")
    if (folder / MOVING_MARK).exists():
        raise StateDirError(f"{folder} holds half of {(folder / MOVING_MARK).read_text()}; move that there again first")
    with ExitStack() as opened:
        opened.callback(lock_state(folder).close)
        journal = _journal(folder / _JOURNAL, place.database, None)
        opened.callback(journal.close)
        gap = journal.gap_since(read_acknowledged(folder / "acknowledged"))
        if gap is not None:
            raise StorageFailedError(f"the journal of {folder} is not the newest: {gap.reason}. {gap.advice}")
        spool, url = FolderBlobStore(folder / _BLOBS), url_of(journal.meta(BLOB_STORE))
        yield journal, spool if url is None else ObjectBlobStore(Bucket(url), spool)


@contextmanager
def _target(place: FederationPlace, source: str, moved: ChainedJournal) -> Iterator[tuple[ChainedJournal, BlobStore]]:
    """An empty place, or one where the same move was begun."""
    folder, mark = place.folder, place.folder / MOVING_MARK
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StateDirError(f"cannot create {folder}: {error.strerror}; choose another folder") from error
    with ExitStack() as opened:
        opened.callback(lock_state(folder).close)
        there = {entry.name for entry in folder.iterdir()} - _NOTHING
        if there and not mark.exists():
            raise StateDirError(f"{folder} is not empty; name an empty or new folder to move into")
        if mark.exists() and mark.read_text() != source:
            raise StateDirError(f"{folder} holds half of {mark.read_text()}; move that again, or name another folder")
        if place.database is None and (folder / _JOURNAL).exists():
            os.replace(folder / _JOURNAL, folder / _NEW_JOURNAL)  # only the mark was left to be removed
        journal = _journal(folder / _NEW_JOURNAL, place.database, source)
        opened.callback(journal.close)
        if journal.meta(MOVED_FROM) is None:
            _refuse_another(journal, moved, resumed=mark.exists())
            journal.set_meta(MOVED_FROM, source)
        write_atomic(mark, source.encode())
        spool = FolderBlobStore(folder / _BLOBS)
        yield journal, spool if place.blobs is None else open_blobs(place.blobs, spool, journal)


def _journal(file: Path, database: Database | None, moved_from: str | None) -> ChainedJournal:
    if database is None:
        return SqliteJournal(file)
    return PostgresJournal(database.url, accept_loss=database.accept_loss, moved_from=moved_from)


def _refuse_another(journal: ChainedJournal, moved: ChainedJournal, resumed: bool) -> None:
    """Refuse a journal that holds anything, but for the very federation of a move into this folder that was cut off."""
    if not any(journal.query(table.select().limit(1)) for table in ALL_TABLES if table is not META):
        return
    same = _digests(journal) == _digests(moved)
    if same and not resumed:
        raise StateDirError(
            "the target's journal holds this very federation: it was moved there before. Start the coordinator on the "
            "folder of that move; for a second copy name an empty database"
        )
    if not same:
        raise StateDirError(
            f"the target's journal holds {journal.head.events} events of a federation already; name an empty database, "
            "or a schema of its own with ?options=-csearch_path%3DNAME"
        )


def _digests(journal: ChainedJournal) -> dict[str, str]:
    return {table.name: rows_digest(journal, table) for table in ALL_TABLES}


def _compare(there: ChainedJournal, kept: BlobStore, here: ChainedJournal, blobs: BlobStore) -> tuple[int, int]:
    """Read everything back; how many blobs there are and their bytes. Raises StorageFailedError for any difference."""
    before, after = _digests(there), _digests(here)
    different = sorted(name for name in before if before[name] != after[name])
    if different:
        raise StorageFailedError(f"the rows of {', '.join(different)} are not those of the source; move it again")
    sizes = kept.sizes()
    problems = check_blobs(blobs, sizes)
    if problems:
        raise StorageFailedError(f"{problems[0]}, of {len(problems)}; move it again")
    return len(sizes), sum(sizes.values())


def _copy_local(source: Path, target: Path) -> None:
    for pattern in _LOCAL:
        for file in source.glob(pattern):
            copy = target / file.relative_to(source)
            copy.parent.mkdir(exist_ok=True, mode=0o700)
            shutil.copy2(file, copy)
