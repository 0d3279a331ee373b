"""Ownership in a real PostgreSQL: one owner a term, and no write of an owner whose term is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import sqlalchemy as sa
from holding_proxy import HoldingProxy
from postgres_server import PostgresServer
from support import registered

from fedmoe.server.replicas.ownership import Owners, Ownership, OwnersUnknownError, fence
from fedmoe.server.storage.journal import NotOwnerError
from fedmoe.server.storage.postgres import postgres_engine
from fedmoe.server.storage.postgres_journal import PostgresJournal

pytestmark = pytest.mark.scale


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.database()


@pytest.fixture
def owners(url: str) -> Iterator[Owners]:
    table = Owners(postgres_engine(url), 5.0)
    table.make_table()
    yield table
    table.close()


def taken(owners: Owners, name: str, lease: float = 30.0) -> Ownership:
    """The ownership of a duty that is free, or becomes free soon."""
    deadline = time.monotonic() + 10
    while (ownership := owners.take(name, f"http://127.0.0.1/{name}", lease)) is None:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return ownership


def test_a_duty_has_one_owner_and_every_change_another_term(owners: Owners) -> None:
    assert owners.look() is None
    first = taken(owners, "a")
    assert owners.take("b", "http://127.0.0.1/b", 30.0) is None
    assert owners.take("a", "http://127.0.0.1/a", 30.0) is None
    seen = owners.look()
    assert seen is not None
    assert (seen.replica, seen.term, seen.url, seen.over) == ("a", 1, "http://127.0.0.1/a", False)
    assert 20.0 < seen.left <= 30.0

    owners.give_back(first)
    second = taken(owners, "b")
    assert second.term == 2
    assert not owners.renew(first, 30.0)
    owners.give_back(first)  # too late: nothing changes
    assert owners.renew(second, 30.0)


def test_a_lease_that_is_not_renewed_ends_by_the_databases_clock(owners: Owners) -> None:
    taken(owners, "a", lease=0.3)
    assert taken(owners, "b").term == 2


def test_of_many_that_take_at_once_one_is_the_owner(url: str, owners: Owners) -> None:
    tables = [Owners(postgres_engine(url), 5.0) for _ in range(6)]
    results: list[Ownership | None] = []
    threads = [
        threading.Thread(target=lambda n=n, t=t: results.append(t.take(f"r{n}", "http://127.0.0.1/x", 30.0)))
        for n, t in enumerate(tables)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for table in tables:
        table.make_table()  # it is there: nothing happens
        table.close()
    assert [result.term for result in results if result is not None] == [1]


def test_the_journal_of_an_owner_whose_term_is_over_writes_nothing(url: str, owners: Owners) -> None:
    first = taken(owners, "a", lease=0.2)
    journal = PostgresJournal(url, fence=fence(first, 0.2))
    journal.append([registered()])
    time.sleep(0.3)  # as one that was stopped
    second = taken(owners, "b")
    with pytest.raises(NotOwnerError):
        journal.append([registered("sql")])
    with pytest.raises(NotOwnerError):
        journal.set_meta("something", "else")
    assert journal.count() == 1
    journal.close()
    successor = PostgresJournal(url, fence=fence(second, 30.0))
    successor.append([registered("sql")])
    assert successor.count() == 2
    successor.close()


def test_nobody_takes_over_while_the_owner_writes(url: str, owners: Owners) -> None:
    first = taken(owners, "a", lease=0.2)
    engine, writes, done = postgres_engine(url), threading.Event(), threading.Event()
    order: list[str] = []

    def write() -> None:
        with engine.begin() as connection:
            fence(first, 0.0)(connection)
            writes.set()
            time.sleep(0.6)  # longer than the lease
            order.append("written")
        done.set()

    thread = threading.Thread(target=write)
    thread.start()
    assert writes.wait(10)
    time.sleep(0.3)
    taken(owners, "b")
    order.append("taken")
    thread.join()
    engine.dispose()
    assert order == ["written", "taken"]


def test_an_owner_that_stops_in_the_middle_of_a_write_does_not_keep_others_waiting(url: str, owners: Owners) -> None:
    first = taken(owners, "a", lease=0.2)
    engine = postgres_engine(url)
    connection = engine.connect()
    connection.begin()
    fence(first, 0.2)(connection)
    # Nothing more comes of it: the server ends its transaction, and then there is another owner.
    assert taken(owners, "b").term == 2
    with pytest.raises(sa.exc.DBAPIError):
        connection.execute(sa.text("SELECT 1"))
    connection.invalidate()
    connection.close()
    engine.dispose()


def test_a_database_that_is_out_of_reach_is_not_waited_for(url: str, postgres: PostgresServer) -> None:
    proxy = HoldingProxy(postgres.port)
    table = Owners(postgres_engine(url.replace(f":{postgres.port}/", f":{proxy.port}/")), 0.5)
    table.make_table()
    proxy.hold()
    with pytest.raises(OwnersUnknownError):
        table.look()
    proxy.release(lose=False)
    deadline = time.monotonic() + 20
    while True:
        try:
            assert table.look() is None
            break
        except OwnersUnknownError:
            assert time.monotonic() < deadline
    table.close()
    proxy.close()
