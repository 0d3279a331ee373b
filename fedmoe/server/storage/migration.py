"""The schema of a SQLite journal, and migration of earlier ones: a copy is kept, then one transaction.

Killed before the copy is complete, nothing has happened; killed later, SQLite takes the transaction back and the next
start does it again. The copy stays.
"""

from __future__ import annotations

import os
import secrets
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from fedmoe.runtime import failpoints
from fedmoe.runtime.files import fsync_folder
from fedmoe.server.storage.chain import COLUMNS, GENESIS, link
from fedmoe.server.storage.sqlite import changed_outside, connect, copy_to, other_schema
from fedmoe.server.storage.tables import EVENTS, INCARNATION, META, SCHEMA_VERSION

# Columns of events that schema 1 lacks.
_SINCE_2 = {"version_digest", "chain"}
_MOST_DIGITS = 9


@dataclass(frozen=True, slots=True)
class Migration:
    """A journal that was of the schema `before`, and where the copy of it as it was lies."""

    before: int
    copy: Path


def migrate(journal: Path) -> Migration | None:
    """Bring a journal of an earlier schema to this one, for the owner of its folder; leaves any other file alone.

    What cannot be read as a journal is left for `SqliteJournal` to refuse. Raises StorageFailedError for a journal
    whose number is not the one of its tables.
    """
    for rest in journal.parent.glob(f".{journal.name}-copy*"):
        rest.unlink()
    schema_before = _schema(journal)
    if schema_before is None or schema_before >= SCHEMA_VERSION:
        return None
    with closing(_connect(journal)) as connection:
        copy = _copied(connection, journal, schema_before)
        with connection:
            connection.execute("BEGIN IMMEDIATE")
            for schema in range(schema_before, SCHEMA_VERSION):
                _STEPS[schema](connection)
            connection.execute("UPDATE meta SET value = ? WHERE key = 'schema_version'", [str(SCHEMA_VERSION)])
            failpoints.reached("migrate.before_commit")
    failpoints.reached("migrate.committed")
    return Migration(schema_before, copy)


def schema_of(connection: sqlite3.Connection, where: str) -> int | None:
    """The schema of a journal, this one or an earlier; None where nothing was journalled yet.

    Raises StorageFailedError for a later one, and for a number that is not the one it was written with.
    """
    tables = {name for (name,) in connection.execute("SELECT name FROM main.sqlite_master WHERE type = 'table'")}
    meta = dict(connection.execute("SELECT key, value FROM meta").fetchall()) if META.name in tables else {}
    if not meta:
        return None
    recorded = meta.get("schema_version")
    if recorded is None:
        raise changed_outside(where, "the row of meta that says which schema it has is gone")
    digits = str(recorded)
    number = int(digits) if digits.isascii() and digits.isdecimal() and len(digits) <= _MOST_DIGITS else 0
    if number < 1:
        raise changed_outside(where, f"its schema is {recorded!r}, which no version of this program writes")
    if number > SCHEMA_VERSION:
        raise other_schema(where, str(number))
    columns = {row[1] for row in connection.execute(f'PRAGMA main.table_info("{EVENTS.name}")')}
    says = "no rows of events" if not columns else f"its rows are those of schema {2 if columns >= _SINCE_2 else 1}"
    if not columns or (number >= 2) != (columns >= _SINCE_2):
        raise changed_outside(where, f"it says schema {number}, and {says}; a number set by hand can be set back")
    return number


def _connect(journal: Path) -> sqlite3.Connection:
    connection = connect(journal, "rw", autocommit=True)
    connection.execute("PRAGMA synchronous=FULL")
    return connection


def _schema(journal: Path) -> int | None:
    """The schema of a whole journal."""
    try:
        with closing(_connect(journal)) as connection:
            whole = connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",)
            return schema_of(connection, str(journal)) if whole else None
    except sqlite3.Error:
        return None


def _copied(connection: sqlite3.Connection, journal: Path, schema: int) -> Path:
    """A copy of the journal beside it, whole or not there, that no later migration replaces by less."""
    events = connection.execute("SELECT count(*) FROM events").fetchone()[0]
    final = journal.with_name(f"{journal.stem}-schema-{schema}-{events}-events{journal.suffix}")
    temporary = journal.with_name(f".{journal.name}-copy")
    copy_to(temporary, connection)
    failpoints.reached("migrate.copied")
    os.replace(temporary, final)
    fsync_folder(journal.parent)
    failpoints.reached("migrate.copy_kept")
    return final


def _chained(connection: sqlite3.Connection) -> None:
    """1 to 2: rows of events are chained; the digests of the versions they made are not known."""
    connection.execute("ALTER TABLE events ADD COLUMN version_digest TEXT")
    connection.execute("ALTER TABLE events ADD COLUMN chain TEXT NOT NULL DEFAULT ''")
    before = GENESIS
    for row in connection.execute(f"SELECT {', '.join(COLUMNS)} FROM events ORDER BY id").fetchall():  # noqa: S608
        before = link(before, row)
        connection.execute("UPDATE events SET chain = ? WHERE id = ?", [before, row[0]])
    connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", [INCARNATION, secrets.token_hex(16)])


_STEPS = {1: _chained}
