"""What journals in databases share: rows of events are chained, every transaction notes where the journal ends then."""

from __future__ import annotations

import hashlib
import json
import secrets
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import IntegrityError

from fedmoe.federation.events import Event
from fedmoe.runtime import failpoints
from fedmoe.server.storage.acknowledged import AcknowledgedFile, Head, JournalGap, journal_gap
from fedmoe.server.storage.chain import COLUMNS, GENESIS, ChainEnd, link
from fedmoe.server.storage.event_rows import row_of
from fedmoe.server.storage.journal import DuplicateEventError, FormerIncarnation, Journal
from fedmoe.server.storage.seals import SEALED, row_key
from fedmoe.server.storage.tables import BLOB_STORE, EVENTS, INCARNATION, INCARNATIONS_BEFORE, META, MOVED_FROM

#: The keys in `meta` of the journal's own note of where it ends, of its schema, and of the opening that writes: each
#: takes the place of the one before.
HEAD, SCHEMA, WRITER = "head", "schema_version", "writer"
# What `meta` says of the journal's place and not of the federation.
_OF_PLACE = frozenset({HEAD, SCHEMA, WRITER, SEALED, BLOB_STORE, MOVED_FROM})
_PAGE = 5_000
#: The rows of a table, by pages.
Pages = Callable[[sa.Table], Iterator[list[dict[str, object]]]]


class ChainedJournal(Journal):
    """A journal in the tables of `storage.tables`, written by one process.

    With an `acknowledged` file every commit is noted there before the call returns.
    """

    def __init__(self, acknowledged: AcknowledgedFile | None) -> None:
        self._acknowledged = acknowledged
        self._lock = threading.Lock()
        self._head = Head()
        # By so much a row's number is more than that of its event.
        self._row_offset = 0

    @abstractmethod
    def _write_locked(
        self, statement: sa.Insert | sa.Delete, rows: list[dict[str, object]] | None = None, head: Head | None = None
    ) -> Any:
        """Run a statement in a transaction that ends at `head` with one more change; the caller holds the lock."""

    @abstractmethod
    def _replace_locked(self, pages: Pages, head: Head) -> None:
        """Put these rows in the place of all there are, of `meta` those of the federation, in one transaction."""

    @staticmethod
    @abstractmethod
    def _put(table: sa.Table) -> sa.Insert:
        """A statement that adds rows, each in the place of the one with its primary key."""

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

    def put(self, table: sa.Table, rows: list[dict[str, object]]) -> None:
        with self._lock:
            self._write_locked(self._put(table), rows)

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
            self._write_locked(self._put(META), rows, replace(self._head, incarnation=name))
        return name

    def take_over(self, source: ChainedJournal) -> None:
        """Take every row of another journal in the place of all there are; the history goes on as the same."""
        with self._lock:
            head = replace(source.head, changes=max(self._head.changes, source.head.changes) + 1)
            self._replace_locked(lambda table: federation_rows(source, table), head)
            self._row_offset = source._row_offset

    def _committed(self, head: Head) -> None:
        """Note that a transaction is durable, before anybody hears of it."""
        self._head = head
        failpoints.reached("journal.committed")
        if self._acknowledged is not None:
            self._acknowledged.write(head)
            failpoints.reached("journal.counted")


def federation_rows(journal: Journal, table: sa.Table) -> Iterator[list[dict[str, object]]]:
    """The rows of a table by pages, in an order that every back end keeps; of `meta` those of the federation alone."""
    if "id" not in table.columns:
        rows = [dict(row) for row in journal.query(sa.select(table))]
        rows = [row for row in rows if table is not META or row["key"] not in _OF_PLACE]
        yield sorted(rows, key=lambda row: [row[column.name] for column in table.primary_key])
        return
    last: int | None = 0
    while last is not None:
        query = sa.select(table).where(table.c.id > last).order_by(table.c.id).limit(_PAGE)
        page = [dict(row) for row in journal.query(query)]
        yield page
        last = page[-1]["id"] if len(page) == _PAGE else None


def rows_digest(journal: Journal, table: sa.Table) -> str:
    """A hash of what `federation_rows` gives, the same in every back end."""
    content = hashlib.sha256()
    for page in federation_rows(journal, table):
        for row in page:
            content.update(row_key(*(row[column.name] for column in table.columns)).encode() + b"\n")
    return content.hexdigest()


def federation_rows_of(table: sa.Table) -> sa.Delete:
    """A statement that removes what `federation_rows` gives."""
    return table.delete() if table is not META else table.delete().where(META.c.key.not_in(_OF_PLACE))


def checked_head(end: ChainEnd, noted: str | None, incarnation: str | None) -> Head:
    """Where the rows of events end, as noted in `meta`; raises ValueError if they end elsewhere."""
    try:
        head = Head.of_text(noted) if noted is not None else Head(end.rows, end.chain)
    except ValueError as error:
        raise ValueError(f"the note of the journal's end cannot be read: {error}") from error
    if (head.events, head.chain) != (end.rows, end.chain):
        raise ValueError(f"the journal ends after {end.rows} events, written were {head.events}")
    return replace(head, incarnation=incarnation or "")
