"""The journal: every event in order, durable before anybody is told about it.

One writing connection, one transaction per batch of events, `synchronous=FULL`: when `append` returns, the events
survive a power cut. Nothing is ever changed in place; rollback and retraction are events too.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import sqlalchemy as sa
from sqlalchemy.exc import DatabaseError, IntegrityError
from sqlalchemy.pool import StaticPool

from fedmoe.events import Event, UpdateAccepted
from fedmoe.storage.blobs import StorageFailedError
from fedmoe.storage.event_rows import event_of, row_of
from fedmoe.storage.sqlite import journal_problem, set_pragmas, unusable
from fedmoe.storage.verdicts import VERDICTS, Verdict, newest_verdicts

SCHEMA_VERSION = 1
_tables = sa.MetaData()
_meta = sa.Table("meta", _tables, sa.Column("key", sa.Text, primary_key=True), sa.Column("value", sa.Text))
_events = sa.Table(
    "events",
    _tables,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("expert", sa.Text, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
    sa.Column("worker", sa.Text),
    sa.Column("epoch", sa.Text),
    sa.Column("sequence", sa.Integer),
    sa.Column("digest", sa.Text),
    sa.Column("payload", sa.Text, nullable=False),
    # An update's identity: the same one can never be in the journal twice, whoever writes.
    sa.UniqueConstraint("worker", "epoch", "sequence"),
    sa.UniqueConstraint("expert", "version"),
)
_snapshots = sa.Table(
    "snapshots",
    _tables,
    sa.Column("expert", sa.Text, primary_key=True),
    sa.Column("version", sa.Integer, primary_key=True),
    sa.Column("digest", sa.Text, nullable=False),
)
_statistics = sa.Table(
    "statistics",
    _tables,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("expert", sa.Text, nullable=False),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("payload", sa.Text, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
_data_statistics = sa.Table(
    "data_statistics",
    _tables,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=True),
    sa.Column("expert", sa.Text, nullable=False),
    sa.Column("worker", sa.Text, nullable=False),
    sa.Column("kind", sa.Text, nullable=False),
    sa.Column("digest", sa.Text, nullable=False),
    sa.Column("size", sa.Integer, nullable=False),
    sa.Column("at", sa.Float, nullable=False),
)
_tokens = sa.Table(
    "tokens",
    _tables,
    sa.Column("hash", sa.Text, primary_key=True),
    sa.Column("role", sa.Text, nullable=False),
    sa.Column("worker", sa.Text),
    sa.Column("experts", sa.Text),
    sa.Column("expires_at", sa.Float),
    sa.Column("revoked", sa.Boolean, nullable=False, default=False),
)


@dataclass(frozen=True, slots=True)
class TokenRecord:
    """What the journal knows of a token: its hash and what it may do, never the token.

    `worker` and `experts` None mean any; `expires_at` is seconds since 1970, None never.
    """

    hash: str
    role: str
    worker: str | None = None
    experts: tuple[str, ...] | None = None
    expires_at: float | None = None
    revoked: bool = False


@dataclass(frozen=True, slots=True)
class Statistic:
    """A small fact a worker chose to send (for example a held-out loss), kept like an update."""

    expert: str
    worker: str
    kind: str
    payload: Mapping[str, object]
    at: float


@dataclass(frozen=True, slots=True)
class DataStatistic:
    """What a worker tells of its data (`kind` is prompts or moments): the digest of the blob that holds it, its bytes.

    A later one of the same expert, worker and kind takes the place of an earlier one.
    """

    expert: str
    worker: str
    kind: str
    digest: str
    size: int
    at: float


class DuplicateEventError(Exception):
    """An event whose identity is already in the journal; the whole batch was refused."""


class Journal(Protocol):
    """The order of everything that happened, and the small tables that must survive with it."""

    def append(self, events: Sequence[Event]) -> None:
        """Make events durable, all or none; raises `DuplicateEventError` if one is there already."""
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

    def add_statistic(self, statistic: Statistic) -> None: ...

    def statistics(self, expert: str | None = None) -> list[Statistic]: ...

    def add_data_statistic(self, statistic: DataStatistic) -> None: ...

    def data_statistics(self) -> list[DataStatistic]:
        """All there ever were, in order."""
        ...

    def add_verdict(self, verdict: Verdict) -> None: ...

    def verdicts(self, limit: int, published_only: bool = False) -> list[Verdict]:
        """The newest first."""
        ...

    def put_token(self, token: TokenRecord) -> None: ...

    def tokens(self) -> list[TokenRecord]: ...

    def meta(self, key: str) -> str | None: ...

    def set_meta(self, key: str, value: str) -> None: ...

    def close(self) -> None: ...


class SqlJournal:
    """The journal in an SQL database; SQLite in a file (the embedded default) or in memory."""

    def __init__(self, path: Path | None) -> None:
        self._where = str(path) if path else "memory"
        self._lock = threading.Lock()
        url = sa.URL.create("sqlite", database=str(path) if path else None)
        self._engine = sa.create_engine(
            url, poolclass=StaticPool, connect_args={"check_same_thread": False, "timeout": 5.0}
        )
        sa.event.listen(self._engine, "connect", set_pragmas)
        try:
            self._connection = self._engine.connect()
            self._prepare()
        except BaseException as error:
            self._engine.dispose()
            if isinstance(error, (DatabaseError, sqlite3.DatabaseError)):
                reason = error.orig if isinstance(error, DatabaseError) else error
                raise unusable(self._where, str(reason)) from error
            raise

    def _prepare(self) -> None:
        damage = self._connection.exec_driver_sql("PRAGMA quick_check(1)").scalar_one()
        if damage != "ok":
            raise unusable(self._where, " ".join(str(damage).split()))
        # The version is read before any table is made, so that another version's journal stays as it is.
        found = self.meta("schema_version") if sa.inspect(self._connection).has_table(_meta.name) else None
        self._connection.rollback()
        if found is None:
            _tables.create_all(self._connection)
            self._connection.commit()
            self.set_meta("schema_version", str(SCHEMA_VERSION))
        elif found != str(SCHEMA_VERSION):
            raise StorageFailedError(
                f"the journal {self._where} has schema {found}, this program reads {SCHEMA_VERSION}; "
                "run the FedMoE version that wrote it"
            )
        # Tables that came later; a program from before leaves them alone.
        for table in (_data_statistics, VERDICTS):
            table.create(self._connection, checkfirst=True)
        self._connection.commit()

    def append(self, events: Sequence[Event]) -> None:
        rows = [row_of(event) for event in events]
        if not rows:
            return
        try:
            self._write(_events.insert(), rows)
        except IntegrityError as error:
            raise DuplicateEventError(str(error.orig)) from error

    def _write(self, statement: sa.Executable, rows: list[dict[str, object]] | None = None) -> None:
        with self._lock:
            try:
                self._connection.execute(statement, rows)
                self._connection.commit()
            except IntegrityError:
                self._connection.rollback()
                raise
            except DatabaseError as error:
                self._connection.rollback()
                raise journal_problem(error, self._where) from error

    def _read(self, statement: sa.Executable) -> list[sa.RowMapping]:
        with self._lock:
            try:
                return list(self._connection.execute(statement).mappings())
            except DatabaseError as error:
                raise journal_problem(error, self._where) from error
            finally:
                self._connection.rollback()

    def events(self, expert: str | None = None, after_version: int = -1) -> Iterator[Event]:
        query = sa.select(_events.c.kind, _events.c.payload).order_by(_events.c.id)
        if expert is not None:
            query = query.where(_events.c.expert == expert, _events.c.version > after_version)
        for row in self._read(query):
            yield event_of(row["kind"], row["payload"])

    def count(self) -> int:
        query = sa.select(sa.func.count().label("events")).select_from(_events)
        return int(self._read(query)[0]["events"])

    def find_update(self, worker: str, epoch: str, sequence: int) -> UpdateAccepted | None:
        query = sa.select(_events.c.payload).where(
            _events.c.worker == worker, _events.c.epoch == epoch, _events.c.sequence == sequence
        )
        for row in self._read(query):
            event = event_of("update", row["payload"])
            assert isinstance(event, UpdateAccepted)
            return event
        return None

    def add_snapshot(self, expert: str, version: int, digest: str) -> None:
        self._write(
            _snapshots.insert().prefix_with("OR REPLACE"), [{"expert": expert, "version": version, "digest": digest}]
        )

    def snapshots(self, expert: str) -> dict[int, str]:
        query = sa.select(_snapshots.c.version, _snapshots.c.digest).where(_snapshots.c.expert == expert)
        return {row["version"]: row["digest"] for row in self._read(query)}

    def drop_snapshot(self, expert: str, version: int) -> None:
        self._write(_snapshots.delete().where(_snapshots.c.expert == expert, _snapshots.c.version == version))

    def named_elsewhere(self, expert: str, digests: Collection[str]) -> set[str]:
        tables = (_events, _snapshots)
        queries = [sa.select(table.c.digest).where(table.c.expert != expert).distinct() for table in tables]
        return {row["digest"] for query in queries for row in self._read(query)} & set(digests)

    def add_statistic(self, statistic: Statistic) -> None:
        row = asdict(statistic) | {"payload": json.dumps(dict(statistic.payload), allow_nan=False)}
        self._write(_statistics.insert(), [row])

    def statistics(self, expert: str | None = None) -> list[Statistic]:
        query = sa.select(_statistics).order_by(_statistics.c.id)
        if expert is not None:
            query = query.where(_statistics.c.expert == expert)
        return [
            Statistic(row["expert"], row["worker"], row["kind"], json.loads(row["payload"]), row["at"])
            for row in self._read(query)
        ]

    def add_data_statistic(self, statistic: DataStatistic) -> None:
        self._write(_data_statistics.insert(), [asdict(statistic)])

    def data_statistics(self) -> list[DataStatistic]:
        columns = [column for column in _data_statistics.c if column.name != "id"]
        rows = self._read(sa.select(*columns).order_by(_data_statistics.c.id))
        return [DataStatistic(**row) for row in rows]

    def add_verdict(self, verdict: Verdict) -> None:
        self._write(VERDICTS.insert(), [verdict.to_row()])

    def verdicts(self, limit: int, published_only: bool = False) -> list[Verdict]:
        return [Verdict.of_row(row) for row in self._read(newest_verdicts(limit, published_only))]

    def put_token(self, token: TokenRecord) -> None:
        row = asdict(token) | {"experts": json.dumps(token.experts) if token.experts is not None else None}
        self._write(_tokens.insert().prefix_with("OR REPLACE"), [row])

    def tokens(self) -> list[TokenRecord]:
        return [
            TokenRecord(
                row["hash"],
                row["role"],
                row["worker"],
                tuple(json.loads(row["experts"])) if row["experts"] is not None else None,
                row["expires_at"],
                row["revoked"],
            )
            for row in self._read(sa.select(_tokens))
        ]

    def meta(self, key: str) -> str | None:
        rows = self._read(sa.select(_meta.c.value).where(_meta.c.key == key))
        return rows[0]["value"] if rows else None

    def set_meta(self, key: str, value: str) -> None:
        self._write(_meta.insert().prefix_with("OR REPLACE"), [{"key": key, "value": value}])

    def close(self) -> None:
        with self._lock:
            self._connection.close()
            self._engine.dispose()
