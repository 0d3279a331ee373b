"""The journal in PostgreSQL: one process writes it, every commit is certain, also where the connection breaks.

A transaction begins by locking the note of the journal's end. What stands there says whether this process still is the
writer, and after a connection that was lost during a commit whether that commit came about: nothing is lost or doubled.
"""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

import sqlalchemy as sa
import structlog
from sqlalchemy.exc import DBAPIError, IntegrityError

from fedmoe.federation.events import Event
from fedmoe.runtime import failpoints
from fedmoe.runtime.errors import RefusedError
from fedmoe.server.storage import postgres, postgres_seals
from fedmoe.server.storage.acknowledged import AcknowledgedFile, Head
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.chain import COLUMNS, ChainEnd, check
from fedmoe.server.storage.chained_journal import HEAD, WRITER, ChainedJournal, Pages, checked_head, federation_rows_of
from fedmoe.server.storage.event_rows import chained_event_of, event_of
from fedmoe.server.storage.journal import NotOwnerError
from fedmoe.server.storage.postgres_schema import REVISIONS, prepare_schema
from fedmoe.server.storage.read_ahead import CheckedRows
from fedmoe.server.storage.seals import fatal_damage
from fedmoe.server.storage.tables import ALL_TABLES, EVENTS, INCARNATION, META

#: Raises `NotOwnerError` where another process owns what is to be written; called first in every transaction.
Fence = Callable[[sa.Connection], None]
# So long whoever was killed may still hold the lock; so long the server may keep a connection that broke unseen.
_KILLED_SECONDS, _UNSEEN_SECONDS = 3.0, 40.0
_MOST_CONFLICTS, _OPENINGS = 5, 3
_FIRST_WAIT, _LONGEST_WAIT = 0.05, 1.0
_PAGE = 5_000
_log = structlog.get_logger("fedmoe.journal")

Result = TypeVar("Result")


class PostgresJournal(ChainedJournal):
    """The journal in a database that `postgres_engine` knows by `url`, for its one writer.

    Without a `fence` the writer is whoever holds a lock of the session, and a second one is refused. With one, whoever
    opens the journal is the writer until the next one opens it with one too. One that is being moved here is refused
    unless `moved_from` is the place that it is moved from. Rows that were `checked` before are not read again. While
    the database is away, reads and writes wait for `patience` seconds and are then refused as busy; a commit whose end
    is not known waits for `patience_in_doubt` seconds before the storage counts as failed.
    """

    def __init__(
        self,
        url: str,
        acknowledged: AcknowledgedFile | None = None,
        skip_damaged: bool = False,
        fence: Fence | None = None,
        accept_loss: bool = False,
        patience: float = 10.0,
        patience_in_doubt: float = 120.0,
        revisions: Iterable[Path] = REVISIONS,
        moved_from: str | None = None,
        checked: CheckedRows | None = None,
    ) -> None:
        super().__init__(acknowledged)
        # What a standby has read; handed on once.
        self._checked = checked or CheckedRows()
        self._engine = postgres.postgres_engine(url)
        # A statement alone needs no transaction, which would cost two more round trips.
        self._single_reads = self._engine.execution_options(isolation_level="AUTOCOMMIT")
        self._where = postgres.name_of(self._engine)
        self._fence = fence
        self._patience, self._patience_in_doubt = patience, patience_in_doubt
        self._writer = secrets.token_hex(16)
        self._connection: sa.Connection | None = None
        self._closing = threading.Event()
        try:
            self._open(accept_loss, skip_damaged, revisions, moved_from)
        except BaseException as error:
            self._drop_connection()
            self._engine.dispose()
            if isinstance(error, DBAPIError):
                raise postgres.opening_problem(error, self._where) from error
            raise

    def _open(self, accept_loss: bool, skip_damaged: bool, revisions: Iterable[Path], moved_from: str | None) -> None:
        self._check_server(self._connected(_KILLED_SECONDS), accept_loss)
        folders = tuple(revisions)
        for left in reversed(range(_OPENINGS)):
            try:
                connection = self._connected()
                prepare_schema(connection, self._where, self._check_owner, folders, moved_from)
                self._claim(connection)
                last_row, self._head = self._checked_end(connection)
                self._row_offset = last_row - self._head.events
                self._check_rows(connection, skip_damaged)
                return
            except DBAPIError as error:
                # On a busy machine a transaction may stand still for longer than the server takes.
                if not left or not postgres.is_lost(error):
                    raise
                self._drop_connection()

    def insert(self, table: sa.Table, row: dict[str, object]) -> int:
        with self._lock:
            added = self._write_locked(table.insert(), [row])
        return int(added[0]["id"])

    def query(self, statement: sa.Executable) -> list[sa.RowMapping]:
        return self._read(self._single_reads, lambda connection: list(connection.execute(statement).mappings()))

    def events(self, expert: str | None = None, after_version: int = -1) -> Iterator[Event]:
        query = sa.select(EVENTS.c.kind, EVENTS.c.payload)
        if expert is None:
            checked, self._checked = self._checked, CheckedRows()
            if checked.events:
                yield from checked.events
                query = query.where(EVENTS.c.id > checked.end.row)
            query = query.order_by(EVENTS.c.id)
        else:
            query = query.where(EVENTS.c.expert == expert, EVENTS.c.version > after_version).order_by(EVENTS.c.version)
        rows = self._read(self._engine, lambda connection: postgres.unhurried(connection).execute(query).all())
        read = chained_event_of if expert is None else event_of
        for kind, payload in rows:
            yield read(kind, payload)

    def forget_log(self) -> None:
        """Have the server reuse the room of removed rows; its write-ahead log and backups are its operator's."""
        with self._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            for table in postgres_seals.SEALED:
                connection.execute(sa.text(f'VACUUM "{table.name}"'))

    def close(self) -> None:
        self._closing.set()
        with self._lock:
            self._drop_connection()
            self._engine.dispose()

    @staticmethod
    def _put(table: sa.Table) -> sa.Insert:
        return postgres_seals.put_statement(table)

    # Opening.

    def _check_server(self, connection: sa.Connection, accept_loss: bool) -> None:
        durability = postgres.durability_of(connection)
        connection.rollback()
        _log.info("database", name=self._where, **asdict(durability))
        if durability.loses and not accept_loss:
            raise StorageFailedError(
                f"{self._where} runs with {durability.loses}: a crash of the server loses updates that were "
                "acknowledged. Switch it on (ALTER ROLE ... SET synchronous_commit = on; fsync in postgresql.conf), or "
                "start with --accept-database-loss where losing the last moments is fine"
            )
        if durability.loses:
            _log.warning("acknowledged_may_be_lost", setting=durability.loses)
        if durability.asynchronous_standbys:
            _log.warning(
                "standbys_are_asynchronous",
                standbys=durability.standbys,
                fix="set synchronous_standby_names, or a failover may lose acknowledged updates",
            )

    def _claim(self, connection: sa.Connection) -> None:
        """Become the writer: whoever was it finds so at its next transaction."""
        with connection.begin():
            self._check_owner(connection)
            connection.execute(sa.select(META.c.key).where(META.c.key == WRITER).with_for_update())
            postgres_seals.write_sealed(connection, self._put(META), [{"key": WRITER, "value": self._writer}])

    def _checked_end(self, connection: sa.Connection) -> tuple[int, Head]:
        columns = [EVENTS.c[name] for name in COLUMNS]
        query = sa.select(*columns, EVENTS.c.chain).order_by(EVENTS.c.id).execution_options(yield_per=_PAGE)
        with connection.begin():
            postgres.read_of_one_moment(connection)
            try:
                before = self._checked.end
                last = connection.execute(sa.select(EVENTS.c.chain).where(EVENTS.c.id == before.row)).scalar()
                if last != before.chain:  # nothing was read ahead, or it is another journal by now
                    self._checked, before = CheckedRows(), ChainEnd()
                with postgres.unhurried(connection).execute(query.where(EVENTS.c.id > before.row)) as rows:
                    end = check(rows, before)
                meta = dict(connection.execute(sa.select(META.c.key, META.c.value)).all())
                return end.row, checked_head(end, meta.get(HEAD), meta.get(INCARNATION))
            except ValueError as error:
                raise postgres.changed_outside(self._where, str(error)) from error

    def _check_rows(self, connection: sa.Connection, skip_damaged: bool) -> None:
        """Refuse rows beside the events that are not as they were written, or leave them out."""
        with connection.begin():
            postgres.read_of_one_moment(connection)
            damage = postgres_seals.damaged_rows(postgres.unhurried(connection))
        fatal = fatal_damage(damage, skip_damaged)
        if fatal:
            raise StorageFailedError(f"{postgres.changed_outside(self._where, fatal.rows)}{fatal.hint}")
        if damage:
            with self._lock:
                self._transact(lambda at: postgres_seals.drop_damaged(at, damage), self._head)
        for row in damage:
            _log.error("row_left_out", table=row.table, row=row.row, problem=row.problem)

    # Writing.

    def _check_owner(self, connection: sa.Connection) -> None:
        if self._fence is not None:
            self._fence(connection)

    def _write_locked(
        self, statement: sa.Insert | sa.Delete, rows: list[dict[str, object]] | None = None, head: Head | None = None
    ) -> Sequence[sa.RowMapping]:
        head = replace(head or self._head, changes=self._head.changes + 1)

        def change(connection: sa.Connection) -> Sequence[sa.RowMapping]:
            if statement.table is EVENTS:
                connection.execute(statement, rows)
                return ()
            return postgres_seals.write_sealed(connection, statement, rows)

        written = self._transact(change, head)
        self._committed(head)
        return written

    def _replace_locked(self, pages: Pages, head: Head) -> None:
        def change(connection: sa.Connection) -> None:
            postgres.unhurried(connection)
            for table in ALL_TABLES:
                if table is EVENTS:
                    connection.execute(table.delete())
                else:
                    postgres_seals.write_sealed(connection, federation_rows_of(table))
                for rows in filter(None, pages(table)):
                    if table is EVENTS:
                        connection.execute(table.insert(), rows)
                    else:
                        postgres_seals.write_sealed(connection, table.insert(), rows)
                if "id" in table.columns and table is not EVENTS:
                    number = f"setval(pg_get_serial_sequence('{table.name}', 'id'), max(id))"
                    connection.execute(sa.text(f"SELECT {number} FROM {table.name} HAVING max(id) > 0"))  # noqa: S608

        self._transact(change, head)
        self._committed(head)

    def _transact(self, change: Callable[[sa.Connection], Result], after: Head) -> Result:
        """Run `change` in one transaction after which the journal ends at `after`, exactly once.

        Nothing is known of a commit whose connection broke: the journal's end says, as soon as it can be read.
        """
        patience, conflicts, committing, result = _Patience(self._closing), 0, False, None
        while True:
            try:
                connection = self._connected()
                with connection.begin():
                    came_about = self._lock_end(connection, after if committing else None)
                    if not came_about:
                        committing = False
                        result = change(connection)
                        end: dict[str, object] = {"key": HEAD, "value": after.to_text()}
                        postgres_seals.write_sealed(connection, self._put(META), [end])
                        failpoints.reached("journal.before_commit")
                        committing = True
                return result  # type: ignore[return-value]  # what came about had one
            except (NotOwnerError, StorageFailedError):
                self._drop_connection()  # and with it the lock: this journal is of no use any more
                raise
            except DBAPIError as error:
                if postgres.is_lost(error):
                    self._drop_connection()
                    seconds = self._patience_in_doubt if committing else self._patience
                    if patience.wait(seconds, self._where, error):
                        continue
                    raise self._gone(error, committing) from error
                if postgres.may_be_repeated(error) and conflicts < _MOST_CONFLICTS:
                    conflicts, committing = conflicts + 1, False
                    continue
                if isinstance(error, IntegrityError) and postgres.is_duplicate(error):
                    raise
                raise postgres.journal_problem(error, self._where) from error

    def _lock_end(self, connection: sa.Connection, in_doubt: Head | None) -> bool:
        """Make this the only transaction that writes; whether the one in doubt came about."""
        self._check_owner(connection)
        query = sa.select(META.c.key, META.c.value).where(META.c.key.in_([HEAD, WRITER])).order_by(META.c.key)
        noted = dict(connection.execute(query.with_for_update()).all())
        if noted.get(WRITER) != self._writer:
            message = f"another process writes the journal {self._where} since; what this one has in memory is old"
            raise NotOwnerError(message) if self._fence is not None else StorageFailedError(message)
        end = Head.of_text(noted[HEAD] or "") if HEAD in noted else Head()
        if in_doubt is not None and _place(end) == _place(in_doubt):
            return True
        if _place(end) != _place(self._head):
            raise StorageFailedError(
                f"{self._where} holds {end.events} events in {end.changes} changes, {self._head.events} events in "
                f"{self._head.changes} changes were acknowledged: an older state of the database was put in its place, "
                "or a standby that lagged behind took over. Bring the newest one back"
            )
        return False

    def _connected(self, lock_seconds: float = _UNSEEN_SECONDS) -> sa.Connection:
        """The writing connection, opened where there is none, and with it the lock."""
        if self._connection is None:
            connection = self._engine.connect()
            try:
                self._lock_session(connection, lock_seconds)
            except BaseException:
                connection.invalidate()
                connection.close()
                raise
            self._connection = connection
        return self._connection

    def _lock_session(self, connection: sa.Connection, seconds: float) -> None:
        """Keep others away: without a fence all, with one those without."""
        deadline = time.monotonic() + seconds
        lock = "pg_try_advisory_lock" if self._fence is None else "pg_try_advisory_lock_shared"
        names = "hashtext('fedmoe.journal'), hashtext(current_schema())"
        while not connection.execute(sa.text(f"SELECT {lock}({names})")).scalar_one():
            connection.rollback()
            if time.monotonic() > deadline or self._closing.wait(0.1):
                raise StorageFailedError(
                    f"the journal {self._where} is in use by another coordinator; stop it first or choose another "
                    "database"
                )
        connection.commit()

    def _drop_connection(self) -> None:
        if self._connection is not None:
            self._connection.invalidate()
            self._connection.close()
            self._connection = None

    def _read(self, engine: sa.Engine, work: Callable[[sa.Connection], Result]) -> Result:
        patience = _Patience(self._closing)
        while True:
            try:
                with engine.connect() as connection:
                    return work(connection)
            except DBAPIError as error:
                if not postgres.is_lost(error):
                    raise postgres.journal_problem(error, self._where) from error
                if not patience.wait(self._patience, self._where, error):
                    raise self._gone(error, False) from error

    def _gone(self, error: DBAPIError, in_doubt: bool) -> Exception:
        reason = postgres.reason_of(error)
        if not in_doubt:
            return RefusedError(
                "busy", f"{self._where} cannot be reached: {reason}.", "Nothing was stored, retry later."
            )
        return StorageFailedError(
            f"{self._where} was lost during a commit and did not come back within {self._patience_in_doubt:g} seconds, "
            f"so that nobody knows whether it came about: {reason}. Start again once the database answers"
        )


class _Patience:
    """Waits that grow, for something that is away."""

    def __init__(self, closing: threading.Event) -> None:
        self._closing = closing
        self._since: float | None = None
        self._next = _FIRST_WAIT

    def wait(self, seconds: float, where: str, error: DBAPIError) -> bool:
        """Wait a moment; False once it was away for that long."""
        now = time.monotonic()
        if self._since is None:
            self._since = now
            _log.warning("database_away", name=where, reason=postgres.reason_of(error))
        if now - self._since >= seconds:
            return False
        if self._closing.wait(self._next):
            return False
        self._next = min(2 * self._next, _LONGEST_WAIT)
        return True


def _place(head: Head) -> tuple[int, str, int]:
    return head.events, head.chain, head.changes
