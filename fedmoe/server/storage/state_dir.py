"""The coordinator's state directory: opened, locked, checked; one process owns it."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import structlog

from fedmoe.runtime.files import FolderInUseError, FolderLock, lock_folder
from fedmoe.runtime.placement import mount_of, read_mounts
from fedmoe.server.storage.acknowledged import AcknowledgedFile, JournalGap
from fedmoe.server.storage.audit import AUDIT_FILE
from fedmoe.server.storage.blobs import NO_ROOM, BlobStore, StorageFailedError, no_room_to_start
from fedmoe.server.storage.chained_journal import ChainedJournal
from fedmoe.server.storage.folder_blobs import FolderBlobStore
from fedmoe.server.storage.migration import migrate
from fedmoe.server.storage.object_store import open_blobs, refuse_without_url
from fedmoe.server.storage.sqlite import opening_problem
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.server.storage.tables import SCHEMA_VERSION

_FILE = "journal.sqlite"
#: In a folder that a federation is being moved to; says where it comes from.
MOVING_MARK = "moving"
_log = structlog.get_logger("fedmoe.journal")


class StateDirError(Exception):
    """The state directory cannot be used; the message says why and what to do."""


@dataclass(frozen=True, slots=True)
class Database:
    """Where the journal is in the place of a file: a URL for `postgres_engine`; whether losing commits is accepted."""

    url: str
    accept_loss: bool = False


@dataclass(frozen=True)
class StateDir:
    """An open, locked state directory; the lock is held as long as the process lives or until `close`.

    The journal is in it, or in a database: then the rest of it is this machine's own.
    """

    path: Path
    journal: ChainedJournal
    blobs: BlobStore
    acknowledged: AcknowledgedFile
    lock: FolderLock
    opened: Mapping[Path, tuple[int, int]]

    @classmethod
    def open(
        cls,
        path: Path,
        accept_older_journal: bool = False,
        skip_damaged: bool = False,
        allow_network_fs: bool = False,
        check: Callable[[Path], None] = lambda journal: None,
        blobs_url: str | None = None,
        database: Database | None = None,
    ) -> StateDir:
        """Create or open the folder and lock it; refuses one that another coordinator uses.

        Blobs lie in its folder, or in the object store at `blobs_url`; the folder is the spool then.
        `check` looks at the journal before anything in the folder is changed, and raises for one it will not have.
        A journal that lacks what was acknowledged is refused with StorageFailedError, or accepted as a new incarnation.
        """
        _check_file_system(path, allow_network_fs)
        _make_usable(path)
        if (path / MOVING_MARK).exists():
            raise StateDirError(
                f"{path} holds half of a federation: 'fedmoe state migrate' was ended before all of it was moved. Give "
                "that command again; the source is as it was"
            )
        lock = lock_state(path)
        opened = ExitStack()
        opened.callback(lock.close)
        if database is None and not (path / _FILE).exists():
            opened.callback(_remove_journal, path / _FILE)
        try:
            if database is None:
                _prepare(path / _FILE, check)
            acknowledged = AcknowledgedFile(path / "acknowledged")
            opened.callback(acknowledged.close)
            journal = _open_journal(path / _FILE, database, acknowledged, skip_damaged)
            opened.callback(journal.close)
            folder = FolderBlobStore(path / "blobs")
            parts = [path, folder.folder] if database is not None else [path, path / _FILE, folder.folder]
            if blobs_url is None:
                refuse_without_url(journal)
            blobs = folder if blobs_url is None else open_blobs(blobs_url, folder, journal)
            state = cls(path, journal, blobs, acknowledged, lock, {part: _identity(part) for part in parts})
            state._check_whole(accept_older_journal)
            opened.pop_all()
            return state
        except BaseException as error:
            opened.close()
            if isinstance(error, OSError):
                if error.errno in NO_ROOM:
                    raise no_room_to_start(path) from error
                raise StateDirError(f"{path} cannot be used: {error}; fix it or choose another --state-dir") from error
            if isinstance(error, sqlite3.Error):
                raise opening_problem(error, path / _FILE) from error
            raise

    def problem(self) -> str | None:
        """Why what is written now would be lost: the folder, or a part of it, is no longer the one that was opened.

        SQLite and open files would not notice: they write on into what nobody can reach any more.
        """
        for file, identity in self.opened.items():
            try:
                current = _identity(file)
            except OSError as error:
                return f"{file} is gone: {error.strerror}"
            if current != identity:
                return f"{file} was replaced by another one"
        return None

    def close(self) -> None:
        """Close the journal and give the lock back."""
        self.journal.close()
        self.acknowledged.close()
        self.lock.close()

    def _check_whole(self, accept: bool) -> None:
        """Refuse a journal that lacks what was acknowledged, or let another incarnation begin with it."""
        noted, head = self.acknowledged.read(), self.journal.head
        lacking = self.journal.gap_since(noted) or self._blobs_alone()
        if lacking is None:
            if noted is None and head.changes:
                _log.warning("acknowledged_unknown", file=str(self.acknowledged.path), events=head.events)
            if accept:
                _log.warning("option_not_needed", option="--accept-older-journal", events=head.events)
        elif accept:
            self.journal.begin_incarnation()
            _log.warning("older_journal_accepted", reason=lacking.reason, incarnation=self.journal.head.incarnation)
        else:
            of_file = isinstance(self.journal, SqliteJournal)
            advice = f"{lacking.advice}, or 'fedmoe state restore BACKUP --state-dir {self.path}'"
            in_database = (
                "The database was put back to an older state, a standby that lagged behind took over, or it is another "
                "one: name the right one with --database-url"
            )
            raise StorageFailedError(
                f"the journal of {self.path} is not the newest: {lacking.reason}. "
                f"{advice if of_file else in_database}. To go on without what it lacks, start once with "
                "--accept-older-journal: a new incarnation begins, and blobs that it does not name are moved to "
                "blobs/trash after a day."
            )
        self.acknowledged.start_anew(self.journal.head)

    def _blobs_alone(self) -> JournalGap | None:
        """A registration is journalled before the first blob can arrive: blobs without one are of another journal."""
        if self.journal.head.events or self.journal.former_incarnations():
            return None
        alone = next(self.blobs.digests(), None) is not None
        return JournalGap("it is empty but there are blobs of updates") if alone else None


def _make_usable(path: Path) -> None:
    """Have the folder, writable for this user alone, with nothing odd in the place of a file."""
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise StateDirError(f"cannot create {path}: {error.strerror}; choose another --state-dir") from error
    if not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise StateDirError(f"{path} is not writable for this user; fix its owner or choose another --state-dir")
    if path.stat().st_mode & 0o002:
        raise StateDirError(f"anybody may write to {path}; run 'chmod 700 {path}' first")
    for problem in odd_files(path):
        raise StateDirError(problem)


def _prepare(file: Path, check: Callable[[Path], None]) -> None:
    """Have a file for the journal, of this schema."""
    os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite itself would make it readable to others
    check(file)
    migrated = migrate(file)
    if migrated is not None:
        facts = {"schema": SCHEMA_VERSION, "before": migrated.before, "copy": str(migrated.copy)}
        _log.warning("migrated", journal=str(file), **facts)


def _remove_journal(file: Path) -> None:
    """A start that is refused leaves no journal that it made."""
    for part in (file, file.with_name(f"{file.name}-wal"), file.with_name(f"{file.name}-shm")):
        part.unlink(missing_ok=True)


def _open_journal(
    file: Path, database: Database | None, acknowledged: AcknowledgedFile, skip_damaged: bool
) -> ChainedJournal:
    if database is None:
        return SqliteJournal(file, acknowledged, skip_damaged)
    from fedmoe.server.storage.postgres_journal import PostgresJournal

    return PostgresJournal(database.url, acknowledged, skip_damaged, accept_loss=database.accept_loss)


def odd_files(path: Path) -> list[str]:
    """What lies in the place of a file that a state directory needs and is none, in words with what to do."""
    problems = []
    for name, what in (("acknowledged", "how far the journal had come"), (AUDIT_FILE, "the audit log")):
        file = path / name
        link = file.is_symlink() and name == "acknowledged"  # a log may lie elsewhere
        if link or (file.exists() and not file.is_file()):
            kind = "a symbolic link" if link else "a folder" if file.is_dir() else "no regular file"
            problems.append(
                f"{file}, which holds {what}, is {kind}; move it away. If the file itself is found, put it back, "
                "else the next start makes a new one"
            )
    return problems


def lock_state(path: Path) -> FolderLock:
    """Own a state directory until the returned lock is closed; raises StateDirError while a coordinator does."""
    try:
        return lock_folder(path)
    except FolderInUseError as error:
        raise StateDirError(
            f"{path} is in use by the coordinator with process id {error.holder}; "
            "stop it first or choose another --state-dir"
        ) from None


def _check_file_system(path: Path, allow: bool) -> None:
    """SQLite's locks and fsync do not hold on network file systems; the folder need not exist yet."""
    mount = mount_of(str(path.resolve()), read_mounts())
    if mount is None or not mount.network:
        return
    if not allow:
        raise StateDirError(
            f"{path} lies on the network file system {mount.kind} ({mount.source} at {mount.point}), where what was "
            "acknowledged may be lost in a crash. Choose a --state-dir on a local disk, or pass --allow-network-fs to "
            "use it all the same"
        )
    _log.warning("network_file_system", state_dir=str(path), type=mount.kind, mount=mount.point)


def _identity(file: Path) -> tuple[int, int]:
    status = file.stat()
    return status.st_dev, status.st_ino
