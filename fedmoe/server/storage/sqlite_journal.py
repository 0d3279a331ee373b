"""The journal in SQLite: opened only if every row is as it was written, one transaction a batch of events.

One writing connection with `synchronous=FULL`: when `append` returns, the events survive a power cut.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.pool import StaticPool

from fedmoe.federation.events import Event
from fedmoe.runtime import failpoints
from fedmoe.server.storage.acknowledged import AcknowledgedFile, Head, JournalGap, journal_gap
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.chain import COLUMNS, GENESIS, check, link
from fedmoe.server.storage.event_rows import chained_event_of, event_of, row_of
from fedmoe.server.storage.journal import DuplicateEventError, FormerIncarnation, Journal
from fedmoe.server.storage.migration import schema_of
from fedmoe.server.storage.seals import damaged_rows, drop_damaged, keep_seals, lost_seals, note_sealed
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
    EVENTS,
    INCARNATION,
    INCARNATIONS_BEFORE,
    LATER_TABLES,
    META,
    SCHEMA_VERSION,
    SNAPSHOTS,
    TABLES,
)

# The key in `meta` of the journal's own note of where it ends.
_HEAD = "head"
_EVENTS = f"SELECT {', '.join(COLUMNS)}, chain FROM events ORDER BY id"  # noqa: S608  # constants
_log = structlog.get_logger("fedmoe.journal")


class SqliteJournal(Journal):
    """The journal in an SQLite file, or in memory.

    With an `acknowledged` file every commit is noted there before the call returns. With `skip_damaged` rows beside
    the events that are not as they were written are left out.
    """

    def __init__(
        self, path: Path | None, acknowledged: AcknowledgedFile | None = None, skip_damaged: bool = False
    ) -> None:
        self._where = str(path) if path else "memory"
        self._acknowledged = acknowledged
        self._lock = threading.Lock()
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
            # By so much a row's number is more than that of its event.
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
        if schema is None:
            TABLES.create_all(self._connection)
            made = {"schema_version": str(SCHEMA_VERSION), INCARNATION: secrets.token_hex(16)}
            self._connection.execute(META.insert(), [{"key": key, "value": value} for key, value in made.items()])
            self._connection.commit()
        elif schema != SCHEMA_VERSION:
            raise other_schema(self._where, str(schema))
        LATER_TABLES.create_all(self._connection)
        self._connection.commit()

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
        optional = {row.table for row in damage} - {META.name} if skip_damaged else {SNAPSHOTS.name}
        fatal = [row for row in damage if row.table not in optional]
        if fatal:
            others = f", and {len(fatal) - 1} more" if len(fatal) > 1 else ""
            hint = " To go on without such rows, start once with --skip-damaged."
            problem = changed_outside(self._where, f"{fatal[0]}{others}")
            raise StorageFailedError(f"{problem}{'' if META.name in {row.table for row in fatal} else hint}")
        drop_damaged(self._raw, damage)
        note_sealed(self._raw)
        self._raw.commit()
        for row in damage:
            _log.error("row_left_out", table=row.table, row=row.row, problem=row.problem)

    @property
    def head(self) -> Head:
        """How far the journal has come."""
        return self._head

    def gap_since(self, noted: Head | None) -> JournalGap | None:
        """What the journal lacks of what was noted; None where it has all of it, or nothing is known."""
        if noted is None:
            return None
        rows = self.query(sa.select(EVENTS.c.chain).order_by(EVENTS.c.id).limit(1).offset(max(0, noted.events - 1)))
        chain_there = GENESIS if noted.events == 0 else rows[0]["chain"] if rows else None
        return journal_gap(
            noted, self.head, chain_there, [earlier.incarnation for earlier in self.former_incarnations()]
        )

    def append(self, events: Sequence[Event], version_digests: Sequence[str | None] | None = None) -> None:
        if not events:
            return
        digests = version_digests if version_digests is not None else [None] * len(events)
        rows = [row_of(event) | {"version_digest": digest} for event, digest in zip(events, digests, strict=True)]
        with self._lock:
            number, chain = self._head.events, self._head.chain
            for row in rows:
                number += 1
                row["id"] = number + self._row_offset
                chain = link(chain, [row[name] for name in COLUMNS])
                row["chain"] = chain
            try:
                self._write_locked(EVENTS.insert(), rows, replace(self._head, events=number, chain=chain))
            except IntegrityError as error:
                raise DuplicateEventError(str(error.orig)) from error

    def insert(self, table: sa.Table, row: dict[str, object]) -> int:
        with self._lock:
            key = self._write_locked(table.insert(), [row]).inserted_primary_key
        assert key is not None, "one row was added"
        return int(key[0])

    def put(self, table: sa.Table, rows: list[dict[str, object]]) -> None:
        with self._lock:
            self._write_locked(_put(table), rows)

    def delete(self, statement: sa.Delete) -> None:
        with self._lock:
            self._write_locked(statement)

    def begin_incarnation(self) -> str:
        former, current, name = self.former_incarnations(), self.meta(INCARNATION), secrets.token_hex(16)
        if current is not None:
            former.append(FormerIncarnation(current, self.count()))
        changed = {INCARNATION: name, INCARNATIONS_BEFORE: json.dumps([asdict(earlier) for earlier in former])}
        rows: list[dict[str, object]] = [{"key": key, "value": value} for key, value in changed.items()]
        with self._lock:
            self._write_locked(_put(META), rows, replace(self._head, incarnation=name))
        return name

    def _write_locked(
        self, statement: sa.Executable, rows: list[dict[str, object]] | None = None, head: Head | None = None
    ) -> sa.CursorResult[Any]:
        head = replace(head or self._head, changes=self._head.changes + 1)
        try:
            written = self._connection.execute(statement, rows)
            self._connection.execute(_put(META), [{"key": _HEAD, "value": head.to_text()}])
            self._connection.commit()
        except IntegrityError:
            self._connection.rollback()
            raise
        except DatabaseError as error:
            self._connection.rollback()
            raise journal_problem(error, self._where) from error
        self._head = head
        failpoints.reached("journal.committed")
        if self._acknowledged is not None:
            self._acknowledged.write(head)
            failpoints.reached("journal.counted")
        return written

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


def _put(table: sa.Table) -> sa.Insert:
    return table.insert().prefix_with("OR REPLACE")


def problems(path: Path) -> list[str]:
    """Everything that is not as it was written in a journal's file, in words; nothing in it is changed."""
    try:
        with closing(connect(path, "rw")) as connection:
            damage = [row for (row,) in connection.execute("PRAGMA quick_check(20)") if row != "ok"]
            return [f"the journal's file: {problem}" for problem in damage] or _changed_rows(connection, str(path))
    except (sqlite3.Error, StorageFailedError) as error:
        return [f"the journal cannot be read: {error}" if isinstance(error, sqlite3.Error) else str(error)]


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
    meta = dict(connection.execute("SELECT key, value FROM meta WHERE key IN (?, ?)", [_HEAD, INCARNATION]).fetchall())
    noted = meta.get(_HEAD)
    try:
        head = Head.of_text(noted) if noted is not None else Head(end.rows, end.chain)
    except ValueError as error:
        raise ValueError(f"the note of the journal's end cannot be read: {error}") from error
    if (head.events, head.chain) != (end.rows, end.chain):
        raise ValueError(f"the journal ends after {end.rows} events, written were {head.events}")
    return end.row, replace(head, incarnation=meta.get(INCARNATION) or "")
