"""The journal in SQLite: opened only if every row is as it was written, one transaction a batch of events.

One writing connection with `synchronous=FULL`: when `append` returns, the events survive a power cut.
"""

from __future__ import annotations

import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.dialects import sqlite as sqlite_dialect
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.pool import StaticPool

from fedmoe.federation.events import Event
from fedmoe.server.storage.acknowledged import AcknowledgedFile, Head
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.chain import COLUMNS, check
from fedmoe.server.storage.chained_journal import HEAD, ChainedJournal, Pages, checked_head, federation_rows_of
from fedmoe.server.storage.event_rows import chained_event_of, event_of
from fedmoe.server.storage.migration import schema_of
from fedmoe.server.storage.seals import damaged_rows, drop_damaged, fatal_damage, keep_seals, lost_seals, note_sealed
from fedmoe.server.storage.sqlite import (
    changed_outside,
    connect,
    journal_problem,
    opening_problem,
    other_schema,
    set_pragmas,
    unusable,
)
from fedmoe.server.storage.tables import (
    ALL_TABLES,
    INCARNATION,
    LATER_TABLES,
    META,
    SCHEMA_VERSION,
    TABLES,
)

_EVENTS = f"SELECT {', '.join(COLUMNS)}, chain FROM events ORDER BY id"  # noqa: S608  # constants
_log = structlog.get_logger("fedmoe.journal")


class SqliteJournal(ChainedJournal):
    """The journal in an SQLite file, or in memory.

    With an `acknowledged` file every commit is noted there before the call returns. With `skip_damaged` rows beside
    the events that are not as they were written are left out.
    """

    def __init__(
        self, path: Path | None, acknowledged: AcknowledgedFile | None = None, skip_damaged: bool = False
    ) -> None:
        super().__init__(acknowledged)
        self._where = str(path) if path else "memory"
        url = sa.URL.create("sqlite", database=str(path) if path else None)
        self._engine = sa.create_engine(
            url, poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": 5.0}
        )
        sa.event.listen(self._engine, "connect", set_pragmas)
        try:
            self._connection = self._engine.connect()
            raw = self._connection.connection.driver_connection
            assert isinstance(raw, sqlite3.Connection)
            # SQLite's own connection reads many rows without the cost of an object for each.
            self._raw = raw
            self._make_tables()
            self._check_rows(skip_damaged)
            try:
                last_row, self._head = _checked_end(self._raw)
            except ValueError as error:
                raise changed_outside(self._where, str(error)) from error
            self._row_offset = last_row - self._head.events
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, (DatabaseError, sqlite3.DatabaseError)):
                reason = error.orig if isinstance(error, DatabaseError) else error
                raise opening_problem(reason or error, path) from error
            raise

    def _make_tables(self) -> None:
        """Make the tables that are missing; refuse a damaged file and other schemas."""
        damage = self._connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if damage != "ok":
            raise unusable(self._where, " ".join(str(damage).split()))
        # The version is read before any table is made, so that another version's journal stays as it is.
        schema = schema_of(self._raw, self._where)
        self._connection.rollback()
        # One commit instead of one for each table.
        self._raw.execute("BEGIN")
        if schema is None:
            self._execute_all(_table_statements(TABLES))
            made = {"schema_version": str(SCHEMA_VERSION), INCARNATION: secrets.token_hex(16)}
            self._connection.execute(META.insert(), [{"key": key, "value": value} for key, value in made.items()])
        elif schema != SCHEMA_VERSION:
            raise other_schema(self._where, str(schema))
        self._execute_all(_table_statements(LATER_TABLES))
        self._connection.commit()

    def _execute_all(self, statements: Iterable[str]) -> None:
        for statement in statements:
            self._raw.execute(statement)

    def _check_rows(self, skip_damaged: bool) -> None:
        """Refuse rows beside the events that are not as they were written, or with `skip_damaged` leave them out.

        Snapshots only save time and are left out in any case; what `meta` says can be left out in none.
        """
        lost = lost_seals(self._raw)
        if lost:
            raise changed_outside(self._where, _without_seals(lost))
        keep_seals(self._raw)
        self._raw.commit()
        damage = damaged_rows(self._raw)
        fatal = fatal_damage(damage, skip_damaged)
        if fatal:
            raise StorageFailedError(f"{changed_outside(self._where, fatal.rows)}{fatal.hint}")
        drop_damaged(self._raw, damage)
        note_sealed(self._raw)
        self._raw.commit()
        for row in damage:
            _log.error("row_left_out", table=row.table, row=row.row, problem=row.problem)

    def insert(self, table: sa.Table, row: dict[str, object]) -> int:
        with self._lock:
            key = self._write_locked(table.insert(), [row]).inserted_primary_key
        assert key is not None, "one row was added"
        return int(key[0])

    def _write_locked(
        self, statement: sa.Insert | sa.Delete, rows: list[dict[str, object]] | None = None, head: Head | None = None
    ) -> sa.CursorResult[Any]:
        head = replace(head or self._head, changes=self._head.changes + 1)
        try:
            written = self._connection.execute(statement, rows)
            self._connection.execute(self._put(META), [{"key": HEAD, "value": head.to_text()}])
            self._connection.commit()
        except IntegrityError:
            self._connection.rollback()
            raise
        except DatabaseError as error:
            self._connection.rollback()
            raise journal_problem(error, self._where) from error
        self._committed(head)
        return written

    def _replace_locked(self, pages: Pages, head: Head) -> None:
        try:
            for table in ALL_TABLES:
                self._connection.execute(federation_rows_of(table))
                for rows in filter(None, pages(table)):
                    self._connection.execute(table.insert(), rows)
            self._connection.execute(self._put(META), [{"key": HEAD, "value": head.to_text()}])
            self._connection.commit()
        except BaseException as error:
            self._connection.rollback()
            raise journal_problem(error, self._where) if isinstance(error, DatabaseError) else error from error
        self._committed(head)

    @staticmethod
    def _put(table: sa.Table) -> sa.Insert:
        return table.insert().prefix_with("OR REPLACE")

    def query(self, statement: sa.Executable) -> list[sa.RowMapping]:
        with self._lock:
            try:
                return list(self._connection.execute(statement).mappings())
            except DatabaseError as error:
                raise journal_problem(error, self._where) from error
            finally:
                self._connection.rollback()

    def events(self, expert: str | None = None, after_version: int = -1) -> Iterator[Event]:
        which = "" if expert is None else "WHERE expert = ? AND version > ?"
        statement = f"SELECT kind, payload FROM events {which} ORDER BY id"  # noqa: S608  # no text from outside
        with self._lock:
            try:
                rows = self._raw.execute(statement, () if expert is None else (expert, after_version)).fetchall()
            except sqlite3.DatabaseError as error:
                raise journal_problem(error, self._where) from error
            finally:
                self._connection.rollback()
        read = chained_event_of if expert is None else event_of
        for kind, payload in rows:
            yield read(kind, payload)

    def forget_log(self) -> None:
        self.query(sa.text("PRAGMA wal_checkpoint(TRUNCATE)"))

    def close(self) -> None:
        with self._lock:
            self._connection.close()
            self._engine.dispose()


def problems(path: Path) -> list[str]:
    """Everything that is not as it was written in a journal's file, in words; nothing in it is changed."""
    try:
        with closing(connect(path, "rw")) as connection:
            damage = [row for (row,) in connection.execute("PRAGMA quick_check(20)") if row != "ok"]
            return [f"the journal's file: {problem}" for problem in damage] or _changed_rows(connection, str(path))
    except (sqlite3.Error, StorageFailedError) as error:
        return [f"the journal cannot be read: {error}" if isinstance(error, sqlite3.Error) else str(error)]


@cache
def _table_statements(tables: sa.MetaData) -> tuple[str, ...]:
    """SQL that makes those of the tables and their indexes that are missing; compiled once a process."""
    dialect = sqlite_dialect.dialect()
    made: list[sa.schema.DDLElement] = []
    for table in tables.sorted_tables:
        made.append(sa.schema.CreateTable(table, if_not_exists=True))
        made += [sa.schema.CreateIndex(index, if_not_exists=True) for index in table.indexes]
    return tuple(str(statement.compile(dialect=dialect)) for statement in made)


def _changed_rows(connection: sqlite3.Connection, where: str) -> list[str]:
    schema = schema_of(connection, where)
    if schema != SCHEMA_VERSION:
        return [str(other_schema(where, str(schema) if schema else "none"))]
    lost = lost_seals(connection)
    if lost:
        return [_without_seals(lost)]
    changed = [str(row) for row in damaged_rows(connection)]
    try:
        _checked_end(connection)
    except ValueError as error:
        changed.append(str(error))
    return changed


def _without_seals(tables: list[str]) -> str:
    return f"the seals of {', '.join(tables)} are gone, so that nobody can say what was written there"


def _checked_end(connection: sqlite3.Connection) -> tuple[int, Head]:
    """The number of the last row, and where the rows end as noted; raises ValueError if they end elsewhere."""
    end = check(connection.execute(_EVENTS))
    meta = dict(connection.execute("SELECT key, value FROM meta WHERE key IN (?, ?)", [HEAD, INCARNATION]).fetchall())
    return end.row, checked_head(end, meta.get(HEAD), meta.get(INCARNATION))
