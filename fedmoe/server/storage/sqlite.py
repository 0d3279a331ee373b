"""SQLite specifics: connection settings, and what its errors mean."""

from __future__ import annotations

import os
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Literal

from sqlalchemy.exc import DatabaseError

from fedmoe.runtime.errors import RefusedError
from fedmoe.runtime.files import fsync_file
from fedmoe.server.storage.blobs import StorageFailedError, disk_full, no_room_to_start
from fedmoe.server.storage.tables import SCHEMA_VERSION

_PERHAPS_FULL = (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN)
# The file beside the journal that maps its log has 32 KiB.
_LEAST_ROOM = 64 << 10


def connect(
    path: Path, mode: Literal["ro", "rw"], timeout: float = 5.0, autocommit: bool = False
) -> sqlite3.Connection:
    """A plain connection to a database file that is there; a read-only one never gets into the way of the writer."""
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=timeout, isolation_level=None if autocommit else "DEFERRED")


def copy_to(target: Path, source: sqlite3.Connection) -> None:
    """Copy a database as of one moment, from whoever writes it, to one file that is complete in itself, synced."""
    os.close(os.open(target, os.O_RDWR | os.O_CREAT, 0o600))
    with closing(sqlite3.connect(target)) as copy:
        source.backup(copy)
    complete_in_itself(target)


def complete_in_itself(path: Path) -> None:
    """Leave no log beside a database, so that the one file is all of it, even where nothing can be written."""
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
    fsync_file(path)


def set_pragmas(connection: sqlite3.Connection, _: object) -> None:
    """Prepare a connection for a journal."""
    # FULL makes every commit survive a power cut; WAL makes it one fsync. One connection only: no reader holds a lock.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "mmap_size=0", "trusted_schema=OFF", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def opening_problem(error: Exception, path: Path | None) -> Exception:
    """What an error while opening a journal means: a full disk, or a journal that cannot be used."""
    # SQLite says "disk I/O error" or "unable to open" where the file it maps its log with cannot grow.
    code = error_code(error)
    if path is not None and (code == sqlite3.SQLITE_FULL or (code in _PERHAPS_FULL and _is_full(path.parent))):
        return no_room_to_start(path.parent)
    return unusable(str(path) if path else "memory", str(error))


def error_code(error: BaseException | None) -> int:
    """SQLite's primary code of an error, the lowest byte of its extended one; see https://www.sqlite.org/rescode.html"""
    return getattr(error, "sqlite_errorcode", 0) & 0xFF


def _is_full(folder: Path) -> bool:
    try:
        return shutil.disk_usage(folder).free < _LEAST_ROOM
    except OSError:
        return False


def unusable(where: str, reason: str) -> StorageFailedError:
    """The error for a journal that cannot be opened."""
    return StorageFailedError(
        f"the journal {where} cannot be opened: {reason}. Restore it from a backup; "
        "if it is not a FedMoE journal, choose another --state-dir."
    )


def other_schema(where: str, schema: str) -> StorageFailedError:
    """The error for a journal of another version of this program."""
    older = schema.isdecimal() and int(schema) < SCHEMA_VERSION
    what_to_do = (
        "start 'fedmoe coordinator' on its state directory, which brings it to this schema and keeps a copy"
        if older
        else "run the FedMoE version that wrote it, or a newer one"
    )
    return StorageFailedError(
        f"the journal {where} has schema {schema}, this program reads {SCHEMA_VERSION}; {what_to_do}."
    )


def changed_outside(where: str, what: str) -> StorageFailedError:
    """The error for a journal that SQLite can read and that is not what was written."""
    return StorageFailedError(
        f"the journal {where} was damaged or changed: {what}. Restore the state directory from a backup with "
        "'fedmoe state restore BACKUP --state-dir DIR'; 'fedmoe state verify --state-dir DIR' lists what is wrong."
    )


def journal_problem(error: DatabaseError | sqlite3.Error, where: str) -> Exception:
    """What an error of the database means: a refusal where waiting or room helps, else the end of this journal."""
    cause = error.orig if isinstance(error, DatabaseError) else error
    code = error_code(cause)
    if code == sqlite3.SQLITE_FULL:
        return disk_full(where)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RefusedError("busy", f"another program holds {where} locked.", "Nothing was stored, retry later.")
    return StorageFailedError(f"the journal {where} failed: {cause}")
