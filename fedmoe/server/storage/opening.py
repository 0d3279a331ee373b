"""Opening a journal: makes its tables, checks every row against chain and seals."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import sqlalchemy as sa
import structlog

from fedmoe.server.storage.acknowledged import Head
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.chain import COLUMNS, BrokenChainError, ChainEnd, check
from fedmoe.server.storage.incarnation import INCARNATION, new_incarnation
from fedmoe.server.storage.schema import schema_of
from fedmoe.server.storage.seals import damaged_rows, drop_damaged, keep_seals, lost_seals, note_sealed
from fedmoe.server.storage.sqlite import changed_outside, connect, damaged_rows_problem, other_schema, unusable
from fedmoe.server.storage.tables import LATER_TABLES, META, SCHEMA_VERSION, SNAPSHOTS, TABLES

#: The key in `meta` of the journal's own note of where it ends.
HEAD = "head"
_EVENTS = f"SELECT {', '.join(COLUMNS)}, chain FROM events ORDER BY id"  # noqa: S608  # constants
_log = structlog.get_logger("fedmoe.journal")


def driver(connection: sa.Connection) -> sqlite3.Connection:
    """SQLite's own connection, for reading many rows without the cost of an object for each."""
    raw = connection.connection.driver_connection
    assert isinstance(raw, sqlite3.Connection)
    return raw


def make_tables(connection: sa.Connection, where: str) -> None:
    """Make the tables that are missing; refuses a damaged file and other schemas."""
    damage = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
    if damage != "ok":
        raise unusable(where, " ".join(str(damage).split()))
    # The version is read before any table is made, so that another version's journal stays as it is.
    schema = schema_of(driver(connection), where)
    connection.rollback()
    if schema is None:
        TABLES.create_all(connection)
        made = {"schema_version": str(SCHEMA_VERSION), INCARNATION: new_incarnation()}
        connection.execute(META.insert(), [{"key": key, "value": value} for key, value in made.items()])
        connection.commit()
    elif schema != SCHEMA_VERSION:
        raise other_schema(where, str(schema))
    LATER_TABLES.create_all(connection)
    connection.commit()


def check_rows(connection: sa.Connection, where: str, skip_damaged: bool) -> None:
    """Refuse rows beside the events that are not as they were written, or with `skip_damaged` leave them out.

    Snapshots only save time and are left out in any case; what `meta` says can be left out in none.
    """
    raw = driver(connection)
    lost = lost_seals(raw)
    if lost:
        connection.rollback()
        raise changed_outside(where, _without_seals(lost))
    keep_seals(raw)
    connection.commit()
    damage = damaged_rows(raw)
    optional = {row.table for row in damage} - {META.name} if skip_damaged else {SNAPSHOTS.name}
    fatal = [row for row in damage if row.table not in optional]
    if fatal:
        connection.rollback()
        raise damaged_rows_problem(where, [str(row) for row in fatal], [row.table for row in fatal])
    drop_damaged(raw, damage)
    note_sealed(raw)
    raw.commit()
    connection.commit()
    for row in damage:
        _log.error("row_left_out", table=row.table, row=row.row, problem=row.problem)


def problems(path: Path) -> list[str]:
    """Everything that is not as it was written in a journal's file, in words; nothing in it is changed."""
    try:
        with closing(connect(path, "rw")) as connection:
            damage = [row for (row,) in connection.execute("PRAGMA quick_check(20)") if row != "ok"]
            return [f"the journal's file: {problem}" for problem in damage] or _changed_rows(connection, str(path))
    except sqlite3.Error as error:
        return [f"the journal cannot be read: {error}"]


def _changed_rows(connection: sqlite3.Connection, where: str) -> list[str]:
    try:
        schema = schema_of(connection, where)
    except StorageFailedError as error:
        return [str(error)]
    if schema != SCHEMA_VERSION:
        return [str(other_schema(where, str(schema) if schema else "none"))]
    lost = lost_seals(connection)
    if lost:
        return [_without_seals(lost)]
    changed = [str(row) for row in damaged_rows(connection)]
    try:
        end = check(connection.execute(_EVENTS))
    except BrokenChainError as error:
        return [*changed, str(error)]
    noted = connection.execute("SELECT value FROM meta WHERE key = ?", [HEAD]).fetchone()
    try:
        head = Head.of_text(noted[0]) if noted else Head(end.rows, end.chain)
    except ValueError as error:
        return [*changed, f"the note of the journal's end cannot be read: {error}"]
    if (head.events, head.chain) != (end.rows, end.chain):
        changed.append(f"the journal ends after {end.rows} events, written were {head.events}")
    return changed


def _without_seals(tables: list[str]) -> str:
    return f"the seals of {', '.join(tables)} are gone, so that nobody can say what was written there"


def checked_chain(connection: sa.Connection, where: str) -> ChainEnd:
    """The end of the chain, once every row of it was looked at."""
    try:
        return check(driver(connection).execute(_EVENTS))
    except BrokenChainError as error:
        raise changed_outside(where, str(error)) from error
    finally:
        connection.rollback()


def checked_head(connection: sa.Connection, where: str, end: ChainEnd) -> Head:
    """The end that the last transaction noted, if it is where the rows end."""
    kept = _meta(connection, HEAD)
    incarnation = _meta(connection, INCARNATION) or ""
    connection.rollback()
    try:
        head = Head.of_text(kept) if kept is not None else Head(end.rows, end.chain)
    except ValueError as error:
        raise changed_outside(where, f"the note of its end cannot be read ({error})") from error
    if (head.events, head.chain) != (end.rows, end.chain):
        raise changed_outside(where, f"it ends after {end.rows} events, written were {head.events}")
    return replace(head, incarnation=incarnation)


def _meta(connection: sa.Connection, key: str) -> str | None:
    value: str | None = connection.execute(sa.select(META.c.value).where(META.c.key == key)).scalar_one_or_none()
    return value
