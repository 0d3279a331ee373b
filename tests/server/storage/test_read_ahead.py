"""What a standby reads ahead is what the journal holds, and is of no use once that is another one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa
from postgres_server import PostgresServer
from support import accepted, registered

from fedmoe.federation.events import Event
from fedmoe.server.storage import read_ahead
from fedmoe.server.storage.blobs import StorageFailedError
from fedmoe.server.storage.postgres import postgres_engine
from fedmoe.server.storage.postgres_journal import PostgresJournal
from fedmoe.server.storage.read_ahead import CheckedRows, ReadAhead

pytestmark = pytest.mark.scale

EVENTS: list[Event] = [registered("python"), *map(accepted, range(1, 6))]


@pytest.fixture
def url(postgres: PostgresServer) -> str:
    return postgres.database()


@pytest.fixture
def opened(url: str) -> Iterator[Callable[..., PostgresJournal]]:
    """Opens the journal as an owner of a later term does; all are closed at the end."""
    journals: list[PostgresJournal] = []

    def open_it(checked: CheckedRows | None = None) -> PostgresJournal:
        journals.append(PostgresJournal(url, fence=lambda _: None, checked=checked))
        return journals[-1]

    yield open_it
    for journal in journals:
        journal.close()


@pytest.fixture
def standby(url: str) -> Iterator[ReadAhead]:
    standby = ReadAhead(url, 0.01)
    standby.start()
    yield standby
    standby.close()


def read(standby: ReadAhead, rows: int) -> CheckedRows:
    """What it has once it has read so many rows."""
    deadline = time.monotonic() + 60
    while standby._rows.end.rows < rows:
        assert time.monotonic() < deadline, f"{standby._rows.end.rows} rows of {rows} were read"
        time.sleep(0.01)
    return standby.take()


def changed(url: str, statement: str) -> None:
    engine = postgres_engine(url)
    with engine.begin() as connection:
        connection.execute(sa.text(statement))
    engine.dispose()


Opener = Callable[..., PostgresJournal]


def test_what_was_read_ahead_and_what_came_after_it_are_the_whole_journal(standby: ReadAhead, opened: Opener) -> None:
    first = opened()
    first.append(EVENTS[:3])
    rows = read(standby, 3)
    assert rows.events == EVENTS[:3]
    first.append(EVENTS[3:])
    second = opened(rows)
    assert second.head.events == first.head.events == len(EVENTS)
    assert second.head.chain == first.head.chain
    for _ in range(2):
        assert list(second.events()) == EVENTS
    second.append([accepted(6)])
    assert len(list(opened().events())) == len(EVENTS) + 1


def test_it_goes_on_reading_and_begins_anew_after_it_was_taken(standby: ReadAhead, opened: Opener) -> None:
    journal = opened()
    for number, event in enumerate(EVENTS, 1):
        journal.append([event])
        if number == 4:
            assert read(standby, 4).events == EVENTS[:4]
            assert standby.take().events == []
            standby.resume()
    assert read(standby, len(EVENTS)).events == EVENTS


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE events SET payload = replace(payload, 'w1', 'w2') WHERE id = 3",
        "DELETE FROM events WHERE id >= 3",
    ],
)
def test_rows_that_are_others_by_now_are_read_again_and_refused(
    statement: str, url: str, standby: ReadAhead, opened: Opener
) -> None:
    opened().append(EVENTS[:3])
    rows = read(standby, 3)
    changed(url, statement)
    if statement.startswith("UPDATE"):
        changed(url, "UPDATE events SET chain = 'another' WHERE id = 3")
    with pytest.raises(StorageFailedError):
        opened(rows)


def test_a_damaged_row_is_not_read_past_and_is_named_by_who_opens_the_journal(
    url: str, standby: ReadAhead, opened: Opener
) -> None:
    opened().append(EVENTS)
    read(standby, len(EVENTS))
    changed(url, "UPDATE events SET expert = 'sql' WHERE id = 4")
    assert standby._read_page()
    rows = standby.take()
    assert rows == CheckedRows()
    with pytest.raises(StorageFailedError, match="row 4"):
        opened(rows)


def test_of_a_long_journal_only_the_rows_are_checked(
    standby: ReadAhead, opened: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "MOST_EVENTS", 4)
    monkeypatch.setattr(read_ahead, "_PAGE", 2)
    opened().append(EVENTS)
    rows = read(standby, len(EVENTS))
    assert (rows.end.rows, rows.events) == (len(EVENTS), None)
    assert list(opened(rows).events()) == EVENTS
