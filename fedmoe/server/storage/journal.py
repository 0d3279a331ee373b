"""The journal: an append-only, durable log of events in SQLite, and small tables beside it.

One writing connection, one transaction per batch of events, `synchronous=FULL`: when `append` returns, the events
survive a power cut. Nothing is ever changed in place; rollback and retraction are events too.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.pool import StaticPool

from fedmoe.federation.events import Event, UpdateAccepted
from fedmoe.runtime import failpoints
from fedmoe.server.storage.acknowledged import AcknowledgedFile, Head
from fedmoe.server.storage.chain import COLUMNS, GENESIS, ChainEnd
from fedmoe.server.storage.event_rows import chained_event_of, event_of, row_of
from fedmoe.server.storage.incarnation import (
    INCARNATION,
    INCARNATIONS_BEFORE,
    FormerIncarnation,
    new_incarnation,
    of_text,
    to_text,
)
from fedmoe.server.storage.opening import HEAD, check_rows, checked_chain, checked_head, driver, make_tables
from fedmoe.server.storage.records import (
    DataStatistic,
    GatewayVerdict,
    Statistic,
    StoredStatistic,
    TokenFacts,
    TokenRecord,
)
from fedmoe.server.storage.sqlite import journal_problem, opening_problem, set_pragmas
from fedmoe.server.storage.tables import (
    DATA_STATISTICS,
    EVENTS,
    META,
    SNAPSHOTS,
    STATISTICS,
    TOKEN_FACTS,
    TOKENS,
    VERDICTS,
)

_put_meta = META.insert().prefix_with("OR REPLACE")


# Rows that one statement names; SQLite takes 32,766 parameters.
_MOST_NAMED = 10_000


class DuplicateEventError(Exception):
    """An event whose identity is already in the journal; the whole batch was refused."""


class Journal(Protocol):
    """The order of everything that happened, and the small tables that must survive with it."""

    def append(self, events: Sequence[Event], version_digests: Sequence[str | None] | None = None) -> None:
        """Make events durable, all or none; raises `DuplicateEventError` if one is there already.

        `version_digests` are the content hashes of the weights that each of them leaves behind, where known.
        """
        ...

    def version_digest(self, expert: str, version: int) -> str | None:
        """The content hash that the weights of an expert's version had; None where it is not known.

        It is not for version 0, and for what was journalled by schema 1.
        """
        ...

    def events(self, expert: str | None = None, after_version: int = -1) -> Iterator[Event]: ...

    def count(self) -> int: ...

    def find_update(self, worker: str, epoch: str, sequence: int) -> UpdateAccepted | None: ...

    def add_snapshot(self, expert: str, version: int, digest: str) -> None: ...

    def snapshots(self, expert: str) -> dict[int, str]:
        """Version -> digest of the snapshots of one expert."""
        ...

    def drop_snapshot(self, expert: str, version: int) -> None: ...

    def named_elsewhere(self, expert: str, digests: Collection[str]) -> set[str]:
        """Those of `digests` that an update or snapshot of another expert names."""
        ...

    def add_statistic(self, statistic: Statistic) -> StoredStatistic: ...

    def statistics(self, expert: str | None = None) -> list[Statistic]: ...

    def kept_statistics(self, ids: Collection[int] | None = None) -> list[StoredStatistic]:
        """In order, those with these numbers if any are given."""
        ...

    def drop_statistics(self, ids: Collection[int]) -> None: ...

    def add_data_statistic(self, statistic: DataStatistic) -> None: ...

    def data_statistics(self) -> list[DataStatistic]:
        """All there ever were, in order."""
        ...

    def add_verdict(self, verdict: GatewayVerdict) -> None: ...

    def verdicts(self, limit: int, published_only: bool = False) -> list[GatewayVerdict]:
        """The newest first."""
        ...

    def put_token(self, token: TokenRecord) -> None: ...

    def tokens(self) -> list[TokenRecord]: ...

    def put_token_facts(self, facts: Sequence[TokenFacts]) -> None: ...

    def token_facts(self) -> list[TokenFacts]: ...

    def meta(self, key: str) -> str | None: ...

    def set_meta(self, key: str, value: str) -> None: ...

    def begin_incarnation(self) -> str:
        """The history goes on as another one; the name of the one before is kept with its count of events."""
        ...

    def query(self, statement: sa.Executable) -> list[sa.RowMapping]:
        """Rows of a table that a module of its own keeps."""
        ...

    def change(self, statement: sa.Executable, rows: list[dict[str, object]] | None = None) -> None:
        """Change such a table, durably."""
        ...

    def close(self) -> None: ...


class SqlJournal:
    """The journal in an SQL database; SQLite in a file (the embedded default) or in memory.

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
            self._prepare(skip_damaged)
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, (DatabaseError, sqlite3.DatabaseError)):
                reason = error.orig if isinstance(error, DatabaseError) else error
                raise opening_problem(reason or error, path) from error
            raise

    def _prepare(self, skip_damaged: bool) -> None:
        make_tables(self._connection, self._where)
        check_rows(self._connection, self._where, skip_damaged)
        self._end = checked_chain(self._connection, self._where)
        self._head = checked_head(self._connection, self._where, self._end)

    @property
    def head(self) -> Head:
        """How far the journal has come."""
        return self._head

    def chain_at(self, events: int) -> str | None:
        """The chain's value after so many events; None where there are fewer."""
        if events == 0:
            return GENESIS
        query = sa.select(EVENTS.c.chain).order_by(EVENTS.c.id).limit(1).offset(events - 1)
        rows = self.query(query)
        return rows[0]["chain"] if rows else None

    def append(self, events: Sequence[Event], version_digests: Sequence[str | None] | None = None) -> None:
        if not events:
            return
        digests = version_digests if version_digests is not None else [None] * len(events)
        rows = [row_of(event) | {"version_digest": digest} for event, digest in zip(events, digests, strict=True)]
        with self._lock:
            end = self._end
            for row in rows:
                row["id"] = end.row + 1
                end = end.then(end.row + 1, [row[name] for name in COLUMNS])
                row["chain"] = end.chain
            try:
                self._write_locked(EVENTS.insert(), rows, replace(self._head, events=end.rows, chain=end.chain), end)
            except IntegrityError as error:
                raise DuplicateEventError(str(error.orig)) from error

    def version_digest(self, expert: str, version: int) -> str | None:
        query = sa.select(EVENTS.c.version_digest).where(EVENTS.c.expert == expert, EVENTS.c.version == version)
        rows = self.query(query)
        return rows[0]["version_digest"] if rows else None

    def change(self, statement: sa.Executable, rows: list[dict[str, object]] | None = None) -> None:
        with self._lock:
            self._write_locked(statement, rows)

    def _write_locked(
        self,
        statement: sa.Executable,
        rows: list[dict[str, object]] | None,
        head: Head | None = None,
        end: ChainEnd | None = None,
    ) -> None:
        head = replace(head or self._head, changes=self._head.changes + 1)
        try:
            self._connection.execute(statement, rows)
            self._connection.execute(_put_meta, [{"key": HEAD, "value": head.to_text()}])
            self._connection.commit()
        except IntegrityError:
            self._connection.rollback()
            raise
        except DatabaseError as error:
            self._connection.rollback()
            raise journal_problem(error, self._where) from error
        self._head, self._end = head, end or self._end
        failpoints.reached("journal.committed")
        if self._acknowledged is not None:
            self._acknowledged.write(head)
            failpoints.reached("journal.counted")

    def query(self, statement: sa.Executable) -> list[sa.RowMapping]:
        with self._lock:
            try:
                return list(self._connection.execute(statement).mappings())
            except DatabaseError as error:
                raise journal_problem(error, self._where) from error
            finally:
                self._connection.rollback()

    def _fetch(self, query: str, values: Sequence[str | int] = ()) -> list[tuple[str, ...]]:
        """Many rows, as tuples: an object for each would take longer than to read them."""
        with self._lock:
            try:
                return driver(self._connection).execute(query, values).fetchall()
            except sqlite3.DatabaseError as error:
                raise journal_problem(error, self._where) from error
            finally:
                self._connection.rollback()

    def events(self, expert: str | None = None, after_version: int = -1) -> Iterator[Event]:
        wanted = "" if expert is None else "WHERE expert = ? AND version > ?"
        rows = self._fetch(
            f"SELECT kind, payload FROM events {wanted} ORDER BY id",  # noqa: S608  # no text from outside
            () if expert is None else (expert, after_version),
        )
        read = chained_event_of if expert is None else event_of
        for kind, payload in rows:
            yield read(kind, payload)

    def count(self) -> int:
        query = sa.select(sa.func.count().label("events")).select_from(EVENTS)
        return int(self.query(query)[0]["events"])

    def find_update(self, worker: str, epoch: str, sequence: int) -> UpdateAccepted | None:
        query = sa.select(EVENTS.c.payload).where(
            EVENTS.c.worker == worker, EVENTS.c.epoch == epoch, EVENTS.c.sequence == sequence
        )
        for row in self.query(query):
            event = event_of("update", row["payload"])
            assert isinstance(event, UpdateAccepted)
            return event
        return None

    def add_snapshot(self, expert: str, version: int, digest: str) -> None:
        self.change(
            SNAPSHOTS.insert().prefix_with("OR REPLACE"), [{"expert": expert, "version": version, "digest": digest}]
        )

    def snapshots(self, expert: str) -> dict[int, str]:
        query = sa.select(SNAPSHOTS.c.version, SNAPSHOTS.c.digest).where(SNAPSHOTS.c.expert == expert)
        return {row["version"]: row["digest"] for row in self.query(query)}

    def drop_snapshot(self, expert: str, version: int) -> None:
        self.change(SNAPSHOTS.delete().where(SNAPSHOTS.c.expert == expert, SNAPSHOTS.c.version == version))

    def named_elsewhere(self, expert: str, digests: Collection[str]) -> set[str]:
        tables = (EVENTS, SNAPSHOTS)
        queries = [sa.select(table.c.digest).where(table.c.expert != expert).distinct() for table in tables]
        return {row["digest"] for query in queries for row in self.query(query)} & set(digests)

    def add_statistic(self, statistic: Statistic) -> StoredStatistic:
        with self._lock:
            self._write_locked(STATISTICS.insert(), [statistic.to_row()])
            newest = self._connection.execute(sa.select(STATISTICS).order_by(STATISTICS.c.id.desc()).limit(1))
            kept = StoredStatistic.of_row(newest.mappings().one())
            self._connection.rollback()
            return kept

    def statistics(self, expert: str | None = None) -> list[Statistic]:
        query = sa.select(STATISTICS).order_by(STATISTICS.c.id)
        query = query if expert is None else query.where(STATISTICS.c.expert == expert)
        return [StoredStatistic.of_row(row).statistic for row in self.query(query)]

    def kept_statistics(self, ids: Collection[int] | None = None) -> list[StoredStatistic]:
        query = sa.select(STATISTICS).order_by(STATISTICS.c.id)
        query = query if ids is None else query.where(STATISTICS.c.id.in_(ids))
        return [StoredStatistic.of_row(row) for row in self.query(query)]

    def drop_statistics(self, ids: Collection[int]) -> None:
        ordered = sorted(ids)
        for start in range(0, len(ordered), _MOST_NAMED):
            self.change(STATISTICS.delete().where(STATISTICS.c.id.in_(ordered[start : start + _MOST_NAMED])))

    def add_data_statistic(self, statistic: DataStatistic) -> None:
        self.change(DATA_STATISTICS.insert(), [asdict(statistic)])

    def data_statistics(self) -> list[DataStatistic]:
        columns = [column for column in DATA_STATISTICS.c if column.name != "id"]
        rows = self.query(sa.select(*columns).order_by(DATA_STATISTICS.c.id))
        return [DataStatistic(**row) for row in rows]

    def add_verdict(self, verdict: GatewayVerdict) -> None:
        self.change(VERDICTS.insert(), [verdict.to_row()])

    def verdicts(self, limit: int, published_only: bool = False) -> list[GatewayVerdict]:
        query = sa.select(VERDICTS).order_by(VERDICTS.c.id.desc()).limit(limit)
        query = query.where(VERDICTS.c.digest.is_not(None)) if published_only else query
        return [GatewayVerdict.of_row(row) for row in self.query(query)]

    def put_token(self, token: TokenRecord) -> None:
        self.change(TOKENS.insert().prefix_with("OR REPLACE"), [token.to_row()])

    def tokens(self) -> list[TokenRecord]:
        return [TokenRecord.of_row(row) for row in self.query(sa.select(TOKENS))]

    def put_token_facts(self, facts: Sequence[TokenFacts]) -> None:
        if facts:
            self.change(TOKEN_FACTS.insert().prefix_with("OR REPLACE"), [asdict(one) for one in facts])

    def token_facts(self) -> list[TokenFacts]:
        return [TokenFacts(**row) for row in self.query(sa.select(TOKEN_FACTS))]

    def meta(self, key: str) -> str | None:
        rows = self.query(sa.select(META.c.value).where(META.c.key == key))
        return rows[0]["value"] if rows else None

    def set_meta(self, key: str, value: str) -> None:
        self.change(_put_meta, [{"key": key, "value": value}])

    def begin_incarnation(self) -> str:
        before = of_text(self.meta(INCARNATIONS_BEFORE))
        current, name = self.meta(INCARNATION), new_incarnation()
        if current is not None:
            before.append(FormerIncarnation(current, self.count()))
        changed = {INCARNATION: name, INCARNATIONS_BEFORE: to_text(before)}
        rows: list[dict[str, object]] = [{"key": key, "value": value} for key, value in changed.items()]
        with self._lock:
            self._write_locked(_put_meta, rows, replace(self._head, incarnation=name))
        return name

    def close(self) -> None:
        with self._lock:
            self._connection.close()
            self._engine.dispose()
