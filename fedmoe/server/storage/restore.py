"""Restores a backup into a state directory, as a new incarnation, after checking every byte.

The blobs come first and the journal last, by one rename. Killed before that, the folder has no journal: a coordinator
does not start on it, and the same command goes on where it was.
"""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fedmoe.runtime import failpoints
from fedmoe.runtime.files import fsync_folder, write_atomic
from fedmoe.server.storage.acknowledged import AcknowledgedFile
from fedmoe.server.storage.audit import AUDIT_HEAD
from fedmoe.server.storage.backup import BLOBS, JOURNAL, TLS, check_backup, place_all, remove
from fedmoe.server.storage.migration import migrate
from fedmoe.server.storage.sqlite import connect, other_schema
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.server.storage.state_dir import StateDirError, lock_state
from fedmoe.server.storage.tables import SCHEMA_VERSION

_MARK = "restoring"
_NEW_JOURNAL = ".journal.sqlite-restoring"
# A folder with nothing but these is empty: the lock is ours, a disk of its own has the other.
_NOTHING = {"lock", "lost+found", TLS}


@dataclass(frozen=True, slots=True)
class RestoreReport:
    """A state made of a backup: the incarnation that begins, the one before it, the events there are.

    `moved` is where what was in the folder before lies now.
    """

    incarnation: str
    before: str
    events: int
    moved: Path | None


def restore(backup: Path, state: Path, replace: bool = False) -> RestoreReport:
    """Make the state directory `state` of a backup; what is in it already is only moved aside with `replace`.

    Raises StateDirError or StorageFailedError.
    """
    content = check_backup(backup)
    if content.schema > SCHEMA_VERSION:
        raise other_schema(str(backup / JOURNAL), str(content.schema))
    try:
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        lock = lock_state(state)
    except OSError as error:
        raise StateDirError(f"{state} cannot be used: {error.strerror}; choose another --state-dir") from error
    try:
        moved = _make_room(state, replace, content.incarnation)
        incarnation = _fill(backup, state)
    except OSError as error:
        raise StateDirError(
            f"{error.filename or state}: {error.strerror or error}; nothing starts on {state} like this. "
            "Mend it and give the same command again"
        ) from error
    finally:
        lock.close()
    return RestoreReport(incarnation, content.incarnation, content.events, moved)


def _make_room(state: Path, replace: bool, name: str) -> Path | None:
    """Leave the folder empty; where what was in it went."""
    there = {entry.name for entry in state.iterdir()} - _NOTHING
    if _MARK in there and not _holds_events(state / JOURNAL):
        remove(state, keep=_NOTHING | {entry for entry in there if entry.startswith("before-restore-")})
        return None
    if not there:
        return None
    if not replace:
        raise StateDirError(
            f"{state} is not empty; restore into an empty or new folder, or pass --replace, which moves what is there "
            "into a folder inside it"
        )
    numbers = (f"before-restore-{number}" for number in range(1, len(there) + 2))
    moved = next(state / number for number in numbers if number not in there)
    moved.mkdir(mode=0o700)
    for entry in sorted(there):
        if not entry.startswith("before-restore-"):
            os.rename(state / entry, moved / entry)
    fsync_folder(moved)
    return moved


def _holds_events(journal: Path) -> bool:
    """Whether a journal is there and not the empty one that a start on half a restore makes before it is refused."""
    if not journal.exists():
        return False
    try:
        with closing(connect(journal, "ro")) as connection:
            return bool(connection.execute("SELECT count(*) FROM events").fetchone()[0])
    except sqlite3.Error:
        return journal.stat().st_size > 0


def _fill(backup: Path, state: Path) -> str:
    """Blobs first, then the journal, whose history goes on under another name; that name."""
    write_atomic(state / _MARK, str(backup).encode())
    (state / BLOBS).mkdir(mode=0o700)
    place_all(backup / BLOBS, state / BLOBS)
    fsync_folder(state / BLOBS)
    failpoints.reached("restore.blobs_placed")
    write_atomic(state / _NEW_JOURNAL, (backup / JOURNAL).read_bytes())
    migrated = migrate(state / _NEW_JOURNAL)
    if migrated is not None:
        migrated.copy.unlink()  # the backup is one
    with closing(SqliteJournal(state / _NEW_JOURNAL)) as journal:
        journal.set_meta(AUDIT_HEAD, "")  # the audit log is no part of a backup: a new one begins
        incarnation, head = journal.begin_incarnation(), journal.head
    with closing(AcknowledgedFile(state / "acknowledged")) as acknowledged:
        acknowledged.start_anew(head)
    failpoints.reached("restore.before_journal")
    os.rename(state / _NEW_JOURNAL, state / JOURNAL)
    (state / _MARK).unlink()
    fsync_folder(state)
    return incarnation
