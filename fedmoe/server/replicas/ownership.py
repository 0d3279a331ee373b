"""Which replica may decide: a lease in a PostgreSQL row, by the database's clock; later writes are refused."""

from __future__ import annotations

import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Literal, Protocol

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.exc import DBAPIError

from fedmoe.server.storage.journal import NotOwnerError

#: The one duty there is: to decide for every expert, to merge, to judge gateways, to sweep.
FEDERATION = "federation"
OWNERS = sa.Table(
    "owners",
    sa.MetaData(),
    sa.Column("duty", sa.Text, primary_key=True),
    sa.Column("replica", sa.Text, nullable=False),
    sa.Column("url", sa.Text, nullable=False),
    sa.Column("term", sa.BigInteger, nullable=False),
    sa.Column("until", sa.DateTime(timezone=True), nullable=False),
)
# Any number that nobody else locks in this database.
_TABLE_LOCK = 0x_F3D_0E_0012
_LEFT = sa.func.extract("epoch", OWNERS.c.until - sa.func.now()).label("left")


def steady_seconds() -> float:
    """Seconds that nobody sets, and that go on while the process, or the machine, is stopped."""
    return time.clock_gettime(time.CLOCK_BOOTTIME) if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic()


class OwnersUnknownError(Exception):
    """The database did not say who owns what; the message says why."""


@dataclass(frozen=True, slots=True)
class Ownership:
    """Who owns a duty: `term` rises with every change of owner, `left` are the seconds of the lease by the database."""

    duty: str
    replica: str
    url: str
    term: int
    left: float

    @property
    def over(self) -> bool:
        """Whether anybody may take the duty."""
        return self.left <= 0


def next_step(row: Ownership | None, may_own: bool) -> Literal["take", "follow"]:
    """What a replica without the duty does about the row it read."""
    return "take" if may_own and (row is None or row.over) else "follow"


def pause_before(row: Ownership | None, lease: float, chance: float) -> float:
    """Seconds until a replica looks again: a third of the lease, or when the one it saw ends if that is sooner.

    `chance`, from 0 to 1, spreads the replicas, so that few try to take the same duty at once.
    """
    usual = lease / 3
    left = usual if row is None else min(usual, max(0.0, row.left))
    return left + 0.05 * usual * (1 + chance)


class _Driver(Protocol):
    """What is used of a connection of psycopg."""

    def fileno(self) -> int: ...


class Connections:
    """Open connections to the database, so that those which wait for it in vain can be cut."""

    def __init__(self) -> None:
        self._open: weakref.WeakSet[_Driver] = weakref.WeakSet()
        self._lock = threading.Lock()

    def watch(self, engine: sa.Engine) -> None:
        """Know every connection that an engine opens from now on."""
        # First of all listeners: the others may already wait for an answer.
        sa.event.listen(engine, "connect", lambda connection, _: self.add(connection), insert=True)

    def add(self, connection: _Driver) -> None:
        with self._lock:
            self._open.add(connection)

    def cut(self) -> None:
        """End all of them: whoever waits for an answer gets an error, in whichever thread."""
        with self._lock:
            current = list(self._open)
        for connection in current:
            # Any error means that it was closed meanwhile.
            with suppress(Exception), socket.socket(fileno=os.dup(connection.fileno())) as copy:
                copy.shutdown(socket.SHUT_RDWR)


class Owners:
    """The table of owners; no call takes much longer than `patience` seconds. Every call raises `OwnersUnknownError`.

    `engine` is used for nothing else.
    """

    def __init__(self, engine: sa.Engine, patience: float) -> None:
        self._engine = engine
        self._patience = patience
        self._connections = Connections()
        self._connections.watch(engine)

    def make_table(self) -> None:
        """Make the table where it is missing."""
        with self._transaction() as connection:
            connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_TABLE_LOCK)))
            OWNERS.metadata.create_all(connection)

    def look(self, duty: str = FEDERATION) -> Ownership | None:
        """Who owns a duty, or owned it last; None before its first owner."""
        return next((row for row in self.all() if row.duty == duty), None)

    def all(self) -> list[Ownership]:
        """Every duty that ever had an owner."""
        columns = (OWNERS.c.duty, OWNERS.c.replica, OWNERS.c.url, OWNERS.c.term, _LEFT)
        with self._transaction() as connection:
            rows = connection.execute(sa.select(*columns).order_by(OWNERS.c.duty)).all()
        return [Ownership(duty, replica, url, term, float(left)) for duty, replica, url, term, left in rows]

    def take(self, replica: str, url: str, lease: float, duty: str = FEDERATION) -> Ownership | None:
        """Own the duty for `lease` seconds, in the next term; None while somebody else owns it."""
        row = {"replica": replica, "url": url, "until": _from_now(lease)}
        taking = (
            insert(OWNERS)
            .values(duty=duty, term=1, **row)
            .on_conflict_do_update(
                index_elements=[OWNERS.c.duty],
                set_={**row, "term": OWNERS.c.term + 1},
                where=OWNERS.c.until <= sa.func.now(),
            )
            .returning(OWNERS.c.term)
        )
        with self._transaction() as connection:
            term = connection.execute(taking).scalar_one_or_none()
        return None if term is None else Ownership(duty, replica, url, term, lease)

    def renew(self, mine: Ownership, lease: float) -> bool:
        """Own the duty for `lease` seconds from now; False if another term has begun."""
        with self._transaction() as connection:
            return connection.execute(_update(mine).values(until=_from_now(lease))).rowcount == 1

    def give_back(self, mine: Ownership) -> None:
        """Let anybody take the duty now; nothing changes if another term has begun."""
        with self._transaction() as connection:
            connection.execute(_update(mine).values(until=sa.func.now()))

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _transaction(self) -> Iterator[sa.Connection]:
        timer = threading.Timer(self._patience, self._connections.cut)
        timer.daemon = True
        timer.start()
        try:
            with self._engine.begin() as connection:
                yield connection
        except DBAPIError as error:
            raise OwnersUnknownError(" ".join(str(error.orig).split())[:300]) from error
        finally:
            timer.cancel()


def fence(mine: Ownership, lease: float) -> Callable[[sa.Connection], None]:
    """What the journal calls first in every transaction that writes; raises `NotOwnerError` once the term is over.

    The row stays locked until the transaction ends, so that nobody takes the duty while something is being written. A
    write renews the lease too.
    """
    statement = _update(mine).values(until=sa.func.greatest(OWNERS.c.until, _from_now(lease)))

    def check(connection: sa.Connection) -> None:
        if connection.execute(statement).rowcount != 1:
            raise NotOwnerError(f"term {mine.term} of {mine.replica} is over: another replica decides now")

    return check


def _update(mine: Ownership) -> sa.Update:
    """An update of the row while the term lasts."""
    return sa.update(OWNERS).where(
        OWNERS.c.duty == mine.duty, OWNERS.c.replica == mine.replica, OWNERS.c.term == mine.term
    )


def _from_now(seconds: float) -> sa.ColumnElement[datetime]:
    return sa.func.now() + sa.func.make_interval(0, 0, 0, 0, 0, 0, seconds)
