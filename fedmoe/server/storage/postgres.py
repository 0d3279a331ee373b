"""PostgreSQL specifics: the engine for a URL, what it must promise, and what its errors mean."""

from __future__ import annotations

from dataclasses import dataclass, fields

import sqlalchemy as sa
from sqlalchemy.engine.interfaces import DBAPIConnection
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, OperationalError

from fedmoe.runtime.errors import ExpectedError, RefusedError
from fedmoe.server.storage.blobs import StorageFailedError, disk_full
from fedmoe.server.storage.journal import UnstorableError

#: What is given to libpq unless the URL says otherwise: a server that is gone is noticed within seconds.
_CONNECT = {
    "application_name": "fedmoe",
    "connect_timeout": "5",
    "keepalives": "1",
    "keepalives_idle": "10",
    "keepalives_interval": "5",
    "keepalives_count": "3",
    "tcp_user_timeout": "15000",
    "target_session_attrs": "read-write",
}
# The server, too, notices within seconds that this process is gone, and ends a transaction that goes on in none: what
# it has locked would keep the next owner waiting.
_SESSION = (
    "SET statement_timeout = '60s'",
    "SET lock_timeout = '20s'",
    "SET idle_in_transaction_session_timeout = '2s'",
    "SET tcp_keepalives_idle = 10",
    "SET tcp_keepalives_interval = 5",
    "SET tcp_keepalives_count = 3",
)
# For a transaction that reads all there is, or changes tables.
_NO_TIMEOUTS = (
    "SET LOCAL statement_timeout = 0",
    "SET LOCAL idle_in_transaction_session_timeout = 0",
)
_CONNECTIONS = 8
# Classes and codes of https://www.postgresql.org/docs/current/errcodes-appendix.html
_LOST = ("08", "57P")
_LOST_TOO = {"25006", "25P03"}  # the server became a read-only standby; a transaction stood still for too long
_AGAIN = {"40001", "40P01"}
_FULL = "53100"
_WAITED = {"55P03", "57014"}
_DUPLICATE = "23505"


_EXPECTED = (
    "expected postgresql+psycopg://user@host:port/db; in a password write @ as %40, / as %2F, : as %3A, "
    "or give it in the file that PGPASSFILE names"
)


class DatabaseUrlError(ExpectedError):
    """A database that cannot be used as given; the message never shows a password."""


def postgres_engine(url: str) -> sa.Engine:
    """An engine for `postgresql+psycopg://user@host/database`, with timeouts; its connections open when used.

    What the URL gives to libpq after its `?` goes before what is given here. Raises `DatabaseUrlError`.
    """
    try:
        parsed = sa.make_url(url)
    except (ArgumentError, ValueError):  # ValueError: what stands where the port belongs, maybe half a password
        raise DatabaseUrlError(f"the database URL cannot be read; {_EXPECTED}") from None
    if "@" in f"{parsed.host} {parsed.database}":
        raise DatabaseUrlError(f"the database URL has more than one @; {_EXPECTED}")
    if parsed.drivername not in ("postgresql", "postgresql+psycopg"):
        raise DatabaseUrlError(f"expected a database URL postgresql+psycopg://user@host/db, got {parsed.drivername}://")
    defaults = {name: value for name, value in _CONNECT.items() if name not in parsed.query}
    try:
        engine = sa.create_engine(
            parsed.set(drivername="postgresql+psycopg"),
            connect_args=defaults,
            isolation_level="READ COMMITTED",
            pool_size=_CONNECTIONS,
            max_overflow=_CONNECTIONS,
            hide_parameters=True,
        )
    except ModuleNotFoundError as error:
        raise DatabaseUrlError(f"PostgreSQL needs the package {error.name}: pip install 'fedmoe[postgres]'") from error
    sa.event.listen(engine, "connect", _prepare)
    return engine


def _prepare(connection: DBAPIConnection, _: object) -> None:
    cursor = connection.cursor()
    for statement in _SESSION:
        cursor.execute(statement)
    cursor.close()
    connection.commit()


def unhurried(connection: sa.Connection) -> sa.Connection:
    """The connection, whose transaction may take its time."""
    for statement in _NO_TIMEOUTS:
        connection.execute(sa.text(statement))
    return connection


def read_of_one_moment(connection: sa.Connection) -> None:
    """Make all reads of the transaction that begins here see one state, whatever another writer commits meanwhile."""
    connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))


def name_of(engine: sa.Engine) -> str:
    """What a database is called in messages, without user, password and options."""
    url = engine.url
    host = url.host or url.query.get("host") or "a socket"
    return f"{url.database} of PostgreSQL at {host if isinstance(host, str) else ', '.join(host)}"


@dataclass(frozen=True, slots=True)
class Durability:
    """What a server says of itself: whether a commit that it reports survives a crash and a failover."""

    version: str
    fsync: str
    full_page_writes: str
    synchronous_commit: str
    synchronous_standby_names: str
    standbys: int

    @property
    def loses(self) -> str | None:
        """Which setting lets a crash of the server take acknowledged commits, in words; None where none does."""
        settings = {"fsync": self.fsync, "full_page_writes": self.full_page_writes}
        off = [
            name
            for name, value in (settings | {"synchronous_commit": self.synchronous_commit}).items()
            if value == "off"
        ]
        return " and ".join(f"{name} = off" for name in off) or None

    @property
    def asynchronous_standbys(self) -> bool:
        """Whether a failover to a standby may lose acknowledged commits."""
        synchronous = self.synchronous_standby_names and self.synchronous_commit not in ("off", "local")
        return self.standbys > 0 and not synchronous


def durability_of(connection: sa.Connection) -> Durability:
    """Ask a server what it promises, for sessions like this one."""
    names = [field.name for field in fields(Durability) if field.type == "str"]
    settings = ", ".join(f"current_setting('{'server_version' if name == 'version' else name}')" for name in names)
    values = connection.execute(sa.text(f"SELECT {settings}")).one()  # constants
    standbys = connection.execute(sa.text("SELECT count(*) FROM pg_stat_replication")).scalar_one()
    return Durability(**dict(zip(names, values, strict=True)), standbys=standbys)


def sqlstate(error: DBAPIError) -> str:
    """The server's five characters for an error; empty where the client found it."""
    return getattr(error.orig, "sqlstate", None) or ""


def is_lost(error: DBAPIError) -> bool:
    """Whether the connection is gone, was not made, or is no good for writing: a new one may do."""
    code = sqlstate(error)
    of_the_client = isinstance(error, OperationalError) and not code
    return error.connection_invalidated or of_the_client or code.startswith(_LOST) or code in _LOST_TOO


def may_be_repeated(error: DBAPIError) -> bool:
    """Whether the transaction was given up for another one, and is worth a second try."""
    return sqlstate(error) in _AGAIN


def is_duplicate(error: DBAPIError) -> bool:
    """Whether a row with the same key is there already."""
    return sqlstate(error) == _DUPLICATE


def reason_of(error: DBAPIError) -> str:
    """An error in one line, without its statement and parameters."""
    return " ".join(str(error.orig).split())[:500]


def journal_problem(error: DBAPIError, where: str) -> Exception:
    """What an error that the server answered with means: a refusal where it concerns one request, or waiting helps."""
    code = sqlstate(error)
    if isinstance(error, DataError):
        return UnstorableError(reason_of(error))
    if code == _FULL:
        return disk_full(where)
    if code in _WAITED:
        return RefusedError("busy", f"{where} did not answer in time.", "Nothing was stored, retry later.")
    return StorageFailedError(f"the journal {where} failed: {reason_of(error)}")


def opening_problem(error: DBAPIError, where: str) -> StorageFailedError:
    """The error for a database that cannot be opened."""
    return StorageFailedError(
        f"the journal {where} cannot be opened: {reason_of(error)}. Check --database-url and that PostgreSQL runs and "
        "lets this user in; a password belongs into the file that PGPASSFILE names"
    )


def changed_outside(where: str, what: str) -> StorageFailedError:
    """The error for a journal that can be read and that is not what was written."""
    return StorageFailedError(
        f"the journal {where} was damaged or changed: {what}. Restore the database from a backup, as of a moment "
        "before that."
    )
