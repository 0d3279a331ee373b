"""What is SQLite's own in the journal: how a connection is prepared, and what its errors mean."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DatabaseError

from fedmoe.errors import RefusedError
from fedmoe.storage.blobs import StorageFailedError, disk_full


def set_pragmas(connection: sqlite3.Connection, _: object) -> None:
    """Prepare a connection for a journal."""
    cursor = connection.cursor()
    # FULL makes every commit survive a power cut; WAL makes it one fsync. One connection only: no reader holds a lock.
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "mmap_size=0", "trusted_schema=OFF"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def unusable(where: str, reason: str) -> StorageFailedError:
    """The error for a journal that cannot be opened."""
    return StorageFailedError(
        f"the journal {where} cannot be opened: {reason}. Restore it from a backup; "
        "if it is not a FedMoE journal, choose another --state-dir."
    )


def journal_problem(error: DatabaseError, where: str) -> Exception:
    """What an error of the database means: a refusal where waiting or room helps, else the end of this journal."""
    # The extended codes carry the primary code in their lowest byte; see https://www.sqlite.org/rescode.html
    code = getattr(error.orig, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return disk_full(where)
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return RefusedError("busy", f"another program holds {where} locked.", "Nothing was stored, retry later.")
    return StorageFailedError(f"the journal {where} failed: {error.orig}")
