"""Backup of a state directory, in use or not: copies journal and blobs, verifies them, then names the folder.

The coordinator may run meanwhile. SQLite's online backup copies the journal through a connection that only reads. Blobs
never change once they have their name, so they are linked where source and backup share a disk and copied where not:
first those that are there, then the journal, then those that came meanwhile. If one was let go of in between, it is
done again. What is not finished lies in `.NAME.unfinished`; nobody takes that for a backup, and the next one made under
the same name removes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from fedmoe import __version__
from fedmoe.runtime import failpoints
from fedmoe.runtime.files import FolderInUseError, fsync_file, fsync_folder, lock_folder, write_atomic
from fedmoe.server.storage.acknowledged import Head, read_acknowledged
from fedmoe.server.storage.blobs import NO_ROOM, CorruptBlobError, MissingBlobError, StorageFailedError
from fedmoe.server.storage.folder_blobs import blob_names
from fedmoe.server.storage.migration import migrate
from fedmoe.server.storage.object_store import noted_url
from fedmoe.server.storage.sqlite import complete_in_itself, connect, copy_to, error_code
from fedmoe.server.storage.sqlite_journal import SqliteJournal
from fedmoe.server.storage.state_dir import StateDirError
from fedmoe.server.storage.tables import INCARNATION, SCHEMA_VERSION

JOURNAL, BLOBS = "journal.sqlite", "blobs"
#: The coordinator's own key and certificate: of this machine, not of the journal. No backup has them, no restore moves
#: them away.
TLS = "tls"
#: The file by which a folder is known as a whole backup.
NOTE = "backup.json"
_LOCK = "lock"
_TRIES = 5


@dataclass(frozen=True, slots=True)
class Backup:
    """What a backup holds: `events` of the journal, `blobs` of `size` bytes in all, `linked` of them by hard links.

    `at` is seconds since 1970. `absent` blobs are named by the journal and were let go of before; `damaged` ones were
    left out, since no start needs them. The two hashes are of the journal's file and of the blobs' names. A journal of
    schema 1 has no incarnation. Blobs in an object store stay there: `blobs_at` is its URL.
    """

    fedmoe: str
    at: float
    incarnation: str
    events: int
    blobs: int
    size: int
    linked: int
    absent: int
    damaged: int
    journal_sha256: str
    names_sha256: str
    # That of backups from before it was noted.
    schema: int = 2
    blobs_at: str | None = None


def make_backup(state: Path, target: Path, at: float, check: Callable[[Path], None] = lambda folder: None) -> Backup:
    """Make a backup of a state directory, in use or not, as the new folder `target`.

    `check` looks at the whole of it before it gets its name, and raises for what a coordinator would not start on.
    Raises that, StateDirError or StorageFailedError, and leaves nothing behind then.
    """
    _refuse_target(state, target)
    unfinished = target.with_name(f".{target.name}.unfinished")
    with _said_in_words(state, target, unfinished), _own(unfinished):
        (unfinished / BLOBS).mkdir(mode=0o700)
        noted = read_acknowledged(state / "acknowledged")  # before the copy, which may only hold more
        linked, absent = _copy(state, unfinished)
        damaged = _damaged(unfinished / BLOBS)
        for name in damaged:
            (unfinished / BLOBS / name).unlink()
        earlier = migrate(unfinished / JOURNAL)  # what is checked is a journal of this schema
        incarnation, events = _checked_journal(state, unfinished / JOURNAL, noted)
        check(unfinished)
        complete_in_itself(unfinished / JOURNAL)
        if earlier is not None:
            os.replace(earlier.copy, unfinished / JOURNAL)
        remove(unfinished, keep={JOURNAL, BLOBS, _LOCK})
        names = blob_names(unfinished / BLOBS)
        backup = Backup(
            __version__,
            at,
            "" if earlier else incarnation,
            events,
            blobs=len(names),
            size=sum((unfinished / BLOBS / name).stat().st_size for name in names),
            linked=len(linked - damaged),
            absent=absent,
            damaged=len(damaged),
            journal_sha256=_sha256(unfinished / JOURNAL),
            names_sha256=_of_names(names),
            schema=earlier.before if earlier else SCHEMA_VERSION,
            blobs_at=noted_url(unfinished / JOURNAL),
        )
        failpoints.reached("backup.before_note")
        write_atomic(unfinished / NOTE, json.dumps(asdict(backup), indent=1).encode())
        fsync_folder(unfinished / BLOBS)
        (unfinished / _LOCK).unlink()
        failpoints.reached("backup.before_name")
        os.rename(unfinished, target)
        fsync_folder(target.parent)
    return backup


def _checked_journal(state: Path, copy: Path, noted: Head | None) -> tuple[str, int]:
    """Incarnation and events of the copied journal, if it holds all that was acknowledged before."""
    with closing(SqliteJournal(copy)) as journal:
        lacking = journal.gap_since(noted)
        if lacking is None:
            return journal.meta(INCARNATION) or "", journal.count()
    raise StorageFailedError(
        f"{state / JOURNAL} is not the newest: {lacking.reason}. No backup was made of it. {lacking.advice}, or go on "
        f"without the rest: 'fedmoe coordinator --state-dir {state} --accept-older-journal'."
    )


def read_backup(folder: Path) -> Backup:
    """What a folder says that it holds; raises StateDirError for one that is no whole backup."""
    try:
        return Backup(**json.loads((folder / NOTE).read_bytes()))
    except FileNotFoundError:
        raise StateDirError(
            f"{folder} is no backup: there is no {NOTE} in it. 'fedmoe state backup' makes one; one that was "
            "interrupted lies in a folder named .NAME.unfinished and is worth nothing"
        ) from None
    except (OSError, TypeError, ValueError) as error:
        raise StateDirError(f"{folder / NOTE} cannot be read ({error}); take another backup") from error


def check_backup(folder: Path) -> Backup:
    """The backup in a folder, if every byte is as it was made; raises StateDirError or StorageFailedError."""
    backup = read_backup(folder)
    try:
        names, sha256 = blob_names(folder / BLOBS), _sha256(folder / JOURNAL)
    except OSError as error:
        raise StorageFailedError(f"the backup {folder} is not whole: {error}; take another one") from error
    if sha256 != backup.journal_sha256:
        raise StorageFailedError(f"{folder / JOURNAL} is damaged: it is not the file that was backed up")
    if _of_names(names) != backup.names_sha256:
        raise StorageFailedError(f"{folder / BLOBS} holds {len(names)} blobs, {backup.blobs} others were backed up")
    for name in sorted(_damaged(folder / BLOBS)):
        raise StorageFailedError(f"{folder / BLOBS / name} is damaged; take another backup")
    return backup


def _damaged(folder: Path) -> set[str]:
    """The blobs in a folder that are not what their names say."""
    return {name for name in blob_names(folder) if (folder / name).is_symlink() or _sha256(folder / name) != name}


def place_all(source: Path, target: Path) -> set[str]:
    """Give blobs that another folder lacks a second place there; those that vanish meanwhile are left out.

    By hard links where that can be, whose names are returned, else by copies.
    """
    linked = set()
    for name in blob_names(source) - blob_names(target):
        file, second = source / name, target / name
        try:
            try:
                os.link(file, second, follow_symlinks=False)
                linked.add(name)
            except FileNotFoundError:
                raise
            except OSError:  # another disk, or one without links
                shutil.copyfile(file, second, follow_symlinks=False)
                second.chmod(0o600)
                fsync_file(second)
        except FileNotFoundError:
            second.unlink(missing_ok=True)
    return linked


def _copy(state: Path, unfinished: Path) -> tuple[set[str], int]:
    """Blobs and journal so that the journal needs no blob that was let go of meanwhile; links made, blobs absent."""
    linked: set[str] = set()
    if noted_url(state / JOURNAL) is not None:
        with closing(connect(state / JOURNAL, "ro", 30.0)) as live:
            copy_to(unfinished / JOURNAL, live)
        return linked, 0
    for _ in range(_TRIES):
        with closing(connect(state / JOURNAL, "ro", 30.0)) as live:
            named = _named(live)
        missing = named - blob_names(state / BLOBS)
        linked |= place_all(state / BLOBS, unfinished / BLOBS)
        failpoints.reached("backup.blobs_placed")
        with closing(connect(state / JOURNAL, "ro", 30.0)) as live:
            copy_to(unfinished / JOURNAL, live)
        failpoints.reached("backup.journal_copied")
        linked |= place_all(state / BLOBS, unfinished / BLOBS)
        with closing(connect(unfinished / JOURNAL, "ro", 30.0)) as copied:
            absent = _named(copied) - blob_names(unfinished / BLOBS)
        if absent <= missing:
            return linked, len(absent)
    raise StateDirError(
        f"while {state} was copied, {_TRIES} times in a row, blobs were let go of that the copy needs; try again, "
        "or keep more (--keep-updates, --keep-gb)"
    )


def _named(journal: sqlite3.Connection) -> set[str]:
    """Every blob that any table names: their column is called `digest`."""
    tables = journal.execute(
        "SELECT m.name FROM sqlite_master AS m JOIN pragma_table_info(m.name) AS c WHERE m.type = 'table' "
        "AND c.name = 'digest'"
    ).fetchall()
    digests: set[str] = set()
    for (table,) in tables:
        rows = journal.execute(f'SELECT DISTINCT digest FROM "{table}" WHERE digest IS NOT NULL')  # noqa: S608
        digests.update(str(digest) for (digest,) in rows)
    return digests


def _of_names(names: set[str]) -> str:
    return hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _refuse_target(state: Path, target: Path) -> None:
    if not (state / JOURNAL).is_file():
        raise StateDirError(f"{state} is no state directory of a coordinator: there is no {JOURNAL} in it")
    if target.exists() or target.is_symlink():
        raise StateDirError(f"{target} exists; a backup is a new folder, choose another name")
    if target.resolve().is_relative_to(state.resolve()):
        raise StateDirError(f"{target} lies in the state directory itself; choose a place outside, best another disk")


@contextmanager
def _own(folder: Path) -> Iterator[None]:
    """An empty folder that nobody else fills; gone if what is done in it fails."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(exist_ok=True, mode=0o700)
    try:
        lock = lock_folder(folder)
    except FolderInUseError as error:
        raise StateDirError(f"the process with id {error.holder} makes this backup already; wait for it") from None
    try:
        remove(folder, keep={_LOCK})
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    finally:
        lock.close()


def remove(folder: Path, keep: set[str]) -> None:
    """Empty a folder but for the names to keep."""
    for entry in list(folder.iterdir()):
        if entry.name not in keep:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


@contextmanager
def _said_in_words(state: Path, target: Path, unfinished: Path) -> Iterator[None]:
    try:
        yield
    except (StorageFailedError, CorruptBlobError, MissingBlobError) as error:
        # Found in the copy, which is gone by now; what it is a copy of is what somebody can look at.
        raise StorageFailedError(str(error).replace(str(unfinished), str(state))) from error
    except sqlite3.Error as error:
        if error_code(error) == sqlite3.SQLITE_FULL:
            raise _no_room(target) from error
        raise StorageFailedError(f"the journal cannot be copied: {error}; see 'fedmoe state verify'") from error
    except OSError as error:
        if error.errno in NO_ROOM:
            raise _no_room(target) from error
        raise StateDirError(
            f"{error.filename or target}: {error.strerror or error}; nothing was left behind"
        ) from error


def _no_room(target: Path) -> StateDirError:
    return StateDirError(f"the disk of {target} is full; nothing was left behind. Choose a disk with more room")
